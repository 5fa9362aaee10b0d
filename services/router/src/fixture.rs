//! A cluster of fakes for tests: real tokenizer, real lanes, real keys and placement; shards that hold keys only, workers
//! that compute nothing. What the fake decode worker generates depends on every token before it, so that a lost or doubled
//! token changes all that follow.

mod fakes;

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures::StreamExt as _;
use longshore_blocks::{Deployment, Geometry};
use longshore_chassis::Tasks;
use longshore_cluster::{ClusterView, Member, Role};
use longshore_fabric::{BoxStream, CallContext, Error as CallError, Inference as _, LocalConnector};
use longshore_model::{
    ModelInfo, SpecialTokens,
    testing::{TinyOptions, write_tiny_gguf},
};
use longshore_proto::types::{
    Dtype, Finished, GenerateEvent, GenerateStart, PromptChunk, TokenChoice, WireTileShape,
};
use tokio::sync::{mpsc, watch};

use crate::{Config, Parts, Policies, Router, RouterMetrics};
pub(crate) use fakes::{FakeDecoder, FakeDescriber, FakePrefiller, FakeShard, Script, Store, generated};

/// Context of the fake cluster.
pub(crate) const CONTEXT_TOKENS: u64 = 2_000;
/// Name of the fake model.
pub(crate) const MODEL: &str = "tiny";

/// What a fixture is made of.
pub(crate) struct Options {
    pub(crate) config: Config,
    pub(crate) shards: usize,
    pub(crate) prefillers: usize,
    pub(crate) decoders: usize,
}

impl Default for Options {
    fn default() -> Self {
        // No worker is slow to say who it is because the machine is busy.
        let config = Config { retry_backoff_ms: 1, handshake_timeout_ms: 60_000, ..Config::default() };
        Self { config, shards: 2, prefillers: 1, decoders: 1 }
    }
}

/// A router in front of fakes.
pub(crate) struct Fixture {
    pub(crate) router: Router,
    pub(crate) connector: LocalConnector,
    pub(crate) store: Arc<Store>,
    pub(crate) shards: Vec<Arc<FakeShard>>,
    pub(crate) prefillers: Vec<Arc<FakePrefiller>>,
    pub(crate) decoders: Vec<Arc<FakeDecoder>>,
    pub(crate) describers: Vec<(String, Arc<FakeDescriber>)>,
    pub(crate) metrics: RouterMetrics,
    pub(crate) tasks: Tasks,
    view: watch::Sender<Arc<ClusterView>>,
}

/// An answer, put together.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Collected {
    pub(crate) prompt_tokens: u64,
    pub(crate) cached_tokens: u64,
    pub(crate) prefill_policy: String,
    pub(crate) text: String,
    pub(crate) ids: Vec<u32>,
    pub(crate) logprobs: Vec<TokenChoice>,
    pub(crate) progress: Vec<u64>,
    pub(crate) finished: Option<Finished>,
}

impl Collected {
    pub(crate) fn finished(&self) -> &Finished {
        self.finished.as_ref().expect("the answer is complete")
    }
}

/// The tiny model; written and read once.
pub(crate) fn model() -> Arc<ModelInfo> {
    static MODEL: OnceLock<Arc<ModelInfo>> = OnceLock::new();
    let open = || {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("tiny.gguf");
        write_tiny_gguf(&path, &TinyOptions::default()).expect("a tiny model");
        Arc::new(ModelInfo::open(&path).expect("the tiny model is valid"))
    };
    Arc::clone(MODEL.get_or_init(open))
}

pub(crate) fn deployment() -> Deployment {
    Deployment::from_bytes([9; 32])
}

pub(crate) fn encode(text: &str) -> Vec<u32> {
    model().tokenizer.encode(text, SpecialTokens::Skip).expect("any text can be spelled")
}

fn member(id: String, role: Role) -> Member {
    let address = format!("local:{id}");
    let weight = u32::from(role == Role::KvStore);
    Member { id, role, address, incarnation: 1, weight, labels: longshore_cluster::Labels::default() }
}

impl Fixture {
    pub(crate) fn new(options: Options) -> Self {
        let connector = LocalConnector::new();
        let (store, mut describers, mut members) = (Arc::new(Store::default()), Vec::new(), Vec::new());
        let mut join = |id: &str, role: Role| {
            let describer = Arc::new(FakeDescriber::new(id, role));
            connector.add_describer(id, Arc::clone(&describer) as Arc<_>);
            describers.push((id.to_owned(), describer));
            members.push(member(id.to_owned(), role));
            id.to_owned()
        };
        let shards = (0..options.shards).map(|n| {
            let id = join(&format!("kv-{n}"), Role::KvStore);
            let shard = Arc::new(FakeShard::new(Arc::clone(&store), &id));
            connector.add_shard(id, Arc::clone(&shard) as Arc<_>);
            shard
        });
        let shards = shards.collect();
        let (view, cluster) =
            watch::channel(Arc::new(ClusterView::new(Vec::new()).expect("an empty view is valid")));
        let prefillers = (0..options.prefillers).map(|n| {
            let id = join(&format!("prefill-{n}"), Role::Prefill);
            let worker = Arc::new(FakePrefiller::new(Arc::clone(&store), cluster.clone()));
            connector.add_prefiller(id, Arc::clone(&worker) as Arc<_>);
            worker
        });
        let prefillers = prefillers.collect();
        let decoders = (0..options.decoders).map(|n| {
            let id = join(&format!("decode-{n}"), Role::Decode);
            let worker = Arc::new(FakeDecoder::new(Arc::clone(&store), cluster.clone()));
            connector.add_decoder(id, Arc::clone(&worker) as Arc<_>);
            worker
        });
        let decoders = decoders.collect();
        view.send_replace(Arc::new(ClusterView::new(members).expect("the members are valid")));
        let (metrics, tasks) = (RouterMetrics::default(), Tasks::new());
        let router = Router::new(Parts {
            config: options.config.clone(),
            this: member("router-0".to_owned(), Role::Router),
            version: "test".to_owned(),
            model_name: MODEL.to_owned(),
            model: model(),
            deployment: deployment(),
            policies: Policies::new(&options.config.prefill_policy, None).expect("the policy is known"),
            geometry: Geometry::default(),
            tile_shape: tile_shape(),
            max_context_tokens: CONTEXT_TOKENS,
            cluster,
            connector: Arc::new(connector.clone()),
            tasks: tasks.clone(),
            metrics: metrics.clone(),
            nonce: 1,
        });
        Self { router, connector, store, shards, prefillers, decoders, describers, metrics, tasks, view }
    }

    /// Replaces the members; the services stay.
    pub(crate) fn set_members(&self, members: Vec<Member>) {
        self.view.send_replace(Arc::new(ClusterView::new(members).expect("the members are valid")));
    }

    pub(crate) fn members(&self) -> Vec<Member> {
        self.view.borrow().members().to_vec()
    }

    /// Starts a request whose prompt is complete.
    pub(crate) async fn start(
        &self,
        start: GenerateStart,
        prompt: Vec<PromptChunk>,
    ) -> Result<BoxStream<GenerateEvent>, CallError> {
        let (sender, receiver) = mpsc::channel(prompt.len().max(1));
        for chunk in prompt {
            sender.try_send(chunk).expect("the queue has room");
        }
        drop(sender);
        self.router.generate(&CallContext::new("test"), start, receiver).await
    }

    /// Runs a request to its end.
    pub(crate) async fn generate(
        &self,
        start: GenerateStart,
        prompt: Vec<PromptChunk>,
    ) -> Result<Collected, CallError> {
        collect(self.start(start, prompt).await?).await
    }

    /// Runs a request for a prompt of `tokens` ids.
    pub(crate) async fn generate_ids(
        &self,
        start: GenerateStart,
        tokens: u32,
    ) -> Result<Collected, CallError> {
        self.generate(start, vec![PromptChunk::Tokens(prompt_ids(tokens))]).await
    }

    /// Waits until `condition` holds; fails the test after a minute.
    pub(crate) async fn eventually(what: &str, condition: impl Fn() -> bool) {
        for _ in 0..6_000 {
            if condition() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{what} did not happen");
    }
}

/// Token ids that spell something.
pub(crate) fn prompt_ids(tokens: u32) -> Vec<u32> {
    (0..tokens).map(|n| 40 + n % 50).collect()
}

pub(crate) async fn collect(mut events: BoxStream<GenerateEvent>) -> Result<Collected, CallError> {
    let mut all = Collected::default();
    let mut accepted = 0;
    while let Some(event) = events.next().await {
        assert!(all.finished.is_none(), "nothing comes after the end");
        match event? {
            GenerateEvent::Accepted { prompt_tokens, cached_tokens, prefill_policy, .. } => {
                accepted += 1;
                (all.prompt_tokens, all.cached_tokens) = (prompt_tokens, cached_tokens);
                all.prefill_policy = prefill_policy;
            }
            GenerateEvent::Progress { done_tokens, .. } => all.progress.push(done_tokens),
            GenerateEvent::Tokens(tokens) => {
                all.text.push_str(&tokens.text);
                all.ids.extend(tokens.token_ids);
                all.logprobs.extend(tokens.logprobs);
            }
            GenerateEvent::Finished(finished) => all.finished = Some(finished),
        }
    }
    assert_eq!(accepted, 1, "the head comes once");
    assert!(all.finished.is_some(), "the stream ends with its totals");
    Ok(all)
}

pub(crate) fn tile_shape() -> WireTileShape {
    WireTileShape { block_tokens: 64, kv_heads: 2, head_dim: 16, dtype: Dtype::F16, layout: 1, layers: 2 }
}
