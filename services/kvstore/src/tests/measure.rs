//! Figures of the disk tier beside plain files of the same sizes, in one run. Not a check: it runs only when asked for
//! (`--run-ignored only measure_`), prints, and empties the page cache where it may.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path, time::Instant};

use super::{
    memory::{LARGE, large_shard},
    *,
};

/// Layers of the model whose blocks are measured: 30 tiles of 48 KiB.
const LAYERS: u32 = 30;
const BLOCKS: u16 = 600;
/// Blocks of the view that is attended over: 16 stripes.
const VIEW: u16 = 512;
const BLOCK_BYTES: usize = LAYERS as usize * 48 * 1024;
const GB: f64 = 1e9;

fn name(at: u16) -> BlockKey {
    let mut key = [0; 16];
    key[..2].copy_from_slice(&at.to_le_bytes());
    BlockKey(key)
}

/// Writes dirty pages and forgets clean ones; false where only reads from the page cache can be measured.
fn empty_page_cache() -> bool {
    let _synced = std::process::Command::new("sync").status();
    std::fs::write("/proc/sys/vm/drop_caches", "1").is_ok()
}

fn rate(bytes: usize, started: Instant) -> f64 {
    bytes as f64 / started.elapsed().as_secs_f64() / GB
}

fn raw_file(folder: &Path) {
    let file = File::options().read(true).write(true).create_new(true).open(folder.join("raw")).unwrap();
    let mut block = vec![7u8; BLOCK_BYTES];
    let bytes = usize::from(BLOCKS) * BLOCK_BYTES;
    let places = || (0..u64::from(BLOCKS)).map(|at| at * BLOCK_BYTES as u64);
    let started = Instant::now();
    places().for_each(|at| file.write_all_at(&block, at).unwrap());
    let (write, _) = (rate(bytes, started), file.sync_data().unwrap());
    let synced = rate(bytes, started);
    let mut read = || {
        let started = Instant::now();
        places().for_each(|at| file.read_exact_at(&mut block, at).unwrap());
        rate(bytes, started)
    };
    let cached = read();
    let cold = empty_page_cache().then(&mut read);
    println!(
        "raw file: write {write:.2} (synced {synced:.2}), read cached {cached:.2}, cold {cold:.2?} GB/s"
    );
}

async fn put(shard: &KvStore) -> f64 {
    let body = Bytes::copy_from_slice(&noise_body());
    let shape = WireTileShape { layers: LAYERS, block_tokens: 64, kv_heads: 3, head_dim: 64, ..wire_shape() };
    let ctx = CallContext::new("measure");
    let (sender, receiver) = mpsc::channel(8);
    let acks = shard.put_blocks(&ctx, identity(""), shape, receiver).await.unwrap();
    let crc = crc32c(&body);
    let started = Instant::now();
    let feed = async move {
        for block in 0..BLOCKS {
            for layer in 0..LAYERS {
                let tile = TileMessage {
                    key: name(block),
                    layer,
                    crc32c: crc,
                    data: body.clone().into(),
                    place: None,
                };
                sender.send(tile).await.unwrap();
            }
        }
    };
    let ((), acks) = tokio::join!(feed, collect(acks));
    assert!(acks.iter().all(|ack| ack.as_ref().is_ok_and(|ack| ack.outcome == PutOutcome::Stored)));
    rate(usize::from(BLOCKS) * BLOCK_BYTES, started)
}

fn noise_body() -> Vec<u8> {
    let mut tile = Tile::zeroed(LARGE);
    let values = 64 * 3 * 64;
    tile.write(0, &noise(1, values), &noise(2, values)).unwrap();
    tile.as_bytes().to_vec()
}

async fn get(shard: &KvStore) -> f64 {
    let keys = (0..VIEW).map(name).collect();
    let get = GetBlocks::whole(identity(""), keys);
    let started = Instant::now();
    let mut tiles = shard.get_blocks(&CallContext::new("measure"), get).await.unwrap();
    let mut bytes = 0;
    while let Some(tile) = tiles.next().await {
        bytes += tile.unwrap().expect("every block is there").data.len();
    }
    rate(bytes, started)
}

/// Milliseconds and GB/s of one decode row's attention over the view, layer after layer.
fn attend(shard: &KvStore, view: u64, what: &str) {
    let queries = Tensor::from_f32(&[1, 9, 64], &noise(3, 9 * 64));
    let item = AttendItem {
        view_id: view,
        first_position: u64::from(VIEW) * 64,
        queries,
        scale: 0.125,
        sparse: None,
    };
    let layers = 10;
    let started = Instant::now();
    for layer in 0..layers {
        let partials = shard.attend_here(&query(1, layer, vec![item.clone()])).unwrap().unwrap();
        assert_eq!(partials.len(), usize::from(VIEW) / 32);
    }
    let bytes = usize::from(VIEW) * layers as usize * 48 * 1024;
    let milliseconds = started.elapsed().as_secs_f64() * 1e3 / f64::from(layers);
    println!("attention, {what}: {milliseconds:.1} ms a layer, {:.2} GB/s", rate(bytes, started));
}

async fn view(shard: &KvStore) -> u64 {
    let blocks = (0..VIEW).map(|at| (u64::from(at), name(at))).collect();
    let open = OpenView { identity: identity(""), blocks, append_to: None, lease_ms: 600_000 };
    match shard.open_view(&CallContext::new("measure"), open).await.unwrap() {
        OpenedView::Open { view_id } => view_id,
        missing @ OpenedView::Missing(_) => panic!("{missing:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn measure_disk_tier() {
    let base = std::env::temp_dir();
    let folder = tempfile::tempdir_in(base).unwrap();
    raw_file(folder.path());
    let bytes = u64::from(BLOCKS) * BLOCK_BYTES as u64;
    let options = longshore_compute::PoolOptions { threads: 2, ..Default::default() };
    let pool = ComputePool::new(&options).expect("two threads can be had");
    let memory = Config { capacity_bytes: bytes, retention_ms: 0, scrub_bytes_per_s: 0, ..Config::default() };
    let (shard, tasks) = large_shard(memory.clone(), LAYERS, 32, &pool);
    println!("put into memory: {:.2} GB/s", put(&shard).await);
    println!("get from memory: {:.2} GB/s", get(&shard).await);
    let opened = view(&shard).await;
    attend(&shard, opened, "memory, first");
    attend(&shard, opened, "memory");
    tasks.drain(PATIENCE).await;
    drop(shard);

    let disk = DiskConfig {
        path: folder.path().display().to_string(),
        capacity_bytes: bytes,
        read_timeout_ms: 60_000,
        ..DiskConfig::default()
    };
    let small = Config { capacity_bytes: 32 * BLOCK_BYTES as u64, disk, ..memory };
    let (shard, tasks) = large_shard(small.clone(), LAYERS, 32, &pool);
    println!("put, all but 32 blocks spilled: {:.2} GB/s", put(&shard).await);
    let opened = view(&shard).await;
    println!("get, disk, cached: {:.2} GB/s", get(&shard).await);
    attend(&shard, opened, "disk, cached, first");
    attend(&shard, opened, "disk, cached");
    if empty_page_cache() {
        println!("get, disk, cold: {:.2} GB/s", get(&shard).await);
        empty_page_cache();
        attend(&shard, opened, "disk, cold");
        attend(&shard, opened, "disk, again");
    }
    tasks.drain(PATIENCE).await;
    drop(shard);
    let cold = empty_page_cache();
    let started = Instant::now();
    let (shard, _tasks) = large_shard(small, LAYERS, 32, &pool);
    let blocks = shard.stats(&CallContext::new("measure")).await.unwrap().blocks;
    println!("restart with {blocks} blocks: {:.1} ms (cold: {cold})", started.elapsed().as_secs_f64() * 1e3);
}

/// What this process and the machine spent: what explains a rate.
struct Spent {
    /// Of all threads, in user and in kernel mode, hundredths of a second.
    user: u64,
    kernel: u64,
    faults: u64,
    /// Of the whole machine, hundredths of a second that its processors worked for anybody.
    busy: u64,
}

impl Spent {
    fn now() -> Self {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let fields: Vec<u64> =
            stat.trim_end().rsplit(')').next().unwrap().split(' ').flat_map(str::parse).collect();
        let all = std::fs::read_to_string("/proc/stat").unwrap();
        let all: Vec<u64> = all.lines().next().unwrap().split(' ').flat_map(str::parse).collect();
        // Behind the state, which is no number: ppid, pgrp, session, tty, tpgid (may be negative), flags, minflt, cminflt, majflt, cmajflt.
        let at = fields.len() - (52 - 14 + 1);
        Self {
            user: fields[at],
            kernel: fields[at + 1],
            faults: fields[at - 4],
            busy: all[0] + all[1] + all[2],
        }
    }

    fn since(&self) -> String {
        let now = Self::now();
        let (user, kernel, busy) = (now.user - self.user, now.kernel - self.kernel, now.busy - self.busy);
        let others = busy.saturating_sub(user + kernel);
        let faults = now.faults - self.faults;
        format!("{user}0 ms user, {kernel}0 ms kernel, others {others}0 ms, {faults} faults")
    }
}

/// Blocks read cold from the disk tier beside a loop of reads of a plain file with the same bytes, in turns.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn measure_cold_gets() {
    let folder = tempfile::tempdir().unwrap();
    let mut block = vec![7u8; BLOCK_BYTES];
    let raw =
        File::options().read(true).write(true).create_new(true).open(folder.path().join("raw")).unwrap();
    let places = || (0..u64::from(VIEW)).map(|at| at * BLOCK_BYTES as u64);
    places().for_each(|at| raw.write_all_at(&block, at).unwrap());
    let options = longshore_compute::PoolOptions { threads: 2, ..Default::default() };
    let pool = ComputePool::new(&options).expect("two threads can be had");
    let path = folder.path().display().to_string();
    let disk = DiskConfig { path, capacity_bytes: 2 << 30, ..DiskConfig::default() };
    let capacity_bytes = 32 * BLOCK_BYTES as u64;
    let config = Config { capacity_bytes, retention_ms: 0, scrub_bytes_per_s: 0, disk, ..Config::default() };
    let (shard, tasks) = large_shard(config, LAYERS, 32, &pool);
    put(&shard).await;
    if !empty_page_cache() {
        println!("the page cache cannot be emptied here: no cold reads");
    }
    for round in 1..=8 {
        empty_page_cache();
        let (started, before) = (Instant::now(), Spent::now());
        places().for_each(|at| raw.read_exact_at(&mut block, at).unwrap());
        let (plain, raw_spent) = (rate(usize::from(VIEW) * BLOCK_BYTES, started), before.since());
        empty_page_cache();
        let before = Spent::now();
        let (tier, spent) = (get(&shard).await, before.since());
        println!(
            "round {round}: raw file {plain:.2} GB/s ({raw_spent}), get {tier:.2} GB/s, {:.2} of raw ({spent})",
            tier / plain
        );
        let stats = shard.stats(&CallContext::new("measure")).await.unwrap();
        assert_eq!(stats.tiers[1].promoted_total, 0, "memory is full: nothing but the reads is measured");
    }
    let before = Spent::now();
    println!("cached: get {:.2} GB/s ({})", get(&shard).await, before.since());
    tasks.drain(PATIENCE).await;
}
