//! Blocks between memory and the tier below, by hand-written stories.

use std::sync::Arc;

use super::*;
use crate::{AdmissionFilter, AdmissionRule};

/// A pool with a tier below.
pub(super) fn two(blocks: u64, disk_blocks: u64, moves_max: usize) -> BlockPool<u32> {
    two_with(blocks, disk_blocks, moves_max, AdmissionRule::All)
}

pub(super) fn two_with(
    blocks: u64,
    disk_blocks: u64,
    moves_max: usize,
    rule: AdmissionRule,
) -> BlockPool<u32> {
    let disk = DiskConfig { blocks: disk_blocks, moves_max, pause_ms: 1_000 };
    let pool = BlockPool::with_policy(config(blocks), Box::new(Lru::default())).expect("it is valid");
    pool.with_disk(disk, Box::new(Lru::default()), AdmissionFilter::new(rule, 8, 7))
}

/// The same with an order of eviction, and everything is admitted.
pub(super) fn two_by(blocks: u64, disk_blocks: u64, moves_max: usize, policy: Eviction) -> BlockPool<u32> {
    let disk = DiskConfig { blocks: disk_blocks, moves_max, pause_ms: 1_000 };
    let pool = BlockPool::with_policy(config(blocks), policy.policy()).expect("it is valid");
    pool.with_disk(disk, policy.policy(), AdmissionFilter::new(AdmissionRule::All, 8, 7))
}

/// Stores a block, writing out what has to make way.
pub(super) fn put(pool: &mut BlockPool<u32>, name: u8, now_ms: u64) -> Result<Vec<u8>, Error> {
    let writer = pool.open_writer(tenant(0))?;
    let mut spilled = Vec::new();
    let admitted = loop {
        match pool.admit(writer, key(name), 0, now_ms) {
            Ok(Admission::MakeRoom) => {
                let spill = pool.next_spill().expect("there is an order");
                spilled.push(spill.block.key().0[0]);
                pool.finish_spill(spill, true, now_ms);
            }
            other => break other,
        }
    };
    for layer in 0..if admitted.is_ok() { LAYERS } else { 0 } {
        pool.put(writer, key(name), layer, page(layer), now_ms)?;
    }
    pool.close_writer(writer);
    admitted.map(|_| spilled)
}

pub(super) fn generation(pool: &BlockPool<u32>, name: u8) -> Generation {
    pool.index[&(tenant(0), key(name))]
}

pub(super) fn place(pool: &BlockPool<u32>, name: u8) -> Option<u64> {
    pool.held[&generation(pool, name)].block.extent().map(|extent| extent.index())
}

pub(super) fn promote(pool: &mut BlockPool<u32>, name: u8, now_ms: u64) -> Option<Promotion<u32>> {
    match pool.begin_promotion(generation(pool, name), now_ms) {
        Promote::Read(promotion) => Some(promotion),
        _ => None,
    }
}

#[test]
fn blocks_that_make_way_go_down_and_are_still_found_and_viewed() {
    let mut pool = two(1, 4, 1);
    put(&mut pool, 1, 0).unwrap();
    assert_eq!(put(&mut pool, 2, RETENTION_MS).unwrap(), [1]);
    assert_eq!(held(&mut pool, &[1, 2]), [true, true]);
    let view = open(&mut pool, tenant(0), &[1, 2], RETENTION_MS);
    let blocks = pool.view(tenant(0), view, RETENTION_MS).unwrap();
    assert!(matches!(blocks[0].block.payload(), Payload::Disk(_)));
    assert_eq!(blocks[0].block.checksums(), [1000, 1001, 1002], "checksums stay in memory");
    let stats = pool.stats();
    assert_eq!((stats.blocks, stats.pinned_blocks, stats.evicted_total), (2, 2, 0));
    assert_eq!((stats.disk.blocks, stats.disk.spilled_total, stats.disk.hits_total), (1, 1, 1));
    assert_eq!((stats.used_bytes, stats.disk.used_bytes), (BLOCK_BYTES, BLOCK_BYTES));
}

#[test]
fn room_is_what_can_come_without_a_loss() {
    let rooms = |pool: &BlockPool<u32>, now_ms| pool.room_bytes(now_ms) / BLOCK_BYTES;
    let mut pool = two(2, 3, 1);
    assert_eq!(rooms(&pool, 0), 5);
    for (name, left) in [(1, 4), (2, 3), (3, 2), (4, 1)] {
        put(&mut pool, name, 0).unwrap();
        assert_eq!(rooms(&pool, 0), left);
    }
    // 1 comes up, what has to make way for it goes down; its copy below is as good as free.
    let view = open(&mut pool, tenant(0), &[1], RETENTION_MS);
    assert!(matches!(pool.begin_promotion(generation(&pool, 1), RETENTION_MS), Promote::MakeRoom));
    let spill = pool.next_spill().unwrap();
    pool.finish_spill(spill, true, RETENTION_MS);
    let promotion = promote(&mut pool, 1, RETENTION_MS).unwrap();
    assert_eq!(rooms(&pool, RETENTION_MS), 0, "no more than there is for sure while it is on its way");
    pool.finish_promotion(promotion, Some((0..LAYERS).map(page).collect()));
    assert_eq!(rooms(&pool, RETENTION_MS), 1);
    pool.close_view(view);
    put(&mut pool, 5, RETENTION_MS).unwrap();
    assert_eq!((rooms(&pool, RETENTION_MS), pool.stats().evicted_total), (0, 0));
    pool.pause_spills(RETENTION_MS);
    assert_eq!(rooms(&pool, RETENTION_MS), 0, "nothing goes down");
    assert_eq!(rooms(&two_with(2, 3, 1, AdmissionRule::SecondTouch), 0), 2, "not every block goes down");
}

#[test]
fn kept_blocks_go_down_last_and_only_if_they_stay_there() {
    let mut pool = two(2, 2, 1);
    put(&mut pool, 1, 0).unwrap();
    put(&mut pool, 2, 0).unwrap();
    let view = open(&mut pool, tenant(0), &[1], 0);
    // Block 2 has a lease, block 1 a view: the lease goes first, then the view's block, and then nothing can.
    assert_eq!(put(&mut pool, 3, 1).unwrap(), [2]);
    assert_eq!(put(&mut pool, 4, 2).unwrap(), [3]);
    assert!(matches!(put(&mut pool, 5, 3), Err(Error::NoSpace { .. })), "disk is full of promised blocks");
    assert_eq!(held(&mut pool, &[1, 2, 3, 4]), [true; 4]);
    assert!(pool.view(tenant(0), view, 3).is_ok());
    // When the leases end, the least recently used of the lower tier is lost first.
    assert_eq!(put(&mut pool, 5, 10 * RETENTION_MS).unwrap(), [4]);
    assert_eq!(pool.stats().disk.evicted_total, 1);
    assert_eq!(held(&mut pool, &[1, 5]), [true, true]);
}

#[test]
fn a_view_larger_than_memory_goes_down_piece_by_piece() {
    let mut pool = two(1, 8, 1);
    put(&mut pool, 1, 0).unwrap();
    let view = open(&mut pool, tenant(0), &[1], 0);
    for name in 2..6 {
        assert_eq!(put(&mut pool, name, 0).unwrap(), [name - 1]);
        let added = open(&mut pool, tenant(0), &[name], 0);
        pool.append_view(tenant(0), view, added, 0).unwrap();
    }
    assert_eq!(pool.view(tenant(0), view, 0).unwrap().len(), 5);
    assert_eq!((pool.stats().pinned_blocks, pool.stats().disk.blocks), (5, 4));
}

#[test]
fn a_promoted_block_keeps_its_place_and_goes_down_again_without_a_write() {
    let mut pool = two(1, 4, 1);
    put(&mut pool, 1, 0).unwrap();
    put(&mut pool, 2, RETENTION_MS).unwrap();
    assert!(promote(&mut pool, 1, RETENTION_MS).is_none(), "nobody needs it and there is no room");
    open(&mut pool, tenant(0), &[1], 0);
    assert!(promote(&mut pool, 1, RETENTION_MS).is_none(), "block 2 has a lease");
    let later = 3 * RETENTION_MS;
    assert!(matches!(pool.begin_promotion(generation(&pool, 1), later), Promote::MakeRoom));
    let spill = pool.next_spill().unwrap();
    pool.finish_spill(spill, true, later);
    let promotion = promote(&mut pool, 1, later).expect("there is room now");
    let reserved = pool.stats();
    assert_eq!((reserved.used_bytes, reserved.disk.coming), (BLOCK_BYTES, 1));
    pool.finish_promotion(promotion, Some((0..LAYERS).map(page).collect()));
    assert_eq!((pool.stats().disk.copies, pool.stats().disk.promoted_total), (1, 1));
    assert!(place(&pool, 1).is_some());
    assert_eq!(put(&mut pool, 3, later).unwrap(), [0u8; 0], "it goes down at once");
    assert_eq!(pool.stats().disk.spilled_total, 2);
}

#[test]
fn copies_of_blocks_in_memory_lose_their_place_before_any_block_is_lost() {
    let mut pool = two(2, 2, 1);
    for name in 1..=3 {
        put(&mut pool, name, u64::from(name) * RETENTION_MS).unwrap();
    }
    // Room for block 1 to come back: 2 is condemned.
    let second = generation(&pool, 2);
    pool.condemn(second);
    let promotion = promote(&mut pool, 1, 5 * RETENTION_MS).unwrap();
    pool.finish_promotion(promotion, Some((0..LAYERS).map(page).collect()));
    assert_eq!(pool.stats().disk.copies, 1);
    open(&mut pool, tenant(0), &[1], 5 * RETENTION_MS);
    // 3 and 4 take both places: the copy of 1 goes, 1 itself does not.
    put(&mut pool, 4, 6 * RETENTION_MS).unwrap();
    put(&mut pool, 5, 8 * RETENTION_MS).unwrap();
    assert_eq!(held(&mut pool, &[1, 3, 4, 5]), [true; 4]);
    assert_eq!((pool.stats().disk.copies, pool.stats().evicted_total), (0, 0));
}

#[test]
fn a_failed_write_loses_the_block_and_pauses_writing() {
    let mut pool = two(1, 4, 1);
    put(&mut pool, 1, 0).unwrap();
    let writer = pool.open_writer(tenant(0)).unwrap();
    assert_eq!(pool.admit(writer, key(2), 0, RETENTION_MS), Ok(Admission::MakeRoom));
    assert_eq!(pool.admit(writer, key(2), 0, RETENTION_MS), Ok(Admission::MakeRoom), "one move at a time");
    let spill = pool.next_spill().unwrap();
    assert!(pool.next_spill().is_none());
    pool.finish_spill(spill, false, RETENTION_MS);
    assert_eq!(held(&mut pool, &[1]), [false]);
    assert_eq!((pool.stats().disk.spills_failed_total, pool.stats().disk.used_bytes), (1, 0));
    pool.close_writer(writer);
    put(&mut pool, 2, RETENTION_MS).unwrap();
    assert_eq!(put(&mut pool, 3, 2 * RETENTION_MS).unwrap(), [0u8; 0], "writing pauses: 2 is lost");
    assert_eq!((held(&mut pool, &[2]), pool.stats().evicted_total), (vec![false], 2));
    assert_eq!(put(&mut pool, 4, RETENTION_MS + 1_000).unwrap(), [3]);
    assert_eq!(pool.stats().disk.used_bytes, BLOCK_BYTES);
}

#[test]
fn a_failed_write_does_not_take_a_block_from_its_view() {
    let mut pool = two(1, 4, 1);
    put(&mut pool, 1, 0).unwrap();
    let view = open(&mut pool, tenant(0), &[1], 0);
    let writer = pool.open_writer(tenant(0)).unwrap();
    assert_eq!(pool.admit(writer, key(2), 0, 5_000), Ok(Admission::MakeRoom));
    let spill = pool.next_spill().unwrap();
    pool.finish_spill(spill, false, 5_000);
    assert!(matches!(pool.admit(writer, key(2), 0, 5_000), Err(Error::NoSpace { .. })));
    assert!(pool.view(tenant(0), view, 500).unwrap()[0].block.pages().is_some());
}

#[test]
fn a_place_is_not_given_away_under_its_reader() {
    let mut pool = two(1, 1, 1);
    put(&mut pool, 1, 0).unwrap();
    put(&mut pool, 2, RETENTION_MS).unwrap();
    let Payload::Disk(reading) = pool.get(tenant(0), key(1), 0).unwrap().payload() else {
        panic!("it is below")
    };
    let first = generation(&pool, 1);
    pool.condemn(first);
    // Its only place is still read, so 2 cannot be written and makes way for good.
    assert_eq!(put(&mut pool, 3, 5 * RETENTION_MS).unwrap(), [0u8; 0]);
    assert_eq!((held(&mut pool, &[2]), pool.stats().disk.spills_skipped_total), (vec![false], 1));
    drop(reading);
    assert_eq!(put(&mut pool, 4, 10 * RETENTION_MS).unwrap(), [3]);
}

#[test]
fn blocks_condemned_on_their_way_go_when_they_arrive() {
    let mut pool = two(1, 4, 1);
    put(&mut pool, 1, 0).unwrap();
    let writer = pool.open_writer(tenant(0)).unwrap();
    pool.admit(writer, key(2), 0, RETENTION_MS).unwrap();
    let spill = pool.next_spill().unwrap();
    let first = generation(&pool, 1);
    pool.condemn(first);
    assert_eq!((pool.stats().condemned_blocks, pool.stats().used_bytes), (1, BLOCK_BYTES));
    pool.finish_spill(spill, true, RETENTION_MS);
    let stats = pool.stats();
    assert_eq!((stats.condemned_blocks, stats.used_bytes, stats.disk.blocks), (0, 0, 0));
    assert_eq!(pool.stats().disk.used_bytes, 0, "nothing leaks");
}

#[test]
fn the_filter_decides_about_blocks_that_nothing_keeps() {
    let mut pool = two_with(1, 4, 1, AdmissionRule::SecondTouch);
    put(&mut pool, 1, 0).unwrap();
    put(&mut pool, 2, RETENTION_MS).unwrap();
    // Needed again after a while: block 2 was used twice, block 1 once.
    pool.lookup(tenant(0), &[key(2)], 3 * RETENTION_MS);
    assert_eq!(put(&mut pool, 3, 9 * RETENTION_MS).unwrap(), [2]);
    assert_eq!(held(&mut pool, &[1, 2, 3]), [false, true, true]);
    assert_eq!((pool.stats().disk.spills_refused_total, pool.stats().evicted_total), (1, 1));
    open(&mut pool, tenant(0), &[3], 0);
    put(&mut pool, 4, 99 * RETENTION_MS).unwrap();
    assert_eq!(held(&mut pool, &[3]), [true], "a view is not asked");
}

#[test]
fn a_start_takes_in_what_it_found_and_the_younger_of_two() {
    let mut pool = two(2, 3, 1);
    let crcs: Box<[u32]> = [1000, 1001, 1002].into();
    assert!(pool.restore(tenant(0), key(1), 5, crcs.clone(), 2));
    assert!(pool.restore(tenant(0), key(1), 9, crcs.clone(), 0), "the younger one");
    assert!(!pool.restore(tenant(0), key(1), 7, crcs.clone(), 1), "an older one");
    assert!(!pool.restore(tenant(0), key(2), 10, crcs.clone(), 0), "a place that is taken");
    assert!(!pool.restore(tenant(0), key(2), 10, crcs, 3), "beyond the capacity");
    assert!(!pool.restore(tenant(0), key(2), 10, [1].into(), 1), "another number of layers");
    assert_eq!((place(&pool, 1), pool.stats().disk.restored_total), (Some(0), 2));
    let Ok(Put::Sealed(fresh)) = store(&mut pool, tenant(0), 2, 0) else { panic!("there is room") };
    assert!(fresh.number() > 9, "generations go on");
    let promotion = promote(&mut pool, 1, 0).expect("there is room");
    assert!(Arc::ptr_eq(&promotion.block, &pool.get(tenant(0), key(1), 0).unwrap()));
    pool.finish_promotion(promotion, None);
    assert_eq!(held(&mut pool, &[1]), [true], "it stays below");
}
