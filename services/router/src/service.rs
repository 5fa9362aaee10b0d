//! The front door's logic: admission, prompts, placement, and answers that outlive a worker. Never speaks a wire protocol.

mod admission;
mod answer;
mod attempt;
pub(crate) mod check;
mod ids;
mod inventory;
mod lookup;
mod outlet;
mod prompt;
mod request;
mod sequence;
mod stop;
#[cfg(test)]
mod tests;
mod workers;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use longshore_attention::{KvDtype, TileShape};
use longshore_blocks::{Deployment, Geometry};
use longshore_chassis::Tasks;
use longshore_cluster::{ClusterView, Member};
use longshore_fabric::{BoxStream, CallContext, Connector, Describer, Error as CallError, Inference};
use longshore_model::{ModelInfo, SpecialTokens};
use longshore_proto::types::{
    Describe, Dtype, GenerateEvent, GenerateStart, ModelDescription, PromptChunk, WireTileShape,
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use crate::{
    Config, Error, Policies,
    metrics::{Outcome, RouterMetrics},
    policies::Chosen,
};
use admission::Admission;
use ids::Ids;
use inventory::Inventories;
use outlet::Outlet;
use prompt::PromptLimits;
use request::Request;
use workers::Workers;
pub(crate) use workers::wire_role;

/// What a router is made of.
#[derive(Debug)]
pub struct Parts {
    /// Settings, already checked.
    pub config: Config,
    /// This process.
    pub this: Member,
    /// Version of the program.
    pub version: String,
    /// Name that clients ask for.
    pub model_name: String,
    /// Tokenizer, chat template and shape of the model.
    pub model: Arc<ModelInfo>,
    /// What the KV of this cluster depends on.
    pub deployment: Deployment,
    /// Prefill policies that requests may name, and the default.
    pub policies: Policies,
    /// Block and stripe sizes.
    pub geometry: Geometry,
    /// Shape of every tile.
    pub tile_shape: WireTileShape,
    /// Positions of the context, prompt and answer together; at least 2.
    pub max_context_tokens: u64,
    /// The cluster, now and later.
    pub cluster: watch::Receiver<Arc<ClusterView>>,
    /// Clients of shards and workers.
    pub connector: Arc<dyn Connector>,
    /// Owner of the requests' tasks. Requests go on for `drain_ms` after it is cancelled.
    pub tasks: Tasks,
    /// Counters.
    pub metrics: RouterMetrics,
    /// Differs from start to start; request names and seeds come from it.
    pub nonce: u64,
}

/// The front door. Clones are the same router.
#[derive(Debug, Clone)]
pub struct Router {
    inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    config: Config,
    this: Member,
    version: String,
    model: Arc<ModelInfo>,
    deployment: Deployment,
    policies: Policies,
    geometry: Geometry,
    description: ModelDescription,
    block_bytes: u64,
    limits: PromptLimits,
    cluster: watch::Receiver<Arc<ClusterView>>,
    connector: Arc<dyn Connector>,
    tasks: Tasks,
    metrics: RouterMetrics,
    ids: Ids,
    admission: Admission,
    workers: Workers,
    inventories: Arc<Inventories>,
}

impl Router {
    /// A router; it serves at once and finds its workers in the cluster's view.
    pub fn new(parts: Parts) -> Self {
        let limits = PromptLimits {
            model: parts.model_name.clone(),
            context_tokens: parts.max_context_tokens,
            longest_token_bytes: parts.model.tokenizer.longest_token_bytes() as u64,
            vocabulary: u32::try_from(parts.model.config.vocabulary).unwrap_or(u32::MAX),
        };
        let block_bytes = block_bytes(&parts.tile_shape);
        let description = ModelDescription {
            name: parts.model_name,
            architecture: parts.model.config.architecture.clone(),
            max_context_tokens: parts.max_context_tokens,
            vocabulary: limits.vocabulary,
            tile_shape: parts.tile_shape,
            kv_bytes_per_token: block_bytes / u64::from(parts.tile_shape.block_tokens.max(1)),
            deployment: parts.deployment,
        };
        let connector = Arc::clone(&parts.connector);
        let workers = Workers::new(connector, parts.deployment, &parts.config, parts.metrics.clone());
        let inventories = Inventories::new(
            parts.deployment,
            parts.cluster.clone(),
            Arc::clone(&parts.connector),
            parts.tasks.clone(),
            parts.metrics.index.clone(),
            (parts.config.index_namespaces_max, parts.config.index_blocks_max),
        );
        let inner = Inner {
            inventories,
            admission: Admission::new(&parts.config, parts.metrics.clone()),
            workers,
            config: parts.config,
            this: parts.this,
            version: parts.version,
            model: parts.model,
            deployment: parts.deployment,
            policies: parts.policies,
            geometry: parts.geometry,
            description,
            block_bytes,
            limits,
            cluster: parts.cluster,
            connector: parts.connector,
            tasks: parts.tasks,
            metrics: parts.metrics,
            ids: Ids::new(parts.nonce),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The model that this router serves.
    pub fn model(&self) -> &ModelDescription {
        &self.inner.description
    }

    /// Settings.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// Whether the router was asked to stop.
    pub fn draining(&self) -> bool {
        self.inner.tasks.is_cancelled()
    }

    /// What keeps this router from answering right now, if anything: a role that nobody has.
    pub fn missing_role(&self) -> Option<longshore_cluster::Role> {
        use longshore_cluster::Role;
        let view = self.inner.view();
        [Role::KvStore, Role::Prefill, Role::Decode]
            .into_iter()
            .find(|role| view.with_role(*role).next().is_none())
    }

    pub(crate) fn tasks(&self) -> &Tasks {
        &self.inner.tasks
    }

    pub(crate) fn request_id(&self) -> String {
        self.inner.ids.request()
    }

    pub(crate) fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.inner.model.tokenizer.decode_piece(id)
    }

    /// Counts a request that was refused before it became one.
    pub(crate) fn refused(&self, error: &CallError) {
        self.inner.metrics.ended(Outcome::Failed(error.code), Duration::ZERO);
    }
}

impl Inner {
    pub(crate) fn view(&self) -> Arc<ClusterView> {
        Arc::clone(&self.cluster.borrow())
    }

    fn check_model(&self, name: &str) -> Result<(), Error> {
        if name.is_empty() || name == self.description.name {
            return Ok(());
        }
        Err(Error::UnknownModel {
            name: name.escape_debug().to_string(),
            served: self.description.name.clone(),
        })
    }

    /// Runs one request to its end, whichever comes first of answer, cancellation, deadline and shutdown.
    async fn drive(
        self: Arc<Self>,
        ctx: CallContext,
        (start, policy): (GenerateStart, Chosen),
        prompt: mpsc::Receiver<PromptChunk>,
        outlet: Outlet,
    ) {
        let began = Instant::now();
        let workers = ctx.child();
        let _release = workers.cancel.clone().drop_guard();
        let request = Request { inner: &self, ctx: workers, start, policy, outlet: &outlet };
        let run = Box::pin(request.run(prompt));
        let result = tokio::select! {
            biased;
            result = run => result,
            () = outlet.closed() => Err(Error::Cancelled),
            () = ctx.cancel.cancelled() => Err(Error::Cancelled),
            () = until(ctx.deadline) => Err(Error::Deadline),
            () = self.drained() => Err(Error::Draining),
        };
        // The error may wait for a slow client; the workers must not.
        request.ctx.cancel.cancel();
        let id = &request.ctx.request_id;
        match result {
            Ok(reason) => {
                self.metrics.ended(reason.into(), began.elapsed());
                tracing::debug!(request = %id, ?reason, "request finished");
            }
            Err(error) => {
                self.metrics.ended(Outcome::Failed(error.kind().code()), began.elapsed());
                tracing::debug!(request = %id, %error, "request failed");
                outlet.fail(error.into()).await;
            }
        }
    }

    async fn drained(&self) {
        self.tasks.cancelled().await;
        tokio::time::sleep(Duration::from_millis(self.config.drain_ms)).await;
    }
}

/// Why the caller of `ctx` wants no answer any more, if so. Errors of workers that see this first are not the workers'.
fn ended(ctx: &CallContext) -> Option<Error> {
    if ctx.cancel.is_cancelled() {
        return Some(Error::Cancelled);
    }
    ctx.deadline.filter(|deadline| *deadline <= Instant::now()).map(|_| Error::Deadline)
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Bytes of one block over all layers.
fn block_bytes(shape: &WireTileShape) -> u64 {
    let dtype = match shape.dtype {
        Dtype::F32 => KvDtype::F32,
        Dtype::F16 => KvDtype::F16,
        Dtype::Bf16 => KvDtype::Bf16,
        Dtype::Int8 => KvDtype::Int8,
    };
    let tile = TileShape {
        block_tokens: shape.block_tokens as usize,
        kv_heads: shape.kv_heads as usize,
        head_dim: shape.head_dim as usize,
        dtype,
    };
    tile.bytes() as u64 * u64::from(shape.layers)
}

#[async_trait]
impl Inference for Router {
    /// Answers at once; whatever goes wrong after the parameters were checked comes as the stream's last item.
    async fn generate(
        &self,
        ctx: &CallContext,
        mut start: GenerateStart,
        prompt: mpsc::Receiver<PromptChunk>,
    ) -> Result<BoxStream<GenerateEvent>, CallError> {
        let inner = &self.inner;
        let checked = check::check(&start).and_then(|()| inner.check_model(&start.model));
        let checked = checked.and_then(|()| inner.policies.choose(&start.prefill_policy));
        let checked =
            checked.and_then(|policy| if self.draining() { Err(Error::Draining) } else { Ok(policy) });
        let policy = match checked {
            Ok(policy) => policy,
            Err(error) => {
                let error = error.into();
                self.refused(&error);
                return Err(error);
            }
        };
        let mut ctx = ctx.clone();
        let named = std::mem::take(&mut start.request_id);
        if !named.is_empty() {
            ctx.request_id = named;
        } else if !check::usable_request_id(&ctx.request_id) {
            ctx.request_id = inner.ids.request();
        }
        if let (None, Some(timeout)) = (ctx.deadline, inner.config.request_timeout()) {
            ctx = ctx.with_timeout(timeout);
        }
        inner.workers.retain(&inner.view());
        let stall = Duration::from_millis(inner.config.client_stall_ms);
        let (outlet, events) = outlet::outlet(stall, inner.tasks.token());
        inner.tasks.spawn("request", Arc::clone(inner).drive(ctx, (start, policy), prompt, outlet));
        Ok(Box::pin(events))
    }

    async fn tokenize(
        &self,
        _ctx: &CallContext,
        model: &str,
        text: &str,
        skip_special_tokens: bool,
    ) -> Result<Vec<u32>, CallError> {
        let inner = Arc::clone(&self.inner);
        inner.check_model(model)?;
        inner.limits.check_bytes(text.len() as u64)?;
        let text = text.to_owned();
        let special = if skip_special_tokens { SpecialTokens::Skip } else { SpecialTokens::Add };
        let place = inner.admission.admit().await?;
        let work = {
            let inner = Arc::clone(&inner);
            move || {
                // The work goes on when the call is dropped, and so does its claim to a place.
                let _place = place;
                inner.model.tokenizer.encode(&text, special)
            }
        };
        let joined = inner.tasks.tracker().spawn_blocking(work).await;
        let tokens = joined.map_err(|error| Error::Internal(format!("tokenizing failed: {error}")))?;
        let tokens = tokens.map_err(Error::from)?;
        if tokens.len() as u64 > inner.limits.context_tokens {
            return Err(inner.limits.too_long().into());
        }
        Ok(tokens)
    }

    async fn list_models(&self, _ctx: &CallContext) -> Result<Vec<ModelDescription>, CallError> {
        Ok(vec![self.inner.description.clone()])
    }
}

#[async_trait]
impl Describer for Router {
    async fn describe(&self, _ctx: &CallContext) -> Result<Describe, CallError> {
        let inner = &self.inner;
        let view = inner.view();
        let wire = |member: &Member| longshore_proto::types::Member {
            id: member.id.clone(),
            role: wire_role(member.role),
            address: member.address.clone(),
            incarnation: member.incarnation,
            weight: member.weight,
            healthy: inner.workers.healthy(member),
            host: member.labels.host.clone(),
            zone: member.labels.zone.clone(),
        };
        Ok(Describe {
            this: wire(&inner.this),
            members: view.members().iter().map(wire).collect(),
            epoch: view.epoch(),
            models: vec![inner.description.clone()],
            version: inner.version.clone(),
        })
    }
}
