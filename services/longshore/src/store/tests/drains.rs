//! Shards that hand over what they hold.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use super::{
    super::{cluster::call, drain, put::put_file},
    house::{House, PATIENCE, block, key},
};
use crate::store::file::BlockFile;

/// A name of which `shard` owns a copy, counted from `from`.
async fn owned_by(house: &House, shard: usize, copies: usize, from: u8) -> u8 {
    let map = house.cluster.view.shard_map();
    (from..=255).find(|name| map.owners(&[*name; 32], copies).contains(&shard)).unwrap()
}

#[tokio::test]
async fn a_drained_shard_can_be_stopped_without_a_loss() {
    let house = House::new(4, 2).await;
    for name in 1..=24 {
        house.put(name).await;
    }
    let held = house.cluster.stats_of(1).await.unwrap().blocks;
    assert!(held > 0, "it has something to hand over");
    let done = drain::run(&house.cluster, 1, PATIENCE).await.unwrap();
    assert_eq!((done.drain.blocks, done.drain.moved_blocks), (held, held));
    let rows = house.rows().await;
    assert_eq!(rows.len(), 24);
    for row in &rows {
        let others: BTreeSet<usize> = row.copies.iter().map(|(at, _)| *at).filter(|at| *at != 1).collect();
        assert!(others.len() >= 2, "{row:?}");
    }
    assert_eq!(
        house.cluster.stats_of(1).await.unwrap().blocks,
        held,
        "it serves what it holds until it is stopped"
    );
    // New blocks go around it.
    let name = owned_by(&house, 1, 2, 100).await;
    let placed = house.put(name).await;
    assert!(placed.holders.len() == 2 && placed.holders.iter().all(|(id, _)| id != "kv-1"), "{placed:?}");
    assert!(placed.refusals.iter().any(|refusal| refusal.contains("`kv-1` is being drained")), "{placed:?}");
    // Asked again, nothing changes.
    let again = drain::run(&house.cluster, 1, PATIENCE).await.unwrap();
    assert_eq!(again.drain.moved_blocks, held);
    // Ended, it owns its part again, and what was lent for it is given back.
    house.cluster.shards[1].client.drain(&call(), true).await.unwrap();
    assert!(!house.cluster.stats_of(1).await.unwrap().drain.draining);
    house.settled(2).await;
    assert!(house.holders(name).await.contains(&1), "it is an owner");
}

#[tokio::test]
async fn with_one_copy_the_blocks_move_and_writers_are_not_cut_off() {
    let house = House::new(2, 1).await;
    for name in 1..=12 {
        house.put(name).await;
    }
    let done = drain::run(&house.cluster, 0, PATIENCE).await.unwrap();
    assert!(done.drain.takes_blocks, "its owner is the only shard that a writer knows");
    for row in house.rows().await {
        assert!(row.copies.iter().any(|(at, _)| *at == 1), "{row:?}");
    }
}

#[tokio::test]
async fn what_cannot_be_moved_is_told_with_its_cause() {
    let house = House::new(2, 2).await;
    house.put(1).await;
    let refused = drain::run(&house.cluster, 0, Duration::from_secs(2)).await.unwrap_err().to_string();
    assert!(refused.contains("was not asked to drain") && refused.contains("add a shard"), "{refused}");
    assert!(!house.cluster.stats_of(0).await.unwrap().drain.draining, "nothing was begun");
    // Somebody asked it all the same.
    house.cluster.shards[0].client.drain(&call(), false).await.unwrap();
    // What it did not look at yet it would tell to be on its way.
    let began = Instant::now();
    while house.cluster.stats_of(0).await.unwrap().drain.too_few_hosts_blocks == 0 {
        assert!(began.elapsed() < PATIENCE, "it does not look at its block");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let few = drain::run(&house.cluster, 0, Duration::from_secs(2)).await.unwrap_err().to_string();
    assert!(few.contains("1 blocks are on every other host") && few.contains("add a shard"), "{few}");
    assert!(few.contains("it still takes new blocks") && few.contains("`--cancel`"), "{few}");
    house.cluster.shards[0].client.drain(&call(), true).await.unwrap();

    let house = House::new(2, 1).await;
    let homeless = BlockFile { place: None, ..block(9) };
    put_file(&house.cluster, &house.file(&homeless), Some("kv-0")).await.unwrap();
    let unplaced = drain::run(&house.cluster, 0, Duration::from_secs(2)).await.unwrap_err().to_string();
    assert!(
        unplaced.contains("1 blocks cannot be moved because nobody said where they belong"),
        "{unplaced}"
    );
    assert_eq!(house.holders(9).await, BTreeSet::from([0]), "{}", key(9));
}

#[tokio::test]
async fn a_second_shard_is_not_drained_when_too_few_would_be_left() {
    let house = House::new(3, 2).await;
    for name in 1..=8 {
        house.put(name).await;
    }
    drain::run(&house.cluster, 1, PATIENCE).await.unwrap();
    let refused = drain::run(&house.cluster, 2, PATIENCE).await.unwrap_err().to_string();
    for sign in
        ["`kv-2` was not asked", "2 copies", "`kv-0`", "end the drain of `kv-1`", "drain kv-1 --cancel"]
    {
        assert!(refused.contains(sign), "`{sign}` is missing in {refused}");
    }
    assert!(!house.cluster.stats_of(2).await.unwrap().drain.draining, "nothing was begun");
    // The first one is drained still, and once it owns its part again the second one can be.
    drain::run(&house.cluster, 1, PATIENCE).await.unwrap();
    house.cluster.shards[1].client.drain(&call(), true).await.unwrap();
    drain::run(&house.cluster, 2, PATIENCE).await.unwrap();
}

#[tokio::test]
async fn the_only_shard_cannot_be_drained() {
    let house = House::new(1, 1).await;
    let alone = drain::run(&house.cluster, 0, PATIENCE).await.unwrap_err().to_string();
    assert!(alone.contains("the only shard"), "{alone}");
}
