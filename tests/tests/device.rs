//! A shard on a device, which the emulator is here: it answers attention out of copies of its tiles, as a shard on the CPU does.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test's functions may fail and report like its body"
)]

#[path = "../../kernels/cuda/tests/emulator/compiler.rs"]
mod compiler;
#[path = "../../kernels/cuda/tests/emulator/device.rs"]
mod device;

use std::sync::Arc;

use futures::StreamExt as _;
use longshore_attention::{CpuExecutor, KvDtype, Tile, TileShape};
use longshore_blocks::{BlockKey, Deployment, EXACT_PREFILL, Geometry, ShardId, crc32c};
use longshore_chassis::{Metrics, Tasks};
use longshore_compute::ComputePool;
use longshore_cuda::{CudaExecutor, Shortage};
use longshore_engine::wire_tile_shape;
use longshore_fabric::{CallContext, Shard as _, StripePartial};
use longshore_kvstore::{Config, DiskConfig, KvStore, ShardCompute, ShardIdentity};
use longshore_proto::types::{
    AttendItem, AttendQuery, Identity, OpenView, OpenedView, SparseVisits, Tensor, TileMessage,
};
use tokio::sync::{mpsc, watch};

const LAYERS: u32 = 2;
const GROUP: usize = 3;
const BLOCKS: u8 = 7;
const SHAPE: TileShape = TileShape { block_tokens: 16, kv_heads: 2, head_dim: 64, dtype: KvDtype::F16 };

fn identity() -> Identity {
    let deployment = Deployment::from_bytes([3; 32]);
    let namespace = deployment.namespace(EXACT_PREFILL, b"");
    Identity { deployment, namespace, shard_map_epoch: 1 }
}

/// Numbers in [-1, 1) that f16 holds, the same for the same seed.
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 54) as f32 / 512.0 - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}

fn message(block: u8, layer: u32) -> TileMessage {
    let (mut tile, seed) = (Tile::zeroed(SHAPE), u64::from(block) * 100 + u64::from(layer));
    let values = SHAPE.block_tokens * SHAPE.kv_heads * SHAPE.head_dim;
    tile.write(0, &noise(seed, values), &noise(seed + 50, values)).expect("the block is full");
    let data = tile.as_bytes().to_vec();
    TileMessage { key: BlockKey([block; 16]), layer, crc32c: crc32c(&data), data: data.into(), place: None }
}

/// A shard with all blocks, and a view of them.
async fn shard(compute: ShardCompute, tasks: &Tasks) -> (Arc<KvStore>, u64) {
    shard_with(Config::default(), compute, tasks).await
}

async fn shard_with(config: Config, compute: ShardCompute, tasks: &Tasks) -> (Arc<KvStore>, u64) {
    let (_, epoch) = watch::channel(1);
    let identity_of = ShardIdentity {
        shard_id: ShardId("kv-0".to_owned()),
        deployment: identity().deployment,
        epoch,
        geometry: Geometry::new(SHAPE.block_tokens as u32, 2).unwrap(),
        tile_shape: SHAPE,
        layers: LAYERS,
    };
    let shard = KvStore::new(config, identity_of, compute, tasks, &Metrics::new()).unwrap();
    let (ctx, (sender, tiles)) = (CallContext::new("test"), mpsc::channel(64));
    for (block, layer) in (0..BLOCKS).flat_map(|block| (0..LAYERS).map(move |layer| (block, layer))) {
        sender.try_send(message(block, layer)).expect("all of them have room");
    }
    drop(sender);
    let acks = shard.put_blocks(&ctx, identity(), wire_tile_shape(SHAPE, LAYERS as usize), tiles).await;
    assert_eq!(acks.unwrap().collect::<Vec<_>>().await.len(), usize::from(BLOCKS));
    let blocks = (0..BLOCKS).map(|block| (u64::from(block), BlockKey([block; 16]))).collect();
    let open = OpenView { identity: identity(), blocks, append_to: None, lease_ms: 60_000 };
    match shard.open_view(&ctx, open).await.unwrap() {
        OpenedView::Open { view_id } => (shard, view_id),
        other => panic!("{other:?}"),
    }
}

/// A decode step, a chunk of a prefill, and one KV head of a sparse one.
fn query(view_id: u64) -> AttendQuery {
    let rows = |seed: u64, rows: usize, heads: usize| {
        let values = noise(seed, rows * heads * SHAPE.head_dim);
        Tensor::from_f32(&[rows as u64, heads as u64, SHAPE.head_dim as u64], &values)
    };
    let heads = SHAPE.kv_heads * GROUP;
    let end = u64::from(BLOCKS) * SHAPE.block_tokens as u64;
    let item = |first_position, queries, sparse| AttendItem {
        view_id,
        first_position,
        queries,
        scale: 0.125,
        sparse,
    };
    let visits = SparseVisits { kv_head: 1, runs: vec![0..2, 5..6], skip_below: None };
    let items = vec![
        item(end, rows(1, 1, heads), None),
        item(end - 40, rows(2, 40, heads), None),
        item(end, rows(3, 33, GROUP), Some(visits)),
    ];
    AttendQuery { query_id: 1, identity: identity(), layer: 1, items }
}

/// Relative L2 distance of the divided outputs of one partial.
fn distance(found: &StripePartial, wanted: &StripePartial) -> f64 {
    assert_eq!((found.item, found.stripe), (wanted.item, wanted.stripe));
    let (found, wanted) = (found.partial.clone().finish(), wanted.partial.clone().finish());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let apart = norm(&mut found.iter().zip(&wanted).map(|(f, w)| f64::from(f - w)));
    apart / norm(&mut wanted.iter().map(|w| f64::from(*w))).max(f64::MIN_POSITIVE)
}

#[tokio::test]
async fn a_shard_on_a_device_answers_like_one_on_the_cpu() {
    let (tasks, pool) = (Tasks::new(), ComputePool::serial());
    let executor = Arc::new(CudaExecutor::new(device::Emulator::device(), CpuExecutor::serial(), 8 << 20));
    let on_device = ShardCompute { pool: Arc::clone(&pool), executor: executor.clone() };
    let (device, device_view) = shard(on_device, &tasks).await;
    let (cpu, cpu_view) = shard((&pool).into(), &tasks).await;
    let wanted = cpu.attend_here(&query(cpu_view)).unwrap().unwrap();
    let ask = || device.attend_here(&query(device_view)).unwrap().unwrap();
    let (found, again) = (ask(), ask());
    // Four stripes of each dense item, two of the sparse one.
    assert_eq!((found.len(), wanted.len()), (10, 10));
    for ((found, again), wanted) in found.iter().zip(&again).zip(&wanted) {
        let apart = distance(found, wanted);
        println!("item {}, stripe {}: {apart:.2e}", found.item, found.stripe);
        assert!(apart <= 2e-3, "item {}, stripe {}: {apart:e}", found.item, found.stripe);
        assert_eq!(found.partial, again.partial, "out of the same copies");
    }
    let stats = executor.stats().pages;
    assert_eq!(
        (stats.pages, stats.misses),
        (usize::from(BLOCKS), u64::from(BLOCKS)),
        "one copy of each tile"
    );
    assert!(stats.hits > 0 && stats.evictions == 0, "{stats:?}");
}

/// A device that is full ends nothing: the shard's answers are those of the CPU, bit by bit.
#[tokio::test]
async fn a_shard_on_a_full_device_answers_like_one_on_the_cpu() {
    let (tasks, pool) = (Tasks::new(), ComputePool::serial());
    let executor = Arc::new(CudaExecutor::new(device::Emulator::device(), CpuExecutor::serial(), 1 << 10));
    let on_device = ShardCompute { pool: Arc::clone(&pool), executor: executor.clone() };
    let (device, device_view) = shard(on_device, &tasks).await;
    let (cpu, cpu_view) = shard((&pool).into(), &tasks).await;
    let wanted = cpu.attend_here(&query(cpu_view)).unwrap().unwrap();
    let found = device.attend_here(&query(device_view)).unwrap().unwrap();
    assert_eq!(found.len(), wanted.len());
    for (found, wanted) in found.iter().zip(&wanted) {
        assert_eq!((found.item, found.stripe), (wanted.item, wanted.stripe));
        assert_eq!(found.partial, wanted.partial);
    }
    assert!(executor.stats().fallbacks.of(Shortage::Pages) > 0);
}

/// Copies of tiles that are read from disk are found again.
#[tokio::test]
async fn a_shard_on_a_device_copies_tiles_of_the_disk_once() {
    let (tasks, pool, folder) = (Tasks::new(), ComputePool::serial(), tempfile::tempdir().unwrap());
    let executor = Arc::new(CudaExecutor::new(device::Emulator::device(), CpuExecutor::serial(), 8 << 20));
    let on_device = ShardCompute { pool: Arc::clone(&pool), executor: executor.clone() };
    let block_bytes = SHAPE.bytes() as u64 * u64::from(LAYERS);
    let path = folder.path().display().to_string();
    let disk = DiskConfig { path, capacity_bytes: 20 * block_bytes, ..DiskConfig::default() };
    let config = Config { capacity_bytes: 2 * block_bytes, disk, tenant_percent: 100, ..Config::default() };
    let (device, device_view) = shard_with(config, on_device, &tasks).await;
    let (cpu, cpu_view) = shard((&pool).into(), &tasks).await;
    let wanted = cpu.attend_here(&query(cpu_view)).unwrap().unwrap();
    for _ in 0..3 {
        let found = device.attend_here(&query(device_view)).unwrap().unwrap();
        assert!(found.iter().zip(&wanted).all(|(found, wanted)| distance(found, wanted) <= 2e-3));
    }
    // Two blocks were in memory at first: what is written out and read again is another tile, once.
    let stats = executor.stats().pages;
    assert!((u64::from(BLOCKS)..=u64::from(BLOCKS) + 2).contains(&stats.misses), "{stats:?}");
    assert!(stats.hits > 3 * u64::from(BLOCKS), "{stats:?}");
}
