//! Damage on disk that was found once: a restart does not find it again.

use std::{path::Path, sync::atomic::Ordering::SeqCst};

use longshore_proto::types::ListBlocks;

use super::{
    disk::{folder, released, tiers},
    disk_faults::{EIO, change, faulty, find},
    *,
};

/// Flips a bit of a tile on disk.
fn damage(folder: &Path, name: u8) {
    change(folder, |bytes| {
        let at = find(bytes, name, 1);
        bytes[at + 7] ^= 2;
    });
}

/// Room for one block in memory, and nothing of it is written at a stop.
fn one_in_memory(folder: &Path) -> Config {
    let mut config = tiers(folder, 1, 8);
    config.disk.save_ms = 0;
    config
}

/// What a start finds on the disk of a shard that ends.
async fn restarted(shard: Fixture, folder: &Path) -> Fixture {
    shard.tasks.drain(PATIENCE).await;
    drop(shard);
    let config = one_in_memory(folder);
    released(&config).await;
    with_config(config)
}

/// Has a shard find the damage of block 1.
async fn notice(shard: &Fixture, by: &str) {
    match by {
        "get" => assert_eq!(shard.get(&[1]).await, [None]),
        "attention" => {
            let view = shard.view(&[(0, 1)]).await;
            let (code, message) = shard.refused(query(1, 1, vec![item(view, 16, 1)])).await;
            assert_eq!(code, 15, "DATA_LOSS: {message}");
            shard.shard.close_view(&shard.ctx, view).await.unwrap();
        }
        _ => {
            let list = ListBlocks { check: true, ..ListBlocks::default() };
            let page = shard.shard.list_blocks(&shard.ctx, list).await.unwrap();
            assert_eq!(page.blocks.len(), 3, "{page:?}");
        }
    }
}

#[tokio::test]
async fn a_damaged_block_that_was_dropped_is_not_found_after_a_restart() {
    for by in ["get", "attention", "list"] {
        let folder = folder();
        let shard = with_config(one_in_memory(folder.path()));
        shard.store(&[1, 2, 3]).await;
        damage(folder.path(), 1);
        notice(&shard, by).await;
        assert_eq!(shard.lookup("", &[1]).await, [false], "{by}");
        let shard = restarted(shard, folder.path()).await;
        assert_eq!(shard.lookup("", &[1, 2]).await, [false, true], "{by}: the other one is there");
        assert_eq!(shard.get(&[1, 2]).await, [None, Some(block(2))], "{by}");
        assert_eq!(shard.stats().await.corrupt_total, 0, "{by}: nothing was read to find that out");
    }
}

#[tokio::test]
async fn what_cannot_be_read_for_a_while_is_found_again() {
    let folder = folder();
    let (shard, faults) = faulty(one_in_memory(folder.path()));
    shard.store(&[1, 2]).await;
    faults.read_errno.store(EIO, SeqCst);
    assert_eq!(shard.get(&[1]).await, [None]);
    let shard = restarted(shard, folder.path()).await;
    assert_eq!(shard.get(&[1]).await, [Some(block(1))], "it was never damaged");
}

#[tokio::test]
async fn a_place_whose_damage_is_found_is_empty_for_the_next_block() {
    let folder = folder();
    let shard = with_config(one_in_memory(folder.path()));
    shard.store(&[1, 2]).await;
    damage(folder.path(), 1);
    notice(&shard, "get").await;
    // Again, and one that drives it to the place that was emptied.
    shard.store(&[1, 3]).await;
    shard.settled("both are below", |stats| stats.tiers[1].blocks == 2).await;
    let shard = restarted(shard, folder.path()).await;
    assert_eq!(shard.get(&[1, 2]).await, [Some(block(1)), Some(block(2))]);
}

#[tokio::test]
async fn a_damaged_copy_of_a_block_in_memory_is_not_found_either() {
    let folder = folder();
    let mut config = one_in_memory(folder.path());
    config.disk.pause_ms = 1;
    let (shard, faults) = faulty(config);
    shard.store(&[1, 2]).await;
    shard.view(&[(0, 1)]).await;
    shard.settled("it lies on both tiers", |stats| stats.tiers[1].promoted_total == 1).await;
    // The disk failed: copies are read before memory is given up for them.
    faults.read_errno.store(EIO, SeqCst);
    assert_eq!(shard.get(&[2]).await, [None]);
    faults.read_errno.store(0, SeqCst);
    damage(folder.path(), 1);
    let failed = shard.disk().await.io_errors_total;
    for name in 3.. {
        shard.put("", block(name)).await;
        if shard.disk().await.io_errors_total > failed {
            break;
        }
        assert!(name < 250, "its copy is never read");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(shard.lookup("", &[1]).await, [true], "it is in memory");
    let shard = restarted(shard, folder.path()).await;
    assert_eq!((shard.lookup("", &[1]).await, shard.stats().await.corrupt_total), (vec![false], 0));
}
