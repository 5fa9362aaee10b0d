//! Blocks that leave memory for disk: found, viewed, read and attended over where they lie, after a restart too.

use std::{
    fs::{File, TryLockError},
    path::Path,
};

use super::*;

/// Room for `memory` blocks in memory and `disk` blocks in `folder`; the scrubber is off.
pub(super) fn tiers(folder: &Path, memory: u64, disk: u64) -> Config {
    let path = folder.display().to_string();
    // Tiles of these tests are whole sectors.
    let capacity_bytes = disk * block_bytes();
    // A busy machine is no slow disk, for which blocks would be lost or refused.
    let (write_wait_ms, read_timeout_ms) = (60_000, 60_000);
    let disk = DiskConfig { path, capacity_bytes, write_wait_ms, read_timeout_ms, ..DiskConfig::default() };
    // These tests know which block makes way.
    Config { disk, eviction: "lru".to_owned(), scrub_bytes_per_s: 0, ..config(memory) }
}

pub(super) fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder can be made")
}

/// Waits until the folder of the shard `kv-0`, which was stopped, is nobody's. A thread that was at work when its call was given up
/// keeps the shard's store until it is done, and nobody who stops the shard waits for that.
pub(super) async fn released(config: &Config) {
    let lock = config.disk.folder(&ShardId("kv-0".to_owned())).join("lock");
    let is_locked =
        || File::open(&lock).is_ok_and(|lock| matches!(lock.try_lock(), Err(TryLockError::WouldBlock)));
    let free = async {
        while is_locked() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, free).await.expect("the threads of a stopped shard come to an end");
}

fn stored(name: u8) -> Option<Vec<TileMessage>> {
    Some(block(name))
}

/// Names 1 to `count`, and the blocks of a view of them.
pub(super) fn names(count: u8) -> (Vec<u8>, Vec<(u64, u8)>) {
    ((1..=count).collect(), (1..=count).map(|name| (u64::from(name) - 1, name)).collect())
}

#[tokio::test]
async fn blocks_spill_instead_of_vanishing_and_come_back_as_they_were() {
    let folder = folder();
    let shard = with_config(tiers(folder.path(), 2, 8));
    let (names, _) = names(7);
    shard.store(&names).await;
    assert_eq!(shard.lookup("", &names).await, [true; 7]);
    assert_eq!(shard.lookup("other", &names).await, [false; 7]);
    assert_eq!(shard.get(&names).await, names.iter().map(|name| stored(*name)).collect::<Vec<_>>());
    let stats = shard.stats().await;
    assert_eq!((stats.blocks, stats.evicted_total), (7, 0));
    assert!(stats.used_bytes <= 2 * block_bytes());
    let disk = shard.disk().await;
    assert_eq!(disk.capacity_bytes, 8 * block_bytes());
    assert!(disk.spilled_total >= 5 && disk.io_errors_total == 0, "{disk:?}");
}

#[tokio::test]
async fn a_full_disk_evicts_there() {
    let folder = folder();
    let shard = with_config(tiers(folder.path(), 2, 3));
    let (names, _) = names(9);
    shard.store(&names).await;
    assert_eq!(shard.lookup("", &names).await, [[false; 4].as_slice(), &[true; 5]].concat());
    let stats = shard.stats().await;
    assert_eq!((stats.evicted_total, shard.disk().await.evicted_total), (4, 4));
}

/// Answers of one query per layer over blocks 1 to 9, by a shard whose memory holds `memory` blocks.
async fn answers(memory: u64, disk: u64, rows: usize) -> Vec<Vec<AttendPartial>> {
    let folder = folder();
    let shard = with_config(tiers(folder.path(), memory, disk));
    let (names, blocks) = names(9);
    shard.store(&names).await;
    let view = shard.view(&blocks).await;
    let mut all = Vec::new();
    for layer in 0..LAYERS {
        let asked = query(1, layer, vec![AttendItem { view_id: view, ..item(0, 144, rows) }]);
        let streamed = partials_of(&shard.attend(vec![asked.clone()]).await, 1).0;
        let here = shard.shard.attend_here(&asked).expect("it is here").expect("the query is sound");
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        for (here, streamed) in here.iter().zip(&streamed) {
            assert_eq!(bits(here.partial.to_interleaved()), bits(streamed.partial.to_f32().unwrap()));
        }
        all.push(streamed);
    }
    let below = shard.disk().await;
    assert!(below.blocks > 0 || memory >= 9, "{below:?}");
    all
}

#[tokio::test]
async fn attention_next_to_a_disk_gives_the_bits_of_memory() {
    for rows in [1, 6] {
        let in_memory = answers(9, 1, rows).await;
        for memory in [1, 4, 8] {
            assert_eq!(answers(memory, 9, rows).await, in_memory, "{memory} of 9 blocks in memory");
        }
    }
}

#[tokio::test]
async fn a_restart_finds_the_disk_tier_again() {
    let folder = folder();
    let (names, blocks) = names(6);
    let config = || tiers(folder.path(), 2, 8);
    let before = with_config(config());
    before.store(&names).await;
    // What is in memory stays there, so that nothing else is written.
    before.view(&blocks[4..]).await;
    let view = before.view(&blocks[..4]).await;
    let wanted = partials_of(&before.attend(vec![query(1, 1, vec![item(view, 64, 2)])]).await, 1).0;
    let asked = item(view, 64, 2);
    before.tasks.drain(PATIENCE).await;
    drop(before);
    released(&config()).await;

    let after = with_config(config());
    assert_eq!(after.disk().await.restored_total, 4);
    assert_eq!(after.lookup("", &names).await, [true, true, true, true, false, false]);
    assert_eq!(after.lookup("other", &names).await, [false; 6]);
    let view = after.view(&blocks[..4]).await;
    let asked = AttendItem { view_id: view, ..asked };
    assert_eq!(partials_of(&after.attend(vec![query(1, 1, vec![asked])]).await, 1).0, wanted);
    assert_eq!(after.get(&[1, 6]).await, [stored(1), None]);
    // What it found makes way like any other block.
    after.store(&[11, 12, 13, 14, 15, 16]).await;
    assert_eq!(after.stats().await.corrupt_total, 0);
}

#[tokio::test]
async fn blocks_of_a_view_come_back_into_memory_when_there_is_room() {
    let folder = folder();
    let shard = with_config(tiers(folder.path(), 2, 8));
    shard.store(&[1, 2, 3, 4]).await;
    // 3 and 4 are in memory and nobody needs them.
    shard.view(&[(0, 1), (1, 2)]).await;
    shard.settled("promoted", |stats| stats.tiers[1].promoted_total == 2).await;
    let disk = shard.disk().await;
    assert_eq!((disk.copies, disk.blocks, disk.rising_blocks), (2, 2, 0));
    assert_eq!(shard.get(&[1, 2, 3, 4]).await, [1, 2, 3, 4].map(stored));
    // A larger view stays where it is: memory has room for half of it.
    shard.view(&[(0, 1), (1, 2), (2, 3), (3, 4)]).await;
    assert_eq!(shard.disk().await.blocks, 2);
}

#[tokio::test]
async fn a_folder_belongs_to_one_shard_and_one_deployment() {
    let folder = folder();
    let shard = with_config(tiers(folder.path(), 1, 4));
    shard.store(&[1, 2]).await;
    let build = |config: Config, deployment| {
        let (_, epoch) = watch::channel(EPOCH);
        let identity = ShardIdentity {
            shard_id: ShardId("kv-0".to_owned()),
            deployment,
            epoch,
            geometry: geometry(),
            tile_shape: shape(),
            layers: LAYERS,
        };
        KvStore::new(config, identity, &ComputePool::serial(), &Tasks::new(), &Metrics::new())
            .err()
            .map(|error| error.to_string())
    };
    let config = || tiers(folder.path(), 1, 4);
    let error = build(config(), deployment()).expect("the folder is in use");
    assert!(error.contains("`kvstore.disk.path`") && error.contains("in use by another process"), "{error}");
    shard.tasks.drain(PATIENCE).await;
    drop(shard);
    released(&config()).await;
    let error = build(config(), Deployment::from_bytes([9; 32])).expect("the blocks are others'");
    assert!(error.contains("another deployment") && error.contains("hint:"), "{error}");
    let small = Config { disk: DiskConfig { capacity_bytes: 100, ..config().disk }, ..config() };
    let error = build(small, deployment()).expect("no block fits");
    let needs = format!("`kvstore.disk.capacity_bytes` is 100, one block needs {}", block_bytes());
    assert!(error.contains(&needs), "{error}");
    let nowhere = DiskConfig { path: "/proc/version/folder".to_owned(), ..config().disk };
    let error = build(Config { disk: nowhere, ..config() }, deployment()).expect("no folder can be there");
    assert!(error.contains("cannot create") && error.contains("hint: choose a folder"), "{error}");
    assert_eq!(build(config(), deployment()), None, "it is as it was");
}

#[tokio::test]
async fn the_scrape_and_the_statistics_tell_the_tiers() {
    let folder = folder();
    let shard = with_config(tiers(folder.path(), 2, 8));
    shard.store(&[1, 2, 3]).await;
    shard.lookup("", &[1, 3]).await;
    let stats = shard.stats().await;
    let names: Vec<_> =
        stats.tiers.iter().map(|tier| (tier.name.as_str(), tier.blocks, tier.hits_total)).collect();
    assert_eq!(names, [("dram", 2, 1), ("disk", 1, 1)]);
    let scraped = shard.metrics.encode();
    for line in [
        "longshore_kvstore_disk_blocks 1".to_owned(),
        format!("longshore_kvstore_disk_used_bytes {}", block_bytes()),
        "longshore_kvstore_spilled_blocks_total 1".to_owned(),
        "longshore_kvstore_disk_lookup_hits_total 1".to_owned(),
    ] {
        assert!(scraped.lines().any(|have| have == line), "{line} is not in\n{scraped}");
    }
}

#[tokio::test]
async fn a_reader_that_stops_reading_blocks_on_disk_holds_up_nobody_else() {
    let folder = folder();
    // One turn at the disk.
    let few = Config { attend_concurrency: 4, attend_message_bytes: 1 << 10, ..tiers(folder.path(), 2, 16) };
    let shard = with_config(few);
    let (names, blocks) = names(12);
    shard.store(&names).await;
    let view = shard.view(&blocks).await;
    lifecycle::others_go_on_beside_an_unread_stream(&shard, view).await;
    assert!(shard.disk().await.blocks > 0);
}

#[tokio::test]
async fn streams_that_nobody_reads_keep_neither_turns_nor_all_reading_ahead() {
    let folder = folder();
    let shard = with_config(Config { tenant_percent: 100, ..tiers(folder.path(), 2, 16) });
    let (names, _) = names(12);
    shard.store(&names).await;
    let mut unread = Vec::new();
    for _ in 0..32 {
        let keys = names.iter().map(|name| key(*name)).collect();
        let get = GetBlocks::whole(identity(""), keys);
        unread.push(shard.shard.get_blocks(&shard.ctx, get).await.unwrap());
    }
    shard.settled("half of the places", |_| shard.shard.streams_reading_ahead() == 12).await;
    assert_eq!(shard.get(&names).await, names.iter().map(|name| stored(*name)).collect::<Vec<_>>());
    drop(unread);
    shard.settled("they ended", |_| shard.shard.streams_reading_ahead() == 0).await;
}
