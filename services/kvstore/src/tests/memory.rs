//! Memory: what a shard takes is its budget, and it gives back what it no longer needs.

use longshore_proto::types::GetSummaries;

use super::{
    disk::{folder, tiers},
    *,
};

const BUDGET: u64 = 48 << 20;
const MIB: u64 = 1 << 20;

/// A model of larger tiles: 48 KiB, 16 layers, 0.75 MiB a block.
pub(super) const LARGE: TileShape =
    TileShape { block_tokens: 64, kv_heads: 3, head_dim: 64, dtype: KvDtype::F16 };
const LARGE_LAYERS: u32 = 16;

/// Resident memory of this process. Every test is a process of its own under nextest.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux tells it");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("it is there");
    line.split_whitespace().nth(1).expect("a number").parse::<u64>().expect("a number") << 10
}

pub(super) fn large_shard(
    config: Config,
    layers: u32,
    stripe_blocks: u32,
    pool: &Arc<ComputePool>,
) -> (Arc<KvStore>, Tasks) {
    let (_, epoch) = watch::channel(EPOCH);
    let identity = ShardIdentity {
        shard_id: ShardId("kv-0".to_owned()),
        deployment: deployment(),
        epoch,
        geometry: Geometry::new(64, stripe_blocks).unwrap(),
        tile_shape: LARGE,
        layers,
    };
    let tasks = Tasks::new();
    let shard = KvStore::new(config, identity, pool, &tasks, &Metrics::new());
    (shard.expect("the configuration is valid"), tasks)
}

async fn churn(shard: &KvStore, blocks: u16, body: &Bytes) -> u64 {
    let shape =
        WireTileShape { layers: LARGE_LAYERS, block_tokens: 64, kv_heads: 3, head_dim: 64, ..wire_shape() };
    let ctx = CallContext::new("churn");
    let (sender, receiver) = mpsc::channel(4);
    let acks = shard.put_blocks(&ctx, identity(""), shape, receiver).await.expect("the stream is accepted");
    let (crc, mut most) = (crc32c(body), 0);
    let feed = async {
        for name in 0..blocks {
            let mut key = [0; 16];
            key[..2].copy_from_slice(&name.to_le_bytes());
            for layer in 0..LARGE_LAYERS {
                let tile = TileMessage {
                    key: BlockKey(key),
                    layer,
                    crc32c: crc,
                    data: body.clone().into(),
                    place: None,
                };
                sender.send(tile).await.expect("the shard reads to the end");
            }
            most = most.max(resident());
        }
        drop(sender);
    };
    let ((), acks) = tokio::join!(feed, collect(acks));
    assert!(
        acks.iter().flatten().all(|ack| matches!(ack.outcome, PutOutcome::Stored | PutOutcome::Duplicate))
    );
    most
}

#[tokio::test]
async fn churn_stays_within_the_budget_and_memory_goes_back() {
    let folder = folder();
    let config = Config { capacity_bytes: BUDGET, ..tiers(folder.path(), 1, 1) };
    let disk = DiskConfig { capacity_bytes: 2 * BUDGET, ..config.disk };
    let (shard, tasks) = large_shard(Config { disk, ..config }, LARGE_LAYERS, 2, &ComputePool::serial());
    let body = Bytes::from(vec![0; LARGE.bytes()]);
    churn(&shard, 8, &body).await;
    // Threads and their arenas exist now, six MiB of tiles do as well.
    let idle = resident() - 6 * MIB;
    // More than twice what memory and disk hold together.
    let most = churn(&shard, 480, &body).await;
    // A busy machine has more threads at work, each of which keeps some of what it freed.
    let limit = idle + BUDGET + BUDGET / 10 + 10 * MIB;
    assert!(most <= limit, "{} MiB resident, {} idle, budget {}", most / MIB, idle / MIB, BUDGET / MIB);
    tasks.drain(PATIENCE).await;
    drop(shard);
    let left = resident();
    assert!(left <= idle + 10 * MIB, "{} MiB stay resident, {} idle", left / MIB, idle / MIB);
}

fn wide_name(at: u16) -> BlockKey {
    let mut key = [0; 16];
    key[..2].copy_from_slice(&at.to_le_bytes());
    BlockKey(key)
}

/// Summaries stay in memory when their blocks go to disk, of which there is twelve times as much here.
#[tokio::test]
async fn summaries_of_blocks_on_disk_stay_within_the_budget() {
    const BUDGET: u64 = 16 * MIB;
    const BLOCKS: u16 = 240;
    let folder = folder();
    let config =
        Config { capacity_bytes: BUDGET, attend_message_bytes: 1 << 16, ..tiers(folder.path(), 1, 1) };
    let disk = DiskConfig { capacity_bytes: 12 * BUDGET, ..config.disk };
    let (shard, tasks) = large_shard(Config { disk, ..config }, LARGE_LAYERS, 2, &ComputePool::serial());
    let body = Bytes::from(vec![0; LARGE.bytes()]);
    churn(&shard, 8, &body).await;
    let idle = resident() - 6 * MIB;
    churn(&shard, BLOCKS, &body).await;
    let ctx = CallContext::new("test");
    let blocks = (0..BLOCKS).map(|at| (u64::from(at), wide_name(at))).collect();
    let open = OpenView { identity: identity(""), blocks, append_to: None, lease_ms: 600_000 };
    let opened = shard.open_view(&ctx, open).await.expect("the view is valid");
    let OpenedView::Open { view_id } = opened else { panic!("memory and disk hold all of them: {opened:?}") };
    let (identity, first_layer, layers) = (identity(""), 0, None);
    let (values, spreads, cosines) = (true, true, true);
    let get = GetSummaries { identity, view_id, first_layer, layers, values, spreads, cosines };
    let mut summaries = shard.get_summaries(&ctx, get).await.expect("the request is sound");
    let (mut most, mut bytes) = (0, 0);
    while let Some(message) = summaries.next().await {
        bytes += message.expect("the stream goes on").keys.data.len();
        most = most.max(resident());
    }
    assert_eq!(bytes, usize::from(BLOCKS) * LARGE_LAYERS as usize * 3 * 64 * 4, "all of them came");
    let stats = shard.stats(&ctx).await.expect("a shard tells its state");
    assert!((1..=BUDGET / 4).contains(&stats.summary_bytes), "{stats:?}");
    assert!(stats.used_bytes <= BUDGET, "{stats:?}");
    // Threads that read the disk keep what they freed, each a block or two; on a busy machine there are more of them.
    let limit = idle + BUDGET + BUDGET / 10 + 10 * MIB;
    assert!(most <= limit, "{} MiB resident, {} idle, budget {}", most / MIB, idle / MIB, BUDGET / MIB);
    tasks.drain(PATIENCE).await;
}
