//! What is kept beside blocks, by hand-written stories.

use std::sync::Arc;

use super::*;
use crate::{AdmissionFilter, AdmissionRule};

fn generation(pool: &BlockPool<u32>, name: u8) -> Generation {
    pool.index[&(tenant(0), key(name))]
}

/// Notes a block's name for one of its layers.
fn take(pool: &mut BlockPool<u32>, name: u8, layer: usize, bytes: u64, now_ms: u64) -> Noted {
    pool.take_note(generation(pool, name), layer, Arc::new(name), bytes, now_ms)
}

fn noted(pool: &BlockPool<u32>, name: u8, layer: usize) -> Option<u8> {
    let block = pool.peek_block(tenant(0), key(name)).expect("it is held");
    block.note::<u8>(layer).map(|note| *note)
}

#[test]
fn notes_count_and_go_with_their_block() {
    let mut pool = pool(4);
    store(&mut pool, tenant(0), 1, 0).unwrap();
    assert_eq!(take(&mut pool, 1, 0, 7, 0), Noted::Kept);
    assert_eq!(take(&mut pool, 1, 2, 3, 0), Noted::Kept);
    assert_eq!(take(&mut pool, 1, 2, 3, 0), Noted::Kept, "the first one stays");
    assert_eq!(take(&mut pool, 1, 3, 3, 0), Noted::No, "blocks have three layers");
    assert_eq!((pool.stats().note_bytes, pool.used_bytes()), (10, BLOCK_BYTES + 10));
    assert_eq!([0, 1, 2].map(|layer| noted(&pool, 1, layer)), [Some(1), None, Some(1)]);
    let block = pool.peek_block(tenant(0), key(1)).unwrap();
    pool.condemn(block.generation());
    assert_eq!((pool.stats().note_bytes, pool.used_bytes()), (0, 0));
    assert!(block.note::<u8>(0).is_none(), "whoever still has the block keeps no notes of it");
    assert_eq!(pool.take_note(block.generation(), 1, Arc::new(1u8), 3, 0), Noted::No);
}

#[test]
fn notes_displace_what_nothing_keeps_and_at_most_a_quarter() {
    // 240 bytes, notes at most 60.
    let mut pool = pool(8);
    (1..=8).for_each(|name| assert!(store(&mut pool, tenant(0), name, 0).is_ok()));
    let view = open(&mut pool, tenant(0), &[7, 8], 0);
    assert_eq!(take(&mut pool, 7, 0, 5, 0), Noted::No, "leases run");
    assert_eq!(take(&mut pool, 7, 0, 5, RETENTION_MS), Noted::Kept);
    assert_eq!((pool.stats().evicted_total, pool.stats().note_bytes), (1, 5));
    assert_eq!(take(&mut pool, 8, 0, 50, RETENTION_MS), Noted::Kept);
    assert_eq!(take(&mut pool, 8, 1, 6, RETENTION_MS), Noted::No, "a view holds what is noted");
    assert_eq!(take(&mut pool, 8, 1, 5, RETENTION_MS), Noted::Kept);
    pool.close_view(view);
    assert_eq!(take(&mut pool, 6, 0, 10, RETENTION_MS), Noted::Kept);
    assert_eq!(
        (noted(&pool, 8, 0), noted(&pool, 7, 0)),
        (None, Some(7)),
        "the tail was used before the head"
    );
    assert_eq!(pool.stats().note_bytes, 15);
}

#[test]
fn a_put_beyond_the_budget_evicts_or_is_refused() {
    let mut pool = pool(4);
    (1..=3).for_each(|name| assert!(store(&mut pool, tenant(0), name, 0).is_ok()));
    let view = open(&mut pool, tenant(0), &[2, 3], 0);
    assert_eq!(take(&mut pool, 2, 0, 1, 0), Noted::Kept);
    // One byte more than fits beside a fourth block, so the first one goes.
    assert!(matches!(store(&mut pool, tenant(0), 4, RETENTION_MS), Ok(Put::Sealed(_))));
    assert_eq!(pool.lookup(tenant(0), &[1, 4].map(key), RETENTION_MS), [false, true]);
    let refused = store(&mut pool, tenant(0), 5, RETENTION_MS);
    assert!(matches!(refused, Err(Error::NoSpace { used_bytes: 91, .. })), "{refused:?}");
    pool.close_view(view);
    // 2 and 3 nothing keeps; 4 is promised to the one who looked it up.
    assert!(matches!(store(&mut pool, tenant(0), 5, RETENTION_MS), Ok(Put::Sealed(_))));
    assert!(pool.used_bytes() <= 4 * BLOCK_BYTES);
}

#[test]
fn notes_of_blocks_that_no_view_holds_make_way_when_nothing_else_does() {
    let mut pool = pool(4);
    (1..=3).for_each(|name| assert!(store(&mut pool, tenant(0), name, 0).is_ok()));
    assert_eq!(take(&mut pool, 1, 0, 30, 0), Noted::Kept);
    assert!(matches!(store(&mut pool, tenant(0), 4, 0), Ok(Put::Sealed(_))), "all blocks are promised");
    assert_eq!((noted(&pool, 1, 0), pool.used_bytes()), (None, 4 * BLOCK_BYTES));
}

#[test]
fn notes_stay_when_their_block_goes_down() {
    let disk = DiskConfig { blocks: 8, moves_max: 1, pause_ms: 1_000 };
    let pool = BlockPool::with_policy(config(4), Box::new(Lru::default())).expect("it is valid");
    let filter = AdmissionFilter::new(AdmissionRule::All, 8, 7);
    let mut pool = pool.with_disk(disk, Box::new(Lru::default()), filter);
    (1..=4).for_each(|name| assert!(store(&mut pool, tenant(0), name, 0).is_ok()));
    assert_eq!(take(&mut pool, 1, 0, 9, RETENTION_MS), Noted::MakeRoom, "1 goes down for its own note");
    let spill = pool.next_spill().expect("there is an order");
    pool.finish_spill(spill, true, RETENTION_MS);
    assert_eq!(take(&mut pool, 1, 0, 9, RETENTION_MS), Noted::Kept);
    assert_eq!((noted(&pool, 1, 0), pool.stats().disk.blocks), (Some(1), 1));
    assert_eq!(pool.used_bytes(), 3 * BLOCK_BYTES + 9);
    pool.condemn(generation(&pool, 1));
    assert_eq!(pool.stats().note_bytes, 0);
}
