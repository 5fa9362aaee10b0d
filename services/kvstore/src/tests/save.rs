//! A clean stop writes to disk what is in memory alone, as far as there is time, and the next start finds it.

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
};

use super::{
    disk::{folder, names, released, tiers},
    disk_faults::faulty,
    *,
};
use crate::tier::{DiskFaults, FaultyTier};

/// A disk whose first write fails.
#[derive(Debug, Default)]
struct FailsOnce {
    failed: AtomicBool,
}

impl DiskFaults for FailsOnce {
    fn before_write(&self) -> io::Result<()> {
        match self.failed.swap(true, SeqCst) {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(28)),
        }
    }

    fn before_read(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Stops a shard as a process does that is asked to end.
async fn stop(shard: Fixture) {
    assert_eq!(shard.tasks.drain(PATIENCE).await, Vec::<String>::new());
    drop(shard);
}

/// What a start over the same folder finds of `names`, each of them as it was stored.
async fn found(config: Config, names: &[u8]) -> Vec<bool> {
    released(&config).await;
    let after = with_config(config);
    let found = after.lookup("", names).await;
    for (name, found) in names.iter().zip(&found) {
        assert_eq!(after.get(&[*name]).await, [found.then(|| block(*name))], "block {name}");
    }
    found
}

#[tokio::test]
async fn what_is_in_memory_is_found_after_a_clean_stop() {
    let folder = folder();
    let config = tiers(folder.path(), 4, 8);
    let (names, blocks) = names(7);
    let shard = with_config(config.clone());
    shard.shard.save_at_stop();
    shard.store(&names).await;
    // Those that a view holds, too.
    shard.view(&blocks[5..]).await;
    stop(shard).await;
    assert_eq!(found(config, &names).await, [true; 7]);
}

#[tokio::test]
async fn a_shard_that_everybody_let_go_of_is_saved_too() {
    let folder = folder();
    let config = tiers(folder.path(), 4, 8);
    let Fixture { shard, tasks, .. } = {
        let shard = with_config(config.clone());
        shard.shard.save_at_stop();
        shard.store(&[1, 2, 3]).await;
        shard
    };
    drop(shard);
    assert_eq!(tasks.drain(PATIENCE).await, Vec::<String>::new());
    assert_eq!(found(config, &[1, 2, 3]).await, [true; 3]);
}

#[tokio::test]
async fn without_time_for_it_nothing_is_written() {
    let (names, _) = names(3);
    let folder = folder();
    let mut config = tiers(folder.path(), 4, 8);
    config.disk.save_ms = 0;
    let shard = with_config(config.clone());
    shard.shard.save_at_stop();
    shard.store(&names).await;
    stop(shard).await;
    assert_eq!(found(config, &names).await, [false; 3]);
}

#[tokio::test]
async fn a_slow_disk_gets_what_is_worth_most_and_is_not_waited_for() {
    let folder = folder();
    let mut config = tiers(folder.path(), 8, 8);
    // The first write begins in time, and when it ends there is none left for another.
    (config.disk.save_ms, config.disk.writes_max) = (2_000, 1);
    let (shard, faults) = faulty(config.clone());
    shard.shard.save_at_stop();
    shard.store(&[1, 2, 3, 4]).await;
    shard.view(&[(0, 3)]).await;
    faults.delay_ms.store(2_000, SeqCst);
    stop(shard).await;
    assert_eq!(found(config, &[1, 2, 3, 4]).await, [false, false, true, false]);
}

#[tokio::test]
async fn a_disk_that_fails_does_not_hold_up_a_stop() {
    let folder = folder();
    let mut config = tiers(folder.path(), 8, 8);
    config.disk.pause_ms = 10;
    let (shard, faults) = faulty(config.clone());
    shard.shard.save_at_stop();
    shard.store(&[1, 2, 3, 4]).await;
    faults.write_errno.store(28, SeqCst);
    stop(shard).await;
    assert_eq!(found(config, &[1, 2, 3, 4]).await, [false; 4]);
}

#[tokio::test]
async fn after_a_write_that_failed_a_stop_waits_and_goes_on() {
    let folder = folder();
    let mut config = tiers(folder.path(), 8, 8);
    (config.disk.save_ms, config.disk.pause_ms, config.disk.writes_max) = (25_000, 50, 1);
    let around =
        |inner| -> Arc<dyn Tier> { Arc::new(FaultyTier { inner, faults: Arc::new(FailsOnce::default()) }) };
    let shard = with_tier(config.clone(), around);
    shard.shard.save_at_stop();
    shard.store(&[1, 2, 3, 4]).await;
    stop(shard).await;
    assert_eq!(found(config, &[1, 2, 3, 4]).await, [true, true, true, false], "4 was written first, in vain");
}

#[tokio::test]
async fn a_pause_that_outlasts_the_save_is_not_waited_for() {
    let folder = folder();
    let mut config = tiers(folder.path(), 8, 8);
    // Both are longer than a test waits.
    (config.disk.save_ms, config.disk.pause_ms, config.disk.writes_max) = (3_000_000, 3_600_000, 1);
    let (shard, faults) = faulty(config.clone());
    shard.shard.save_at_stop();
    shard.store(&[1, 2, 3, 4]).await;
    faults.write_errno.store(28, SeqCst);
    stop(shard).await;
    assert_eq!(found(config, &[1, 2, 3, 4]).await, [false; 4]);
}

#[tokio::test]
async fn a_full_disk_keeps_what_was_used_last() {
    let folder = folder();
    let config = tiers(folder.path(), 2, 3);
    let shard = with_config(config.clone());
    shard.shard.save_at_stop();
    shard.store(&[1, 2, 3, 4, 5]).await;
    stop(shard).await;
    // 1 to 3 were there; 4 and 5 were in memory.
    let kept = found(config, &[1, 2, 3, 4, 5]).await;
    assert_eq!(kept, [false, false, true, true, true]);
}

#[tokio::test]
async fn a_full_disk_keeps_what_was_used_after_what_is_in_memory() {
    let folder = folder();
    let config = tiers(folder.path(), 2, 3);
    let shard = with_config(config.clone());
    shard.shard.save_at_stop();
    shard.store(&[1, 2, 3, 4, 5]).await;
    // 4 and 5 are in memory and colder now than 2 and 3, which are on disk.
    shard.lookup("", &[2, 3]).await;
    stop(shard).await;
    assert_eq!(found(config, &[1, 2, 3, 4, 5]).await, [false, true, true, false, true]);
}

/// A larger memory than the disk: what was saved first is worth most.
#[tokio::test]
async fn a_small_disk_gets_the_best_of_a_large_memory() {
    let folder = folder();
    let config = tiers(folder.path(), 8, 3);
    let shard = with_config(config.clone());
    shard.shard.save_at_stop();
    shard.store(&[1, 2, 3, 4, 5, 6, 7]).await;
    stop(shard).await;
    assert_eq!(found(config, &[1, 2, 3, 4, 5, 6, 7]).await, [false, false, false, false, true, true, true]);
}
