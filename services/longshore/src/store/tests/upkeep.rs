//! Checks of copies, and scrubbing on request.

use super::house::{House, PATIENCE, key};
use crate::store::{scrub, verify};

#[tokio::test]
async fn copies_that_are_all_there_and_sound_verify() {
    let house = House::new(3, 2).await;
    for name in 1..=6 {
        house.put(name).await;
    }
    let (findings, totals) = verify::run(&house.cluster, None).await.unwrap();
    assert_eq!(findings, []);
    assert_eq!((totals.blocks, totals.copies, totals.is_sound()), (6, 12, true), "{totals:?}");
    let before: Vec<u64> =
        (house.cluster.stats().await.iter()).map(|stats| stats.as_ref().unwrap().hits_total).collect();
    assert_eq!(before, [0; 3], "a check is no use");
    let (_, some) = verify::run(&house.cluster, Some(&["03".to_owned(), "99".to_owned()])).await.unwrap();
    assert_eq!((some.blocks, some.missing_keys.as_slice()), (1, ["99".to_owned()].as_slice()));
    assert!(!some.is_sound(), "a block that was asked for is missing");
}

#[tokio::test]
async fn a_damaged_copy_is_found_dropped_and_made_anew() {
    let house = House::new(3, 2).await;
    for name in 1..=4 {
        house.put(name).await;
    }
    let victim = *house.holders(3).await.last().unwrap();
    assert!(house.shards[victim].corrupt_for_test(key(3), 1));
    let (findings, totals) = verify::run(&house.cluster, None).await.unwrap();
    let [finding] = findings.as_slice() else { panic!("{findings:?}") };
    assert_eq!(finding.key, key(3).to_string());
    assert_eq!((finding.damaged.as_slice(), finding.sound), ([format!("kv-{victim}")].as_slice(), 1));
    assert_eq!((totals.damaged_copies, totals.is_sound()), (1, false));
    house.settled(2).await;
    let (findings, totals) = verify::run(&house.cluster, None).await.unwrap();
    assert!(findings.is_empty() && totals.is_sound(), "{findings:?} {totals:?}");
}

#[tokio::test]
async fn a_block_with_one_of_two_copies_is_short() {
    let house = House::new(2, 2).await;
    super::super::put::put_file(&house.cluster, &house.file(&unplaced()), Some("kv-0")).await.unwrap();
    let (findings, totals) = verify::run(&house.cluster, None).await.unwrap();
    assert_eq!((findings.len(), findings[0].sound, findings[0].wanted), (1, 1, 2));
    assert_eq!((totals.short_blocks, totals.damaged_copies, totals.is_sound()), (1, 0, false));
}

/// Nobody knows where it belongs, so nobody copies it.
fn unplaced() -> crate::store::file::BlockFile {
    crate::store::file::BlockFile { place: None, ..super::house::block(9) }
}

#[tokio::test]
async fn a_scrub_on_request_finds_and_drops_what_is_damaged() {
    let house = House::new(2, 1).await;
    for name in 1..=6 {
        house.put(name).await;
    }
    let all = [0, 1];
    let sound = scrub::run(&house.cluster, &all, Some(1 << 30), PATIENCE).await.unwrap();
    assert_eq!(
        sound.iter().map(|one| (one.checked, one.bad)).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1)),
        (6, 0)
    );
    let victim = *house.holders(5).await.first().unwrap();
    assert!(house.shards[victim].corrupt_for_test(key(5), 0));
    let found = scrub::run(&house.cluster, &all, Some(1 << 30), PATIENCE).await.unwrap();
    assert_eq!(found[victim].bad, 1);
    assert_eq!(found[victim].findings, [(key(5), "dram".to_owned())]);
    assert_eq!(found[1 - victim].bad, 0);
    assert!(house.holders(5).await.is_empty(), "it was dropped");
    let after = scrub::run(&house.cluster, &[victim], None, PATIENCE).await.unwrap();
    assert_eq!((after.len(), after[0].bad), (1, 0));
}

#[tokio::test]
async fn a_scrub_keeps_to_its_rate_and_a_second_request_joins_the_first() {
    let house = House::new(1, 1).await;
    for name in 1..=6 {
        house.put(name).await;
    }
    // Years for these blocks.
    let slow =
        house.cluster.shards[0].client.start_scrub(&super::super::cluster::call(), Some(1)).await.unwrap();
    let joined = house.cluster.shards[0]
        .client
        .start_scrub(&super::super::cluster::call(), Some(1 << 30))
        .await
        .unwrap();
    assert_eq!((slow.round, slow.bytes_per_second), (1, 1));
    assert_eq!(joined, slow);
    let late =
        scrub::run(&house.cluster, &[0], None, std::time::Duration::from_millis(300)).await.unwrap_err();
    assert!(late.to_string().contains("still at work"), "{late}");
}
