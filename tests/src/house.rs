//! A whole cluster in this process with a tiny random model: shards that can be wrapped to misbehave, workers, a router.

use std::sync::Arc;

use futures::StreamExt;
use longshore_attention::{CpuExecutor, KvDtype, TileShape};
use longshore_blocks::{Deployment, DeploymentParts, Geometry, ShardId, ShardMap, quorum::CopyRule};
use longshore_chassis::{Metrics, Tasks};
use longshore_cluster::{Labels, Member, Membership, MemoryMembership, Registration, Role};
use longshore_compute::{ComputePool, PoolOptions};
use longshore_decode::DecodeWorker;
use longshore_engine::{Engine, EngineOptions, Limits, ShardDirectory, WorkerParts, wire_tile_shape};
use longshore_fabric::{
    AnyConnector, CallContext, Error, GrpcConnector, GrpcOptions, Inference, LocalConnector, Shard,
};
use longshore_kvstore::{KvStore, ShardIdentity};
use longshore_model::{
    CpuBackend, CpuOptions, Linear, LoadedModel,
    testing::{TinyOptions, write_tiny_gguf},
};
use longshore_prefill::{PrefillWorker, PrefixPolicy};
use longshore_proto::types::{
    Finished, GenerateEvent, GenerateStart, ModelDescription, PromptChunk, Sampling, WireTileShape,
};
use longshore_router::{DEFAULT_PREFILL_POLICY, Policies, Router, RouterMetrics};
use tokio::sync::{mpsc, watch};

/// Puts something between the cluster and one of its shards.
pub type Wrap = Box<dyn Fn(usize, Arc<KvStore>) -> Arc<dyn Shard> + Send + Sync>;

/// How a house is built.
#[allow(missing_debug_implementations, reason = "a closure has nothing to show")]
pub struct Plan {
    /// KV shards.
    pub shards: usize,
    /// Decode workers.
    pub decoders: usize,
    /// Blocks of a stripe.
    pub stripe_blocks: u32,
    /// How a prefill worker attends to a cached prefix.
    pub prefix: PrefixPolicy,
    /// What the cluster sees of each shard.
    pub wrap: Wrap,
    /// Copies of each block.
    pub rule: CopyRule,
    /// Settings of the shards.
    pub kvstore: longshore_kvstore::Config,
}

impl Default for Plan {
    fn default() -> Self {
        let prefix = PrefixPolicy::default();
        let (rule, kvstore) = (CopyRule::default(), longshore_kvstore::Config::default());
        Self {
            shards: 2,
            decoders: 1,
            stripe_blocks: 2,
            prefix,
            wrap: Box::new(|_, shard| shard),
            rule,
            kvstore,
        }
    }
}

/// A cluster in this process.
#[allow(missing_debug_implementations, reason = "its parts are what a test looks at")]
pub struct House {
    /// Front door.
    pub router: Router,
    /// Its counters.
    pub router_metrics: RouterMetrics,
    /// The shards themselves, unwrapped.
    pub shards: Vec<Arc<KvStore>>,
    /// What the KV depends on.
    pub deployment: Deployment,
    /// Block and stripe sizes.
    pub geometry: Geometry,
    site: Site,
    _folder: tempfile::TempDir,
}

/// An answer: its tokens and its last event.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Vocabulary ids.
    pub tokens: Vec<u32>,
    /// Totals.
    pub finished: Finished,
}

impl House {
    /// Builds and starts everything.
    pub async fn build(plan: Plan) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("tiny.gguf");
        write_tiny_gguf(&path, &TinyOptions::default()).expect("a tiny model");
        let loaded = LoadedModel::open(&path, &|_| ()).expect("the tiny model loads");
        let geometry = Geometry::new(16, plan.stripe_blocks).expect("a geometry");
        let parts = DeploymentParts {
            model: &loaded.info.digest,
            position: &loaded.info.config.position_fingerprint(),
            representation: "f16",
            block_tokens: 16,
            stripe_blocks: plan.stripe_blocks,
            linear: "auto",
        };
        let tasks = Tasks::new();
        let membership = MemoryMembership::new();
        let mut site = Site {
            epochs: longshore_kvstore::epochs(membership.watch(), &tasks),
            plan,
            deployment: Deployment::new(&parts),
            geometry,
            loaded,
            local: LocalConnector::new(),
            membership,
            tasks: tasks.clone(),
            pool: ComputePool::new(&PoolOptions { threads: 2, pin: Vec::new() }).expect("two threads"),
            registrations: Vec::new(),
        };
        let shards = site.shards().await;
        site.workers().await;
        let (router, router_metrics) = site.router("router-0");
        let deployment = site.deployment;
        Self { router, router_metrics, shards, deployment, geometry, site, _folder: folder }
    }

    /// One more front door with counters of its own.
    pub fn another_router(&self) -> (Router, RouterMetrics) {
        self.site.router("router-1")
    }

    /// The shard map of this moment.
    pub fn map(&self) -> ShardMap {
        self.site.membership.view().shard_map()
    }

    /// Puts an empty shard in the place of one, as a restart would; what the old one had is gone.
    pub fn restart_shard(&mut self, index: usize) {
        self.shards[index] = self.site.shard(index);
    }

    /// Lets one more shard join.
    pub async fn add_shard(&mut self) {
        let index = self.shards.len();
        // Reachable before anybody knows of it.
        self.shards.push(self.site.shard(index));
        self.site.join(Role::KvStore, &format!("kv-{index}")).await;
    }

    /// Lets a shard leave the cluster; it stays reachable.
    pub fn remove_shard(&mut self, index: usize) {
        let id = format!("kv-{index}");
        self.site.registrations.retain(|registration| registration.member().id != id);
    }

    /// Greedy answer to token ids.
    pub async fn generate(&self, prompt: &[u32], max_tokens: u32) -> Result<Answer, Error> {
        let sampling = Sampling {
            temperature: 0.0,
            max_tokens: Some(max_tokens),
            ignore_eos: true,
            ..Sampling::default()
        };
        self.ask(GenerateStart { sampling, ..GenerateStart::default() }, prompt).await
    }

    /// Answer to token ids with parameters of one's own.
    pub async fn ask(&self, start: GenerateStart, prompt: &[u32]) -> Result<Answer, Error> {
        let (send, chunks) = mpsc::channel(1);
        send.send(PromptChunk::Tokens(prompt.to_vec())).await.expect("a channel of one takes one");
        drop(send);
        let mut events = self.router.generate(&CallContext::new("test"), start, chunks).await?;
        let mut tokens = Vec::new();
        while let Some(event) = events.next().await {
            match event? {
                GenerateEvent::Tokens(piece) => tokens.extend(piece.token_ids),
                GenerateEvent::Finished(finished) => return Ok(Answer { tokens, finished }),
                _ => {}
            }
        }
        panic!("the answer ended without its last event");
    }

    /// Ends every task; names those that did not end.
    pub async fn end(&self) -> Vec<String> {
        // Workers hold links to shards through the registry that holds the workers: out of it, they end.
        for registration in &self.site.registrations {
            if registration.member().role != Role::KvStore {
                self.site.local.remove(&registration.member().id);
            }
        }
        self.site.tasks.drain(std::time::Duration::from_secs(20)).await
    }
}

impl Drop for House {
    /// Engine threads end with their tasks; the runtime of a test waits for them.
    fn drop(&mut self) {
        self.site.tasks.cancel();
    }
}

struct Site {
    plan: Plan,
    epochs: watch::Receiver<u64>,
    deployment: Deployment,
    geometry: Geometry,
    loaded: LoadedModel,
    local: LocalConnector,
    membership: MemoryMembership,
    tasks: Tasks,
    pool: Arc<ComputePool>,
    registrations: Vec<Registration>,
}

impl Site {
    fn tile_shape(&self) -> TileShape {
        let heads = self.loaded.info.config.heads;
        TileShape {
            block_tokens: 16,
            kv_heads: heads.kv_heads,
            head_dim: heads.head_dim,
            dtype: KvDtype::F16,
        }
    }

    async fn join(&mut self, role: Role, id: &str) -> Member {
        let weight = u32::from(role == Role::KvStore);
        let member = Member {
            id: id.to_owned(),
            role,
            address: format!("local:{id}"),
            incarnation: 1,
            weight,
            labels: Labels::default(),
        };
        let registration = self.membership.register(member.clone()).await.expect("ids are unique");
        self.registrations.push(registration);
        member
    }

    async fn shards(&mut self) -> Vec<Arc<KvStore>> {
        for index in 0..self.plan.shards {
            self.join(Role::KvStore, &format!("kv-{index}")).await;
        }
        // The map is whole: its epoch changes no more unless a test says so.
        let whole = self.membership.view().epoch();
        let followed = self.epochs.wait_for(|epoch| *epoch == whole).await.map(|_| ());
        followed.expect("the follower lives as long as the tasks");
        (0..self.plan.shards).map(|index| self.shard(index)).collect()
    }

    /// An empty shard, reachable under the name of `index`.
    fn shard(&self, index: usize) -> Arc<KvStore> {
        let identity = ShardIdentity {
            shard_id: ShardId(format!("kv-{index}")),
            deployment: self.deployment,
            epoch: self.epochs.clone(),
            geometry: self.geometry,
            tile_shape: self.tile_shape(),
            layers: self.loaded.info.config.layers as u32,
        };
        let config = self.plan.kvstore.clone();
        let store = KvStore::new(config, identity, &self.pool, &self.tasks, &Metrics::new());
        let store = store.expect("the settings are valid");
        store.join(longshore_kvstore::Cluster {
            views: self.membership.watch(),
            connector: Arc::new(self.local.clone()),
            rule: self.plan.rule,
        });
        self.local.add_shard(format!("kv-{index}"), (self.plan.wrap)(index, Arc::clone(&store)));
        store
    }

    async fn workers(&mut self) {
        let cpu = CpuOptions { pool: Arc::clone(&self.pool), linear: Linear::Auto };
        let config = self.loaded.info.config.clone();
        let backend = CpuBackend::new(config, &self.loaded.weights, cpu, &|_| ()).expect("a backend");
        let options = EngineOptions { kv_dtype: KvDtype::F16, ..EngineOptions::default() };
        let engine = Engine::new(
            Arc::new(backend),
            Arc::new(CpuExecutor::new(Arc::clone(&self.pool))),
            Arc::clone(&self.pool),
            self.geometry,
            options,
        )
        .expect("an engine");
        let engine = Arc::new(engine);
        let defaults = longshore_prefill::Config::default();
        let config = longshore_prefill::Config { chunk_tokens: 64, prefix: self.plan.prefix, ..defaults };
        let metrics = longshore_prefill::PrefillMetrics::register(&Metrics::new());
        let prefill = PrefillWorker::new(config, self.parts(&engine), None, &self.tasks, metrics);
        let member = self.join(Role::Prefill, "prefill-0").await;
        self.local.add_prefiller("prefill-0", prefill);
        self.describe(member);
        for index in 0..self.plan.decoders {
            let id = format!("decode-{index}");
            let metrics = longshore_decode::DecodeMetrics::register(&Metrics::new());
            let decode = DecodeWorker::new(
                longshore_decode::Config::default(),
                self.parts(&engine),
                None,
                &self.tasks,
                metrics,
            );
            let member = self.join(Role::Decode, &id).await;
            self.local.add_decoder(id, decode);
            self.describe(member);
        }
    }

    fn parts(&self, engine: &Arc<Engine>) -> WorkerParts {
        let connector = Arc::new(self.local.clone());
        let tracker = self.tasks.tracker().clone();
        let shards = ShardDirectory::new(self.membership.watch(), connector, tracker, 64);
        let shards = shards.with_copies(self.plan.rule);
        let limits = Limits {
            deployment: self.deployment,
            context_tokens: self.loaded.info.config.context_tokens,
            vocabulary: self.loaded.info.config.vocabulary as u32,
        };
        WorkerParts { engine: Arc::clone(engine), shards: Arc::new(shards), limits }
    }

    fn wire_tile_shape(&self) -> WireTileShape {
        wire_tile_shape(self.tile_shape(), self.loaded.info.config.layers)
    }

    fn describe(&self, this: Member) {
        let model = ModelDescription {
            name: "tiny".to_owned(),
            architecture: "llama".to_owned(),
            max_context_tokens: self.loaded.info.config.context_tokens,
            vocabulary: self.loaded.info.config.vocabulary as u32,
            tile_shape: self.wire_tile_shape(),
            kv_bytes_per_token: 0,
            deployment: self.deployment,
        };
        let id = this.id.clone();
        self.local.add_describer(id, Arc::new(Sign { this, model }));
    }

    fn router(&self, id: &str) -> (Router, RouterMetrics) {
        let this = Member {
            id: id.to_owned(),
            role: Role::Router,
            address: format!("local:{id}"),
            incarnation: 1,
            weight: 0,
            labels: Labels::default(),
        };
        let connector = AnyConnector::new(self.local.clone(), GrpcConnector::new(GrpcOptions::default()));
        let loaded = LoadedModel::open(&self.loaded.info.path, &|_| ()).expect("the tiny model loads again");
        let metrics = RouterMetrics::register(&Metrics::new());
        let router = Router::new(longshore_router::Parts {
            config: longshore_router::Config {
                copies: self.plan.rule.copies() as u32,
                ..longshore_router::Config::default()
            },
            this,
            version: "test".to_owned(),
            model_name: "tiny".to_owned(),
            model: Arc::new(loaded.info),
            deployment: self.deployment,
            policies: Policies::new(DEFAULT_PREFILL_POLICY, None).expect("the default is known"),
            geometry: self.geometry,
            tile_shape: self.wire_tile_shape(),
            max_context_tokens: self.loaded.info.config.context_tokens,
            cluster: self.membership.watch(),
            connector: Arc::new(connector),
            tasks: self.tasks.clone(),
            metrics: metrics.clone(),
            nonce: 1,
        });
        (router, metrics)
    }
}

/// Answers `Describe`.
#[derive(Debug)]
struct Sign {
    this: Member,
    model: ModelDescription,
}

#[async_trait::async_trait]
impl longshore_fabric::Describer for Sign {
    async fn describe(&self, _ctx: &CallContext) -> Result<longshore_proto::types::Describe, Error> {
        let role = match self.this.role {
            Role::Router => longshore_proto::types::Role::Router,
            Role::Prefill => longshore_proto::types::Role::Prefill,
            Role::Decode => longshore_proto::types::Role::Decode,
            Role::KvStore => longshore_proto::types::Role::KvStore,
        };
        let this = longshore_proto::types::Member {
            id: self.this.id.clone(),
            role,
            address: self.this.address.clone(),
            incarnation: self.this.incarnation,
            weight: self.this.weight,
            healthy: true,
            host: String::new(),
            zone: String::new(),
        };
        let members = vec![this.clone()];
        Ok(longshore_proto::types::Describe {
            this,
            members,
            epoch: 0,
            models: vec![self.model.clone()],
            version: "test".into(),
        })
    }
}
