//! A cluster of shards in memory, and the reference that every placement is held against.

use std::{collections::BTreeMap, sync::Arc};

use longshore_attention::{CpuExecutor, KvDtype};
use longshore_blocks::{Deployment, DeploymentParts, EXACT_PREFILL, Geometry, quorum::CopyRule};
use longshore_cluster::{ClusterView, Member, Role};
use longshore_compute::{ComputePool, PoolOptions};
use longshore_fabric::{
    AnyConnector, CallContext, GrpcConnector, GrpcOptions, LocalConnector, Shard,
    server::{ServerOptions, Services, serve},
};
use longshore_model::{Backend, RowLogits};
use longshore_proto::types::Identity;
use tokio::{net::TcpListener, sync::watch, task::JoinSet};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Bodies, MemoryShard, TinyModel};
use crate::{
    Engine, EngineOptions, Limits, Logits, Sequence, ShardDirectory, ShardLinks, StepInput, WorkerParts,
};

/// Blocks of 16 tokens in stripes of 3, so that short prompts cross both.
const BLOCK_TOKENS: u32 = 16;
const STRIPE_BLOCKS: u32 = 3;

/// A tiny model and shards in memory.
#[derive(Debug)]
pub struct TestCluster {
    /// The model.
    pub model: Arc<TinyModel>,
    /// The walk.
    pub engine: Arc<Engine>,
    /// The shards.
    pub shards: Vec<MemoryShard>,
    /// What workers take.
    pub parts: WorkerParts,
    /// Changes the membership.
    pub views: watch::Sender<Arc<ClusterView>>,
    /// Reaches `local:shard-N`.
    pub connector: LocalConnector,
    deployment: Deployment,
    /// Servers of the shards, where they are reached over gRPC; they end with the cluster.
    _servers: JoinSet<Result<(), longshore_fabric::Error>>,
}

impl TestCluster {
    /// A cluster of `shards` shards; must be made on a runtime.
    pub fn new(shards: usize, dtype: KvDtype) -> Self {
        Self::with_options(shards, EngineOptions { kv_dtype: dtype, ..EngineOptions::default() })
    }

    /// A cluster with settings of the walk.
    pub fn with_options(count: usize, options: EngineOptions) -> Self {
        Self::build(count, options, CopyRule::default(), false)
    }

    /// A cluster whose shards are reached over gRPC.
    pub fn over_grpc(count: usize, options: EngineOptions) -> Self {
        Self::build(count, options, CopyRule::default(), true)
    }

    /// A cluster with so many copies of each block.
    pub fn with_copies(count: usize, options: EngineOptions, rule: CopyRule) -> Self {
        Self::build(count, options, rule, false)
    }

    fn build(count: usize, options: EngineOptions, rule: CopyRule, grpc: bool) -> Self {
        let geometry = Geometry::new(BLOCK_TOKENS, STRIPE_BLOCKS).expect("the sizes are in range");
        let model = Arc::new(TinyModel::new(7));
        let backend = Arc::clone(&model) as Arc<dyn Backend>;
        let pool = ComputePool::new(&PoolOptions { threads: 2, pin: Vec::new() }).expect("two threads");
        let executor = Arc::new(CpuExecutor::new(Arc::clone(&pool)));
        let engine = Engine::new(backend, executor, pool, geometry, options);
        let engine = Arc::new(engine.expect("the tiny model makes valid tiles"));
        let connector = LocalConnector::new();
        let (heads, layers) = (model.config().heads, model.config().layers);
        let shard = || MemoryShard::new(heads, geometry, engine.tile_shape(), layers);
        let shards: Vec<MemoryShard> = (0..count).map(|_| shard()).collect();
        let mut servers = JoinSet::new();
        let mut addresses = Vec::with_capacity(count);
        for (index, shard) in shards.iter().enumerate() {
            let shared = Arc::new(shard.clone()) as Arc<dyn Shard>;
            connector.add_shard(format!("shard-{index}"), Arc::clone(&shared));
            addresses.push(match grpc {
                true => serve_shard(&mut servers, shared),
                false => format!("local:shard-{index}"),
            });
        }
        let (views, receiver) = watch::channel(Arc::new(view(addresses)));
        let both = AnyConnector::new(connector.clone(), GrpcConnector::new(GrpcOptions::default()));
        let directory = ShardDirectory::new(receiver, Arc::new(both), TaskTracker::new(), 16);
        let directory = directory.with_copies(rule);
        let deployment = Deployment::new(&DeploymentParts {
            model: &[1; 32],
            position: "plain",
            representation: options.kv_dtype.name(),
            block_tokens: BLOCK_TOKENS,
            stripe_blocks: STRIPE_BLOCKS,
            linear: "f32",
        });
        let limits =
            Limits { deployment, context_tokens: 1024, vocabulary: model.config().vocabulary as u32 };
        let parts = WorkerParts { engine: Arc::clone(&engine), shards: Arc::new(directory), limits };
        Self { model, engine, shards, parts, views, connector, deployment, _servers: servers }
    }

    /// What a caller of this cluster says of itself, for the tenant with `salt`.
    pub fn identity(&self, salt: &[u8]) -> Identity {
        Identity {
            deployment: self.deployment,
            namespace: self.deployment.namespace(EXACT_PREFILL, salt),
            shard_map_epoch: self.parts.shards.epoch(),
        }
    }

    /// Links of the newest shard map.
    pub fn links(&self) -> Arc<ShardLinks> {
        self.parts.shards.current().expect("local addresses make clients")
    }

    /// Bodies of all tiles on all shards.
    pub fn bodies(&self) -> Bodies {
        self.shards.iter().flat_map(|shard| shard.bodies()).collect()
    }

    /// Open views on all shards.
    pub fn open_views(&self) -> usize {
        self.shards.iter().map(|shard| shard.views()).sum()
    }

    /// Computes the KV of `tokens` in one go and stores its full blocks, as a prefill worker would.
    pub async fn store(&self, salt: &[u8], tokens: &[u32]) {
        if tokens.is_empty() {
            return;
        }
        let (engine, identity, links) = (Arc::clone(&self.engine), self.identity(salt), self.links());
        let (owned, full) = (tokens.to_vec(), tokens.len() as u64 / u64::from(BLOCK_TOKENS));
        let computing = Arc::clone(&links);
        let computed = tokio::task::spawn_blocking(move || {
            let mut sequence = Sequence::new(&engine, identity, computing);
            step(&engine, &mut sequence, &owned, Logits::None);
            sequence
        });
        let sequence = computed.await.expect("the reference computes");
        for block in 0..full {
            let tiles = sequence.block_messages(block).expect("the block is full and local");
            let candidates = sequence.candidates(block).expect("there are shards");
            let shape = self.engine.wire_tile_shape();
            let ctx = CallContext::new("store");
            let stored = crate::store_copies(&ctx, &links, &candidates, identity, shape, tiles).await;
            stored.expect("the shards take the block");
        }
    }
}

/// One step of one sequence; returns its logits.
fn step(engine: &Engine, sequence: &mut Sequence, tokens: &[u32], logits: Logits) -> Option<Vec<f32>> {
    let ctx = CallContext::new("reference");
    let outputs = engine.step(&ctx, &mut [StepInput { sequence, tokens, logits }], &mut ());
    outputs.expect("the step runs").remove(0).expect("nothing remote fails").map(RowLogits::into_all)
}

/// Tiles of the full blocks of `tokens`, computed in one go without shards, by block and layer, and the logits of the
/// last token.
pub fn reference_tiles(
    engine: &Engine,
    identity: Identity,
    links: Arc<ShardLinks>,
    tokens: &[u32],
) -> (Bodies, Vec<f32>) {
    let mut sequence = Sequence::new(engine, identity, links);
    let logits = step(engine, &mut sequence, tokens, Logits::Last).expect("logits were asked for");
    let mut bodies = BTreeMap::new();
    for block in 0..sequence.full_blocks() {
        for tile in sequence.block_messages(block).expect("the block is full and local") {
            bodies.insert((tile.key, tile.layer as usize), tile.data.to_vec());
        }
    }
    (bodies, logits)
}

/// Serves a shard on a port of its own; returns its address.
fn serve_shard(servers: &mut JoinSet<Result<(), longshore_fabric::Error>>, shard: Arc<dyn Shard>) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    listener.set_nonblocking(true).expect("a fresh listener can be asked");
    let address = listener.local_addr().expect("a bound listener has an address");
    let listener = TcpListener::from_std(listener).expect("tests run on a runtime");
    servers.spawn(serve(
        listener,
        Services::new(ServerOptions::default()).shard(shard),
        CancellationToken::new(),
    ));
    format!("http://{address}")
}

fn view(addresses: Vec<String>) -> ClusterView {
    let members = addresses.into_iter().enumerate().map(|(index, address)| Member {
        id: format!("shard-{index}"),
        role: Role::KvStore,
        address,
        incarnation: 1,
        weight: 1,
        labels: longshore_cluster::Labels::default(),
    });
    ClusterView::new(members.collect()).expect("the members are valid")
}
