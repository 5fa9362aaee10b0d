//! A shard through its trait, as both lanes see it: shared fixtures here, stories in the modules.

mod attend;
mod compute;
pub(crate) mod corruption;
mod disk;
mod disk_damage;
mod disk_faults;
mod greedy;
mod heads;
mod hostile;
mod inventory;
mod leaving;
mod lifecycle;
mod measure;
mod memory;
mod operators;
mod put;
mod repair;
mod save;
mod sparse;
mod summaries;
mod tenants;
mod views;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::StreamExt as _;
use longshore_attention::{KvDtype, LAYOUT_CPU_PANELS, Tile, TileShape};
use longshore_blocks::{BlockKey, Deployment, EXACT_PREFILL, Geometry, Namespace, ShardId, crc32c};
use longshore_chassis::{Metrics, Tasks};
use longshore_compute::ComputePool;
use longshore_fabric::{BoxStream, CallContext, Error as CallError, Shard};
use longshore_proto::types::{
    AttendAnswer, AttendItem, AttendPartial, AttendQuery, Dtype, GetBlocks, Identity, Lookup, OpenView,
    OpenedView, PutAck, PutOutcome, ShardStats, Tensor, TierStats, TileMessage, WireTileShape,
};
use tokio::sync::{mpsc, watch};

use crate::{
    Config, DiskConfig, KvStore, ShardCompute, ShardIdentity,
    tier::{DiskSeam, DiskTier, Reads, Tier},
};

const LAYERS: u32 = 3;
const EPOCH: u64 = 5;
const BLOCK_TOKENS: usize = 16;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 8;
/// Query heads.
const HEADS: usize = 4;
/// No call of these tests takes as long; a stream that hangs fails its test.
const PATIENCE: Duration = Duration::from_secs(30);

fn shape() -> TileShape {
    TileShape { block_tokens: BLOCK_TOKENS, kv_heads: KV_HEADS, head_dim: HEAD_DIM, dtype: KvDtype::F16 }
}

fn wire_shape() -> WireTileShape {
    WireTileShape {
        block_tokens: BLOCK_TOKENS as u32,
        kv_heads: KV_HEADS as u32,
        head_dim: HEAD_DIM as u32,
        dtype: Dtype::F16,
        layout: LAYOUT_CPU_PANELS,
        layers: LAYERS,
    }
}

fn geometry() -> Geometry {
    Geometry::new(BLOCK_TOKENS as u32, 2).expect("the sizes are valid")
}

fn block_bytes() -> u64 {
    shape().bytes() as u64 * u64::from(LAYERS)
}

fn deployment() -> Deployment {
    Deployment::from_bytes([3; 32])
}

fn tenant(salt: &str) -> Namespace {
    deployment().namespace(EXACT_PREFILL, salt.as_bytes())
}

fn identity(salt: &str) -> Identity {
    Identity { deployment: deployment(), namespace: tenant(salt), shard_map_epoch: EPOCH }
}

fn key(name: u8) -> BlockKey {
    BlockKey([name; 16])
}

/// Pseudo-random f32 in [-1, 1), the same for the same seed.
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// Tile of a block in a layer.
fn tile(name: u8, layer: u32) -> Tile {
    let mut tile = Tile::zeroed(shape());
    let values = BLOCK_TOKENS * KV_HEADS * HEAD_DIM;
    let seed = u64::from(name) * 1000 + u64::from(layer);
    tile.write(0, &noise(seed, values), &noise(seed + 500, values)).expect("the block is full");
    tile
}

fn message(name: u8, layer: u32) -> TileMessage {
    let data = Bytes::copy_from_slice(tile(name, layer).as_bytes());
    TileMessage { key: key(name), layer, crc32c: crc32c(&data), data: data.into(), place: None }
}

fn block(name: u8) -> Vec<TileMessage> {
    (0..LAYERS).map(|layer| message(name, layer)).collect()
}

/// A shard with what keeps it going.
struct Fixture {
    shard: Arc<KvStore>,
    tasks: Tasks,
    metrics: Metrics,
    epoch: watch::Sender<u64>,
    ctx: CallContext,
}

/// Room for `blocks` blocks and no retention, so that evictions need no waiting; the first tenant may take all of it.
fn config(blocks: u64) -> Config {
    Config {
        capacity_bytes: blocks * block_bytes(),
        retention_ms: 0,
        tenant_percent: 100,
        ..Config::default()
    }
}

fn shard(blocks: u64) -> Fixture {
    with_config(config(blocks))
}

fn with_config(config: Config) -> Fixture {
    with_tier(config, |tier| tier)
}

/// A shard with something around its disk tier.
fn with_tier(config: Config, around: impl FnOnce(Arc<dyn Tier>) -> Arc<dyn Tier> + 'static) -> Fixture {
    named("kv-0", config, around)
}

/// The same with a name of its own.
fn named(id: &str, config: Config, around: impl FnOnce(Arc<dyn Tier>) -> Arc<dyn Tier> + 'static) -> Fixture {
    with_compute(id, config, (&ComputePool::serial()).into(), around)
}

/// The same with what it computes with.
fn with_compute(
    id: &str,
    config: Config,
    compute: ShardCompute,
    around: impl FnOnce(Arc<dyn Tier>) -> Arc<dyn Tier> + 'static,
) -> Fixture {
    let (epoch, epochs) = watch::channel(EPOCH);
    let identity = ShardIdentity {
        shard_id: ShardId(id.to_owned()),
        deployment: deployment(),
        epoch: epochs,
        geometry: geometry(),
        tile_shape: shape(),
        layers: LAYERS,
    };
    let (tasks, metrics) = (Tasks::new(), Metrics::new());
    let around = |tier: DiskTier| around(Arc::new(tier));
    let seam = DiskSeam { around: Box::new(around), reads: Reads::OnThreads };
    let shard = KvStore::with_seam(config, identity, compute, &tasks, &metrics, seam)
        .expect("the configuration is valid");
    Fixture { shard, tasks, metrics, epoch, ctx: CallContext::new("test") }
}

impl Fixture {
    /// Sends tiles in one stream and closes it.
    async fn put(&self, salt: &str, tiles: Vec<TileMessage>) -> Vec<PutAck> {
        let (sender, receiver) = mpsc::channel(4);
        let answer = self.shard.put_blocks(&self.ctx, identity(salt), wire_shape(), receiver).await;
        let answer = answer.expect("the stream is accepted");
        let feed = async move {
            for tile in tiles {
                sender.send(tile).await.expect("the shard reads to the end");
            }
        };
        let ((), acks) = tokio::join!(feed, collect(answer));
        acks.into_iter().map(|ack| ack.expect("the stream goes on")).collect()
    }

    /// Stores blocks and expects success.
    async fn store(&self, names: &[u8]) {
        let acks = self.put("", names.iter().flat_map(|name| block(*name)).collect()).await;
        assert_eq!(outcomes(&acks), names.iter().map(|name| (*name, PutOutcome::Stored)).collect::<Vec<_>>());
    }

    async fn lookup(&self, salt: &str, names: &[u8]) -> Vec<bool> {
        let keys = names.iter().map(|name| key(*name)).collect();
        let found =
            self.shard.lookup(&self.ctx, Lookup { identity: identity(salt), keys, peek: false }).await;
        found.expect("the lookup is valid")
    }

    async fn open(
        &self,
        salt: &str,
        blocks: &[(u64, u8)],
        append_to: Option<u64>,
    ) -> Result<OpenedView, CallError> {
        let blocks = blocks.iter().map(|(index, name)| (*index, key(*name))).collect();
        let open = OpenView { identity: identity(salt), blocks, append_to, lease_ms: 60_000 };
        self.shard.open_view(&self.ctx, open).await
    }

    /// Opens a view of held blocks.
    async fn view(&self, blocks: &[(u64, u8)]) -> u64 {
        match self.open("", blocks, None).await {
            Ok(OpenedView::Open { view_id }) => view_id,
            other => panic!("view of {blocks:?}: {other:?}"),
        }
    }

    /// Sends queries in one stream, closes it, and reads all answers.
    async fn attend(&self, queries: Vec<AttendQuery>) -> Vec<AttendAnswer> {
        let (sender, receiver) = mpsc::channel(4);
        let answer = self.shard.attend(&self.ctx, receiver).await.expect("streams are accepted");
        let feed = async move {
            for query in queries {
                sender.send(query).await.expect("the shard reads to the end");
            }
        };
        let ((), answers) = tokio::join!(feed, collect(answer));
        answers.into_iter().map(|answer| answer.expect("the stream goes on")).collect()
    }

    /// Sends one query and expects its failure.
    async fn refused(&self, query: AttendQuery) -> (u32, String) {
        match self.attend(vec![query]).await.as_slice() {
            [AttendAnswer::Failed { code, message, .. }] => (*code, message.clone()),
            other => panic!("the query was not refused: {other:?}"),
        }
    }

    /// Reads all layers of blocks; none for those that are missing.
    async fn get(&self, names: &[u8]) -> Vec<Option<Vec<TileMessage>>> {
        let keys = names.iter().map(|name| key(*name)).collect();
        let get = GetBlocks::whole(identity(""), keys);
        let tiles = self.shard.get_blocks(&self.ctx, get).await.expect("the request is valid");
        let mut tiles = collect(tiles).await.into_iter().map(|tile| tile.expect("the stream goes on"));
        let mut blocks = Vec::new();
        while let Some(first) = tiles.next() {
            blocks.push(first.map(|first| {
                let rest = (1..LAYERS).map(|_| tiles.next().flatten().expect("a block has all layers"));
                std::iter::once(first).chain(rest).collect()
            }));
        }
        blocks
    }

    async fn disk(&self) -> TierStats {
        self.stats().await.tiers.into_iter().find(|tier| tier.name == "disk").expect("there is a disk tier")
    }

    async fn stats(&self) -> ShardStats {
        self.shard.stats(&self.ctx).await.expect("a shard tells its state")
    }

    /// Waits until the shard's state is as wanted.
    async fn settled(&self, what: &str, wanted: impl Fn(&ShardStats) -> bool) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !wanted(&self.stats().await) {
            assert!(tokio::time::Instant::now() < deadline, "{what}: {:?}", self.stats().await);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

async fn collect<T>(stream: BoxStream<T>) -> Vec<Result<T, CallError>> {
    tokio::time::timeout(PATIENCE, stream.collect()).await.expect("the stream ends")
}

fn outcomes(acks: &[PutAck]) -> Vec<(u8, PutOutcome)> {
    acks.iter().map(|ack| (ack.key.0[0], ack.outcome)).collect()
}

/// Rows of one sequence from `first_position` on.
fn item(view_id: u64, first_position: u64, rows: usize) -> AttendItem {
    let values = noise(view_id ^ first_position, rows * HEADS * HEAD_DIM);
    let queries = Tensor::from_f32(&[rows as u64, HEADS as u64, HEAD_DIM as u64], &values);
    AttendItem { view_id, first_position, queries, scale: 0.35, sparse: None }
}

fn query(query_id: u64, layer: u32, items: Vec<AttendItem>) -> AttendQuery {
    AttendQuery { query_id, identity: identity(""), layer, items }
}

/// The partials of one query, and how many messages brought them.
fn partials_of(answers: &[AttendAnswer], wanted: u64) -> (Vec<AttendPartial>, usize) {
    let (mut all, mut messages, mut ended) = (Vec::new(), 0, false);
    for answer in answers {
        match answer {
            AttendAnswer::Partials { query_id, partials, last } if *query_id == wanted => {
                assert!(!ended, "a message after the last one");
                all.extend(partials.iter().cloned());
                messages += 1;
                ended = *last;
            }
            AttendAnswer::Failed { query_id, message, .. } if *query_id == wanted => panic!("{message}"),
            _ => {}
        }
    }
    assert!(ended, "query {wanted} has no last message");
    (all, messages)
}
