//! Disks that lie, fail, fill up or answer late: a miss at worst, never a wrong byte, and a shard that goes on.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    time::Instant,
};

use longshore_fabric::Code;
use longshore_proto::types::GetSummaries;

use super::{
    disk::{folder, names, tiers},
    *,
};
use crate::tier::{DiskFaults, FaultyTier};

/// What a faulty disk does at the moment.
#[derive(Debug, Default)]
pub(super) struct Faults {
    /// errno of writes; 0: none.
    pub(super) write_errno: AtomicU64,
    /// errno of reads; 0: none.
    pub(super) read_errno: AtomicU64,
    /// Milliseconds that reads and writes take.
    pub(super) delay_ms: AtomicU64,
    /// Reads and writes stand still while this is set: longer than anybody waits for them, however slow the machine is.
    hold: AtomicBool,
    /// How many do.
    held: AtomicU64,
}

impl Faults {
    fn pass(&self, errno: &AtomicU64) -> io::Result<()> {
        self.held.fetch_add(1, SeqCst);
        // A test that failed meanwhile is not to wait for ever for its threads.
        let begun = Instant::now();
        while self.hold.load(SeqCst) && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.held.fetch_sub(1, SeqCst);
        std::thread::sleep(Duration::from_millis(self.delay_ms.load(SeqCst)));
        match errno.load(SeqCst) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno as i32)),
        }
    }
}

impl DiskFaults for Faults {
    fn before_write(&self) -> io::Result<()> {
        self.pass(&self.write_errno)
    }

    fn before_read(&self) -> io::Result<()> {
        self.pass(&self.read_errno)
    }
}

fn summaries_of_all() -> GetSummaries {
    GetSummaries {
        identity: identity(""),
        view_id: 0,
        first_layer: 0,
        layers: None,
        values: true,
        spreads: false,
        cosines: false,
    }
}

const ENOSPC: u64 = 28;
pub(super) const EIO: u64 = 5;

pub(super) fn faulty(config: Config) -> (Fixture, Arc<Faults>) {
    let faults = Arc::new(Faults::default());
    let around = faults.clone();
    let shard = with_tier(config, |inner| Arc::new(FaultyTier { inner, faults: around }));
    (shard, faults)
}

#[tokio::test]
async fn a_disk_without_room_loses_blocks_and_serves_on() {
    let folder = folder();
    let mut config = tiers(folder.path(), 1, 8);
    config.disk.pause_ms = 0;
    let (shard, faults) = faulty(config);
    shard.store(&[1, 2]).await;
    faults.write_errno.store(ENOSPC, SeqCst);
    shard.store(&[3, 4]).await;
    assert_eq!(shard.lookup("", &[1, 2, 3, 4]).await, [true, false, false, true]);
    assert_eq!(shard.disk().await.io_errors_total, 2);
    faults.write_errno.store(0, SeqCst);
    shard.store(&[5]).await;
    assert_eq!(shard.lookup("", &[1, 4, 5]).await, [true; 3]);
    assert_eq!(shard.get(&[1, 2, 4]).await, [Some(block(1)), None, Some(block(4))]);
}

#[tokio::test]
async fn a_disk_that_cannot_be_read_is_a_miss() {
    let folder = folder();
    let (shard, faults) = faulty(tiers(folder.path(), 1, 8));
    shard.store(&[1, 2, 3]).await;
    // Keeps 3 in memory, so that 1 and 2 stay on disk.
    let keeper = shard.view(&[(0, 3)]).await;
    let view = shard.view(&[(0, 1), (1, 2)]).await;
    faults.read_errno.store(EIO, SeqCst);
    let (code, message) = shard.refused(query(1, 0, vec![item(view, 32, 1)])).await;
    assert_eq!(code, 15, "DATA_LOSS: {message}");
    assert!(message.contains("cannot be read"), "{message}");
    assert_eq!(shard.get(&[2]).await, [None]);
    faults.read_errno.store(0, SeqCst);
    assert_eq!(shard.lookup("", &[1, 2, 3]).await, [false, false, true]);
    let disk = shard.disk().await;
    assert!(disk.io_errors_total >= 2, "{disk:?}");
    for view in [view, keeper] {
        shard.shard.close_view(&shard.ctx, view).await.unwrap();
    }
    shard.settled("nothing leaks", |stats| stats.pinned_blocks == 0 && stats.blocks == 1).await;
    shard.store(&[1, 2]).await;
    assert_eq!(shard.get(&[1, 2]).await, [Some(block(1)), Some(block(2))]);
}

#[tokio::test]
async fn what_a_view_holds_stays_in_memory_while_the_disk_fails() {
    let folder = folder();
    let mut config = tiers(folder.path(), 1, 8);
    config.disk.pause_ms = 300;
    let (shard, faults) = faulty(config);
    shard.store(&[1, 2]).await;
    let view = shard.view(&[(0, 1)]).await;
    shard.settled("it lies on both tiers", |stats| stats.tiers[1].promoted_total == 1).await;
    for errno in [&faults.write_errno, &faults.read_errno] {
        errno.store(EIO, SeqCst);
    }
    // Whatever is tried meanwhile.
    assert_eq!(shard.get(&[2]).await, [None]);
    for name in 3..6 {
        let acks = shard.put("", block(name)).await;
        assert_eq!(outcomes(&acks), [(name, PutOutcome::NoSpace)], "{acks:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let answers = shard.attend(vec![query(1, 0, vec![item(view, 16, 1)])]).await;
    assert_eq!(partials_of(&answers, 1).0.len(), 1, "{answers:?}");
    assert_eq!(shard.lookup("", &[1]).await, [true]);
    for errno in [&faults.write_errno, &faults.read_errno] {
        errno.store(0, SeqCst);
    }
    // When it can be read and written again, the block goes there for another one.
    tokio::time::sleep(Duration::from_millis(400)).await;
    shard.store(&[6]).await;
    let answers = shard.attend(vec![query(2, 0, vec![item(view, 16, 1)])]).await;
    assert_eq!(partials_of(&answers, 2).0.len(), 1, "{answers:?}");
}

#[tokio::test]
async fn a_slow_disk_is_not_waited_for() {
    let folder = folder();
    let mut config = tiers(folder.path(), 1, 8);
    // Long enough for the read at the end, which is to come in time.
    (config.disk.read_timeout_ms, config.disk.write_wait_ms, config.disk.writes_max) = (3_000, 20, 1);
    let (shard, faults) = faulty(config);
    shard.store(&[1, 2]).await;
    shard.view(&[(0, 2)]).await;
    let view = shard.view(&[(0, 1)]).await;
    faults.hold.store(true, SeqCst);
    let (code, message) = shard.refused(query(1, 0, vec![item(view, 16, 1)])).await;
    assert_eq!(code, 14, "UNAVAILABLE: {message}");
    faults.delay_ms.store(300, SeqCst);
    faults.hold.store(false, SeqCst);
    assert_eq!(shard.lookup("", &[1]).await, [true], "late is not lost");
    // One put writes a block out and is as slow as the disk, the other ones go on without it.
    let puts = (10..14).map(|name| shard.put("", block(name)));
    let acks = futures::future::join_all(puts).await;
    assert!(acks.iter().flatten().all(|ack| ack.outcome != PutOutcome::Corrupt), "{acks:?}");
    assert!(shard.disk().await.slow_total >= 1);
    faults.delay_ms.store(0, SeqCst);
    shard.settled("moves end", |stats| stats.tiers[0].leaving_blocks == 0 && stats.open_blocks == 0).await;
    let answers = shard.attend(vec![query(2, 0, vec![item(view, 16, 1)])]).await;
    assert_eq!(partials_of(&answers, 2).0.len(), 1);
}

#[tokio::test]
async fn what_can_be_made_again_waits_for_a_slow_disk_and_does_not_stop_the_writing() {
    let folder = folder();
    let mut config = tiers(folder.path(), 4, 16);
    (config.disk.write_wait_ms, config.disk.writes_max, config.disk.pause_ms) = (20, 1, 600_000);
    let (shard, faults) = faulty(config);
    shard.store(&[1, 2, 3, 4]).await;
    let view = shard.view(&[(0, 1)]).await;
    faults.hold.store(true, SeqCst);
    let summaries = async {
        shard.settled("the put writes a block out", |_| faults.held.load(SeqCst) == 1).await;
        let get = GetSummaries { view_id: view, ..summaries_of_all() };
        let summaries = collect(shard.shard.get_summaries(&shard.ctx, get).await.unwrap()).await;
        faults.hold.store(false, SeqCst);
        summaries
    };
    let (acks, summaries) = tokio::join!(shard.put("", block(5)), summaries);
    assert_eq!(outcomes(&acks), [(5, PutOutcome::Stored)]);
    assert!(!summaries.is_empty() && summaries.iter().all(Result::is_ok), "{summaries:?}");
    shard.store(&[6, 7, 8, 9, 10]).await;
    assert_eq!(shard.lookup("", &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]).await, [true; 10]);
    assert_eq!(shard.stats().await.evicted_total, 0);
}

/// The only segment file of a shard.
fn segment(folder: &Path) -> PathBuf {
    folder.join("shard-kv-0").join("segment-00000000")
}

/// Changes the segment file behind the shard's back.
pub(super) fn change(folder: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let path = segment(folder);
    let mut bytes = std::fs::read(&path).unwrap();
    change(&mut bytes);
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
}

/// Where the tile of a block begins in a file.
pub(super) fn find(bytes: &[u8], name: u8, layer: u32) -> usize {
    let body = tile(name, layer).as_bytes().to_vec();
    bytes.windows(body.len()).position(|window| window == body).expect("the tile is there")
}

#[tokio::test]
async fn no_damage_to_the_file_is_served() {
    let damages: [fn(&mut Vec<u8>); 4] = [
        // A flipped bit.
        |bytes| {
            let at = find(bytes, 1, 1);
            bytes[at + 77] ^= 4;
        },
        // Tiles of two layers change places.
        |bytes| {
            let (first, second) = (find(bytes, 1, 0), find(bytes, 1, 2));
            let len = shape().bytes();
            let tile = bytes[first..first + len].to_vec();
            bytes.copy_within(second..second + len, first);
            bytes[second..second + len].copy_from_slice(&tile);
        },
        // The tile of another block.
        |bytes| {
            let (mine, other) = (find(bytes, 1, 1), find(bytes, 2, 1));
            bytes.copy_within(other..other + shape().bytes(), mine);
        },
        // The end of the file is gone.
        |bytes| bytes.truncate(find(bytes, 1, 2) + 10),
    ];
    for (which, damage) in damages.into_iter().enumerate() {
        let folder = folder();
        let shard = with_config(tiers(folder.path(), 1, 8));
        shard.store(&[1, 2, 3]).await;
        shard.view(&[(0, 3)]).await;
        let view = shard.view(&[(0, 1)]).await;
        change(folder.path(), damage);
        let mut failed = 0;
        for layer in 0..LAYERS {
            let query = query(1, layer, vec![item(view, 16, 1)]);
            match shard.attend(vec![query]).await.as_slice() {
                [AttendAnswer::Failed { code: 15, .. }] => failed += 1,
                answers => assert_eq!(partials_of(answers, 1).0.len(), 1, "damage {which}"),
            }
        }
        assert!(failed > 0, "damage {which} was served");
        assert_eq!(shard.lookup("", &[1]).await, [false], "damage {which}");
        assert_eq!(shard.get(&[1]).await, [None], "damage {which}");
        assert_eq!(shard.stats().await.corrupt_total, 1, "damage {which}");
        shard.store(&[1]).await;
        assert_eq!(shard.get(&[1]).await, [Some(block(1))], "damage {which}");
    }
}

#[tokio::test]
async fn the_scrubber_finds_damage_on_both_tiers_before_anybody_asks() {
    let folder = folder();
    let base = tiers(folder.path(), 2, 8);
    let shard = with_config(Config { scrub_bytes_per_s: 1 << 30, scrub_interval_ms: 10, ..base });
    shard.store(&[1, 2, 3, 4]).await;
    shard.settled("a round without findings", |stats| stats.scrub.rounds_total >= 1).await;
    assert_eq!(shard.stats().await.scrub.bad_total, 0);
    assert!(shard.shard.corrupt_for_test(key(4), 1));
    change(folder.path(), |bytes| {
        let at = find(bytes, 1, 2);
        bytes[at] ^= 1;
    });
    shard.settled("both are found", |stats| stats.scrub.bad_total == 2).await;
    assert_eq!(shard.lookup("", &[1, 2, 3, 4]).await, [false, true, true, false]);
    let scraped = shard.metrics.encode();
    for tier in ["dram", "disk"] {
        let line = format!("longshore_kvstore_scrub_bad_blocks_total{{tier=\"{tier}\"}} 1");
        assert!(scraped.lines().any(|have| have == line), "{line} is not in\n{scraped}");
    }
}

/// A file system of 64 KiB, where the machine lets us mount one.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let folder = folder();
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"]).arg(folder.path());
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        mounted.then_some(Self(folder))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ended = std::process::Command::new("umount").arg("-l").arg(self.0.path()).output();
    }
}

#[tokio::test]
async fn a_file_system_that_is_really_full_is_a_miss_too() {
    // The same with an injected error is above; mounting needs rights that not every machine gives.
    let Some(disk) = SmallDisk::mount() else { return };
    let mut config = tiers(disk.0.path(), 1, 1000);
    config.disk.pause_ms = 0;
    let shard = with_config(config);
    let (names, _) = names(60);
    shard.store(&names).await;
    let found = shard.lookup("", &names).await;
    let kept = found.iter().filter(|found| **found).count();
    assert!((2..60).contains(&kept), "{kept} small blocks are kept");
    assert!(shard.disk().await.io_errors_total > 0);
    for (name, found) in names.iter().zip(found) {
        assert_eq!(shard.get(&[*name]).await, [found.then(|| block(*name))], "block {name}");
    }
    drop(shard);
}

#[tokio::test]
async fn a_stopping_shard_answers_or_says_so() {
    let folder = folder();
    let shard = with_config(tiers(folder.path(), 1, 8));
    shard.store(&[1, 2]).await;
    let view = shard.view(&[(0, 1)]).await;
    assert_eq!(shard.tasks.drain(PATIENCE).await, Vec::<String>::new());
    // The readers are gone; who asks here reads itself.
    let here = shard.shard.attend_here(&query(1, 0, vec![item(view, 16, 1)])).expect("it is here");
    match here {
        Ok(partials) => assert_eq!(partials.len(), 1),
        Err(error) => assert_eq!(error.code, Code::Unavailable),
    }
}
