//! Blocks that something keeps, above a tier that may fail, and what a stop saves.

use super::{
    tiers::{generation, place, put, two, two_by, two_with},
    *,
};
use crate::AdmissionRule;

const LATER: u64 = 3 * RETENTION_MS;

/// Brings a block into memory that lies below, writing out what has to make way.
fn bring_up(pool: &mut BlockPool<u32>, name: u8, now_ms: u64) {
    loop {
        match pool.begin_promotion(generation(pool, name), now_ms) {
            Promote::Read(promotion) => {
                return pool.finish_promotion(promotion, Some((0..LAYERS).map(page).collect()));
            }
            Promote::MakeRoom => {
                let spill = pool.next_spill().expect("there is an order");
                pool.finish_spill(spill, true, now_ms);
            }
            Promote::No => panic!("{name} does not come up"),
        }
    }
}

/// A pool with room for one block in memory, which has block 1: it lies below as well, and a view holds it.
fn copied_and_pinned() -> (BlockPool<u32>, ViewId) {
    let mut pool = two(1, 4, 1);
    put(&mut pool, 1, 0).unwrap();
    put(&mut pool, 2, RETENTION_MS).unwrap();
    let view = open(&mut pool, tenant(0), &[1], 0);
    bring_up(&mut pool, 1, LATER);
    assert!(in_memory(&pool, 1) && place(&pool, 1).is_some());
    (pool, view)
}

fn in_memory(pool: &BlockPool<u32>, name: u8) -> bool {
    pool.held[&generation(pool, name)].block.pages().is_some()
}

fn no_space(outcome: Result<Admission, Error>) -> bool {
    matches!(outcome, Err(Error::NoSpace { .. }))
}

#[test]
fn a_pinned_block_leaves_memory_at_once_for_a_copy_that_nothing_speaks_against() {
    let (mut pool, _) = copied_and_pinned();
    assert_eq!(put(&mut pool, 3, LATER).unwrap(), [0u8; 0]);
    assert!(!in_memory(&pool, 1));
}

#[test]
fn a_pinned_block_does_not_leave_memory_for_a_copy_that_cannot_be_read() {
    let (mut pool, view) = copied_and_pinned();
    let writer = pool.open_writer(tenant(0)).unwrap();
    pool.read_failed(LATER);
    assert!(no_space(pool.admit(writer, key(3), 0, LATER)), "nothing is tried just after a failure");
    // Later it is read first, in vain.
    let again = LATER + 1_000;
    assert_eq!(pool.admit(writer, key(3), 0, again), Ok(Admission::MakeRoom));
    let check = pool.next_spill().unwrap();
    assert!(check.is_check && check.block.key() == key(1));
    pool.finish_spill(check, false, again);
    assert!(in_memory(&pool, 1) && place(&pool, 1).is_none(), "the copy is given up, the block is not");
    assert!(no_space(pool.admit(writer, key(3), 0, again)));
    assert!(pool.view(tenant(0), view, LATER).is_ok());
    assert_eq!((pool.stats().disk.used_bytes, pool.stats().evicted_total), (BLOCK_BYTES, 0));
    // It may be written anew.
    let third = again + 1_000;
    assert_eq!(pool.admit(writer, key(3), 0, third), Ok(Admission::MakeRoom));
    let spill = pool.next_spill().unwrap();
    assert!(!spill.is_check && spill.block.key() == key(1));
    pool.finish_spill(spill, true, third);
    assert_eq!(pool.admit(writer, key(3), 0, third), Ok(Admission::Wanted));
    assert!(pool.view(tenant(0), view, LATER).is_ok());
}

#[test]
fn a_copy_that_was_read_is_enough_while_nothing_is_written() {
    let (mut pool, view) = copied_and_pinned();
    let (writer, spilled) = (pool.open_writer(tenant(0)).unwrap(), pool.stats().disk.spilled_total);
    pool.pause_spills(LATER);
    assert_eq!(pool.admit(writer, key(3), 0, LATER), Ok(Admission::MakeRoom));
    assert!(
        no_space(pool.admit(writer, key(4), 0, LATER)),
        "one move at a time, and nobody waits for a slow disk"
    );
    let check = pool.next_spill().unwrap();
    assert!(check.is_check && pool.next_spill().is_none());
    pool.finish_spill(check, true, LATER);
    assert!(!in_memory(&pool, 1) && place(&pool, 1).is_some());
    assert_eq!(pool.admit(writer, key(3), 0, LATER), Ok(Admission::Wanted));
    assert_eq!(pool.stats().disk.spilled_total, spilled, "nothing was written");
    assert!(pool.view(tenant(0), view, LATER).is_ok());
}

#[test]
fn copies_of_blocks_that_no_view_holds_are_relied_on_first() {
    let mut pool = two(2, 6, 1);
    for (name, now_ms) in [(1, 0), (2, 0), (3, RETENTION_MS), (4, RETENTION_MS)] {
        put(&mut pool, name, now_ms).unwrap();
    }
    open(&mut pool, tenant(0), &[1], 0);
    bring_up(&mut pool, 1, LATER);
    let second = open(&mut pool, tenant(0), &[2], LATER);
    bring_up(&mut pool, 2, LATER);
    pool.close_view(second);
    pool.lookup(tenant(0), &[key(2)], LATER);
    let writer = pool.open_writer(tenant(0)).unwrap();
    pool.pause_spills(LATER);
    assert_eq!(pool.admit(writer, key(5), 0, LATER), Ok(Admission::Wanted));
    assert!(in_memory(&pool, 1) && !in_memory(&pool, 2));
}

#[test]
fn a_block_condemned_while_its_copy_is_read_goes_with_its_view() {
    for was_read in [true, false] {
        let (mut pool, view) = copied_and_pinned();
        let writer = pool.open_writer(tenant(0)).unwrap();
        pool.pause_spills(LATER);
        assert_eq!(pool.admit(writer, key(3), 0, LATER), Ok(Admission::MakeRoom));
        let check = pool.next_spill().unwrap();
        let first = generation(&pool, 1);
        pool.condemn(first);
        pool.finish_spill(check, was_read, LATER);
        pool.close_view(view);
        let stats = pool.stats();
        assert_eq!((stats.condemned_blocks, stats.used_bytes), (0, 0));
        assert_eq!(stats.disk.used_bytes, BLOCK_BYTES, "of block 2");
    }
}

fn names(pool: &BlockPool<u32>) -> Vec<u8> {
    pool.only_in_memory().into_iter().map(|one| pool.held[&one].block.key().0[0]).collect()
}

#[test]
fn a_stop_saves_what_is_in_memory_alone_the_most_useful_first() {
    let mut pool = two(3, 4, 1);
    for name in 1..=3 {
        put(&mut pool, name, 0).unwrap();
    }
    let view = open(&mut pool, tenant(0), &[1], 0);
    pool.lookup(tenant(0), &[key(2)], 0);
    assert_eq!(names(&pool), [1, 2, 3]);
    for one in pool.only_in_memory() {
        let spill = pool.begin_save(one, 0).expect("there is a place");
        assert!(pool.begin_save(one, 0).is_none(), "it is on its way");
        pool.finish_spill(spill, true, 0);
    }
    assert_eq!(names(&pool), [0u8; 0]);
    let stats = pool.stats();
    assert_eq!((stats.used_bytes, stats.disk.blocks, stats.pinned_blocks), (0, 3, 1));
    assert_eq!(pool.view(tenant(0), view, 0).unwrap().len(), 1);
    pool.close_view(view);
    assert_eq!(held(&mut pool, &[1, 2, 3]), [true; 3]);
}

#[test]
fn a_stop_takes_no_place_of_a_block_that_is_in_memory_too() {
    let mut pool = two(2, 1, 1);
    put(&mut pool, 1, 0).unwrap();
    put(&mut pool, 2, RETENTION_MS).unwrap();
    put(&mut pool, 3, 2 * RETENTION_MS).unwrap();
    let second = generation(&pool, 2);
    pool.condemn(second);
    bring_up(&mut pool, 1, LATER);
    assert_eq!(names(&pool), [3]);
    let third = generation(&pool, 3);
    assert!(pool.begin_save(third, 10 * RETENTION_MS).is_none());
    assert!(place(&pool, 1).is_some() && in_memory(&pool, 3));
    assert_eq!(pool.stats().disk.spills_skipped_total, 1);
}

#[test]
fn a_stop_writes_no_more_than_the_filter_wants_but_all_that_is_kept() {
    let mut pool = two_with(2, 4, 1, AdmissionRule::SecondTouch);
    put(&mut pool, 1, 0).unwrap();
    put(&mut pool, 2, 0).unwrap();
    open(&mut pool, tenant(0), &[1], 0);
    let later = 10 * RETENTION_MS;
    let written: Vec<bool> =
        pool.only_in_memory().into_iter().map(|one| pool.begin_save(one, later).is_some()).collect();
    assert_eq!(written, [true, false]);
    assert_eq!(pool.stats().disk.spills_refused_total, 1);
    pool.pause_spills(later);
    let second = generation(&pool, 2);
    assert!(pool.begin_save(second, 0).is_none(), "nothing is written");
}

/// Saves what is in memory alone, as a stop does; the names of the blocks that are on the tier below afterwards.
fn saved(pool: &mut BlockPool<u32>, names: &[u8], now_ms: u64) -> Vec<u8> {
    for one in pool.only_in_memory() {
        if let Some(spill) = pool.begin_save(one, now_ms) {
            pool.finish_spill(spill, true, now_ms);
        }
    }
    names
        .iter()
        .copied()
        .filter(|name| held(pool, &[*name]) == [true] && place(pool, *name).is_some())
        .collect()
}

#[test]
fn a_stop_writes_nothing_over_what_it_saved_before() {
    for policy in Eviction::ALL {
        let mut pool = two_by(4, 2, 1, policy);
        let names = [1, 2, 3, 4];
        for name in names {
            put(&mut pool, name, 0).unwrap();
        }
        let later = 10 * RETENTION_MS;
        assert_eq!(saved(&mut pool, &names, later), [3, 4], "{policy:?}: those that were stored last");
        let disk = pool.stats().disk;
        assert_eq!(
            (disk.spilled_total, disk.evicted_total, disk.spills_skipped_total),
            (2, 0, 2),
            "{policy:?}"
        );
    }
}

/// Saves go by last use, policies by more than that: what they name first may be what was just saved.
#[test]
fn a_stop_looks_behind_what_it_saved_before() {
    for policy in Eviction::ALL {
        let mut pool = two_by(2, 2, 1, policy);
        // Blocks that were used twice come back more often, which `reuse` learns.
        let again = UsedAgain { uses: 2, idle: 100, was_evicted: true };
        (0..1_000).for_each(|_| pool.disk.as_mut().unwrap().policy.used_again(again));
        // 1 and 2 are used twice, 3 once and last; 1 goes below.
        put(&mut pool, 1, 0).unwrap();
        put(&mut pool, 2, 10 * RETENTION_MS).unwrap();
        pool.touch_all(tenant(0), &[key(1)], 20 * RETENTION_MS);
        pool.touch_all(tenant(0), &[key(2)], 30 * RETENTION_MS);
        assert_eq!(put(&mut pool, 3, 40 * RETENTION_MS).unwrap(), [1], "{policy:?}");
        assert_eq!(names(&pool), [3, 2], "{policy:?}");
        assert_eq!(saved(&mut pool, &[1, 2, 3], 100 * RETENTION_MS), [2, 3], "{policy:?}");
        let disk = pool.stats().disk;
        assert_eq!((disk.evicted_total, disk.spills_skipped_total), (1, 0), "{policy:?}");
    }
}

#[test]
fn a_stop_drives_out_what_is_colder_and_nothing_else() {
    // 1 and 2 go below, 3 and 4 stay.
    let mut pool = two_by(2, 2, 1, Eviction::Lru);
    for name in 1..=4 {
        put(&mut pool, name, u64::from(name) * 10 * RETENTION_MS).unwrap();
    }
    let later = 100 * RETENTION_MS;
    assert!(place(&pool, 1).is_some() && place(&pool, 2).is_some());
    // 2 is used after 3 and before 4.
    held(&mut pool, &[3]);
    held(&mut pool, &[2]);
    held(&mut pool, &[4]);
    let much_later = later + 10 * RETENTION_MS;
    assert_eq!(saved(&mut pool, &[1, 2, 3, 4], much_later), [2, 4]);
}

#[test]
fn a_stop_saves_what_is_kept_before_all_else() {
    let mut pool = two_by(2, 1, 1, Eviction::Lru);
    for name in 1..=3 {
        put(&mut pool, name, u64::from(name) * 10 * RETENTION_MS).unwrap();
    }
    open(&mut pool, tenant(0), &[2], 0);
    // Later than anything, and nothing keeps it.
    held(&mut pool, &[1]);
    assert_eq!(saved(&mut pool, &[1, 2, 3], 100 * RETENTION_MS), [2]);
}
