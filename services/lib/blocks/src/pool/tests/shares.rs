//! One tenant that takes all it can, and what is left for another one.

use super::*;
use crate::{AdmissionFilter, AdmissionRule};

const GREEDY: u8 = 1;
const MODEST: u8 = 2;

fn shared(blocks: u64) -> BlockPool<u32> {
    let limits =
        PoolConfig { tenant_percent: 75, views_max: 16, writers_max: 16, readers_max: 16, ..config(blocks) };
    BlockPool::new(limits).expect("the configuration is valid")
}

fn is_share(error: &Error, of: &str) -> bool {
    matches!(error, Error::Share { what, .. } if *what == of) && error.retryable()
}

#[test]
fn pinned_blocks_of_one_leave_room_for_another() {
    let mut pool = shared(8);
    for name in 1..=8 {
        store(&mut pool, tenant(GREEDY), name, 0).unwrap();
    }
    let mut pinned = 0;
    for name in 1..=8 {
        match pool.open_view(tenant(GREEDY), &[(0, key(name))], 1000, 0) {
            Ok(Opened::Open(_)) => pinned += 1,
            other => assert!(is_share(&other.unwrap_err(), "blocks in views and put streams")),
        }
    }
    assert_eq!(pinned, 6, "75 % of 8");
    // Its views go on, and a view of what it pins already takes nothing more.
    let whole: Vec<_> = (1..=6).map(|name| (u64::from(name), key(name))).collect();
    assert!(matches!(pool.open_view(tenant(GREEDY), &whole, 1000, 0), Ok(Opened::Open(_))));
    // The other two blocks were promised for a while; they make way for somebody who keeps less.
    assert!(matches!(store(&mut pool, tenant(MODEST), 1, 1), Ok(Put::Sealed(_))));
    open(&mut pool, tenant(MODEST), &[1], 1);
    assert_eq!(pool.stats().broken_promises_total, 1);
    assert!(store(&mut pool, tenant(GREEDY), 20, 1).is_err(), "its own promises hold against itself");
}

#[test]
fn a_view_of_more_than_ones_part_is_refused_whole() {
    let mut pool = shared(8);
    for name in 1..=8 {
        store(&mut pool, tenant(GREEDY), name, 0).unwrap();
    }
    let all: Vec<_> = (1..=8).map(|name| (u64::from(name), key(name))).collect();
    let refused = pool.open_view(tenant(GREEDY), &all, 1000, 0).unwrap_err();
    assert!(is_share(&refused, "blocks in views and put streams"), "{refused}");
    let stats = pool.stats();
    assert_eq!((stats.views, stats.pinned_blocks), (0, 0));
    assert_eq!(stats.shares[Resource::KeptBlocks as usize].refused_total, 1);
}

#[test]
fn incomplete_blocks_of_one_leave_room_for_another() {
    let mut pool = shared(8);
    let writer = pool.open_writer(tenant(GREEDY)).unwrap();
    let begun = (1..=8).filter(|name| pool.put(writer, key(*name), 0, page(0), 0).is_ok()).count();
    assert_eq!((begun, pool.stats().open_blocks), (6, 6));
    assert!(is_share(&pool.put(writer, key(20), 0, page(0), 0).unwrap_err(), "incomplete blocks"));
    // One after the other, so that the promises of its own blocks run out meanwhile.
    for name in 1..=3 {
        let put = store(&mut pool, tenant(MODEST), name, 2 * RETENTION_MS * u64::from(name));
        assert!(matches!(put, Ok(Put::Sealed(_))), "{name}: {put:?}");
    }
    // What it began it may finish.
    for layer in 1..LAYERS {
        pool.put(writer, key(1), layer, page(layer), 900).unwrap();
    }
    assert_eq!(pool.lookup(tenant(GREEDY), &[key(1)], 900), [true]);
}

#[test]
fn views_and_streams_of_one_leave_some_for_another() {
    let mut pool = shared(4);
    store(&mut pool, tenant(GREEDY), 1, 0).unwrap();
    let opened = |pool: &mut BlockPool<u32>, salt| pool.open_view(tenant(salt), &[], 1000, 0).is_ok();
    assert_eq!((0..20).filter(|_| opened(&mut pool, GREEDY)).count(), 12);
    assert!(opened(&mut pool, MODEST) && opened(&mut pool, MODEST));
    let writers = (0..20).filter(|_| pool.open_writer(tenant(GREEDY)).is_ok()).count();
    let readers = (0..20).filter(|_| pool.open_stream(tenant(GREEDY), Resource::Readers).is_ok()).count();
    assert_eq!((writers, readers), (12, 12));
    assert!(
        pool.open_writer(tenant(MODEST)).is_ok()
            && pool.open_stream(tenant(MODEST), Resource::Readers).is_ok()
    );
    let stats = pool.stats();
    assert_eq!(stats.tenants, 2);
    for (resource, refused) in [(Resource::Views, 8), (Resource::Writers, 8), (Resource::Readers, 8)] {
        assert_eq!(stats.shares[resource as usize].refused_total, refused, "{resource:?}");
    }
    (0..12).for_each(|_| pool.close_stream(tenant(GREEDY), Resource::Readers));
    assert!(pool.open_stream(tenant(GREEDY), Resource::Readers).is_ok());
}

#[test]
fn who_has_as_many_views_as_it_may_can_append_to_them() {
    let mut pool = shared(4);
    for name in 1..=3 {
        store(&mut pool, tenant(GREEDY), name, 0).unwrap();
    }
    let view = open(&mut pool, tenant(GREEDY), &[1], 0);
    while pool.open_view(tenant(GREEDY), &[], 1000, 0).is_ok() {}
    let more = |pool: &mut BlockPool<u32>, into, name| {
        pool.open_addition(tenant(GREEDY), into, &[(u64::from(name), key(name))], 1000, 0)
    };
    for name in 2..=3 {
        let Ok(Opened::Open(added)) = more(&mut pool, view, name) else { panic!("{name} is held") };
        assert_eq!(pool.append_view(tenant(GREEDY), view, added, 0), Ok(()));
    }
    let stats = pool.stats();
    assert_eq!((stats.views, stats.pinned_blocks), (12, 3));
    assert_eq!(stats.shares[Resource::Views as usize].taken, 12);
    // Only to what is there, and not without end.
    assert!(matches!(more(&mut pool, ViewId(5), 2), Err(Error::NotFound { .. })));
    assert!(matches!(more(&mut pool, view, 9), Ok(Opened::Missing(_))));
    let begun = (0..40).filter(|_| matches!(more(&mut pool, view, 2), Ok(Opened::Open(_)))).count();
    assert_eq!(begun, 12, "as many as it may have views");
    let Ok(Opened::Open(own)) = pool.open_view(tenant(MODEST), &[], 1000, 0) else {
        panic!("its share is free")
    };
    let addition = pool.open_addition(tenant(MODEST), own, &[], 1000, 0);
    assert!(matches!(addition, Ok(Opened::Open(_))), "others append: {addition:?}");
    assert_eq!(pool.expire(1000), 12 + 12 + 2);
    assert_eq!((pool.stats().pinned_blocks, pool.stats().tenants), (0, 0));
}

/// Two blocks in memory that were promised, of which the first lies below as well, where nothing is written now.
fn copied_below() -> BlockPool<u32> {
    let limits = PoolConfig { tenant_percent: 75, ..config(2) };
    let disk = DiskConfig { blocks: 2, moves_max: 1, pause_ms: 1_000_000 };
    let filter = AdmissionFilter::new(AdmissionRule::All, 8, 7);
    let pool = BlockPool::with_policy(limits, Box::new(Lru::default())).unwrap();
    let (mut pool, now_ms) = (pool.with_disk(disk, Box::new(Lru::default()), filter), RETENTION_MS);
    for name in 1..=2 {
        store(&mut pool, tenant(GREEDY), name, 0).unwrap();
    }
    let writer = pool.open_writer(tenant(GREEDY)).unwrap();
    assert!(matches!(pool.admit(writer, key(3), 0, now_ms), Ok(Admission::MakeRoom)));
    let spill = pool.next_spill().unwrap();
    pool.finish_spill(spill, true, now_ms);
    pool.close_writer(writer);
    let below = pool.index[&(tenant(GREEDY), key(1))];
    let Promote::Read(promotion) = pool.begin_promotion(below, now_ms) else { panic!("there is room") };
    pool.finish_promotion(promotion, Some((0..LAYERS).map(page).collect()));
    pool.pause_spills(now_ms);
    assert_eq!((pool.stats().disk.copies, pool.stats().used_bytes), (1, 2 * BLOCK_BYTES));
    pool
}

#[test]
fn a_block_that_lies_below_as_well_makes_way_before_a_promise_is_broken() {
    let (mut pool, now_ms) = (copied_below(), RETENTION_MS);
    // The promise of the other one ends first.
    pool.lookup(tenant(GREEDY), &[key(2)], now_ms);
    pool.lookup(tenant(GREEDY), &[key(1)], now_ms + 10);
    assert!(matches!(store(&mut pool, tenant(MODEST), 1, now_ms + 20), Ok(Put::Sealed(_))));
    assert_eq!(pool.lookup(tenant(GREEDY), &[key(1), key(2)], now_ms + 20), [true, true]);
    assert_eq!((pool.stats().broken_promises_total, pool.stats().disk.blocks), (0, 1));
}

#[test]
fn breaking_a_promise_leaves_what_lies_below() {
    let (mut pool, now_ms) = (copied_below(), RETENTION_MS);
    pool.lookup(tenant(GREEDY), &[key(1)], now_ms);
    pool.lookup(tenant(GREEDY), &[key(2)], now_ms + 10);
    assert!(pool.break_promise(tenant(MODEST)));
    assert_eq!(pool.peek(tenant(GREEDY), &[key(1), key(2)]), [true, true]);
    let stats = pool.stats();
    assert_eq!((stats.used_bytes, stats.disk.blocks, stats.broken_promises_total), (BLOCK_BYTES, 1, 0));
    assert!(pool.get(tenant(GREEDY), key(1), now_ms).unwrap().pages().is_none(), "it is below only");
}

#[test]
fn promises_go_to_whoever_keeps_less_and_never_the_other_way() {
    let mut pool = shared(4);
    for name in 1..=4 {
        store(&mut pool, tenant(GREEDY), name, 0).unwrap();
    }
    for name in 1..=2 {
        assert!(matches!(store(&mut pool, tenant(MODEST), name, 1), Ok(Put::Sealed(_))), "{name}");
    }
    // Two each: nobody keeps more than the other would.
    assert!(store(&mut pool, tenant(MODEST), 3, 1).is_err());
    assert!(store(&mut pool, tenant(GREEDY), 9, 1).is_err());
    assert_eq!(pool.lookup(tenant(GREEDY), &[1, 2, 3, 4].map(key), 1), [false, false, true, true]);
    assert_eq!(pool.stats().broken_promises_total, 2);
}

#[test]
fn a_writer_stalls_when_it_brings_nothing_that_is_missing() {
    let mut pool = shared(4);
    let writer = pool.open_writer(tenant(0)).unwrap();
    assert_eq!(pool.patience_left_ms(writer, 100, 5), None, "it began nothing");
    pool.put(writer, key(1), 0, page(0), 10).unwrap();
    assert_eq!(pool.patience_left_ms(writer, 100, 10), Some(100));
    pool.put(writer, key(1), 0, page(0), 60).unwrap();
    assert_eq!(pool.patience_left_ms(writer, 100, 60), Some(50), "the same tile again is no progress");
    pool.put(writer, key(1), 1, page(1), 70).unwrap();
    assert_eq!(pool.patience_left_ms(writer, 100, 170), Some(0));
    pool.put(writer, key(1), 2, page(2), 170).unwrap();
    assert_eq!(pool.patience_left_ms(writer, 100, 999), None, "nothing is incomplete");
    pool.close_writer(writer);
    assert_eq!(pool.patience_left_ms(writer, 100, 999), None);
}

#[test]
fn a_borrowed_view_keeps_its_blocks_counted_after_it_was_closed() {
    let mut pool = shared(4);
    for name in 1..=3 {
        store(&mut pool, tenant(GREEDY), name, 0).unwrap();
    }
    let (closed, expired) =
        (open(&mut pool, tenant(GREEDY), &[1, 2], 0), open(&mut pool, tenant(GREEDY), &[3], 0));
    let blocks = pool.borrow_view(tenant(GREEDY), closed, 0).unwrap();
    pool.borrow_view(tenant(GREEDY), closed, 0).unwrap();
    pool.borrow_view(tenant(GREEDY), expired, 0).unwrap();
    pool.close_view(closed);
    pool.expire(u64::MAX);
    assert_eq!(
        pool.view(tenant(GREEDY), closed, 0).unwrap_err(),
        Error::NotFound { what: format!("view `{}`", closed.0) }
    );
    let taken = |pool: &BlockPool<u32>, of| pool.stats().shares[of as usize].taken;
    let all = |pool: &BlockPool<u32>| {
        (taken(pool, Resource::Views), taken(pool, Resource::ViewedBlocks), pool.stats().pinned_blocks)
    };
    assert_eq!((all(&pool), pool.stats().views, pool.stats().closed_views), ((2, 3, 3), 0, 2));
    // Whatever wants room meanwhile, their bytes are not free.
    for name in 10..14 {
        let _full_but_for_one = store(&mut pool, tenant(MODEST), name, 9 * RETENTION_MS);
        assert!(blocks.iter().all(|entry| pool.tier_of(entry.block.generation()).is_some()));
    }
    pool.return_view(closed);
    assert_eq!(all(&pool), (2, 3, 3), "one of two readers is left");
    pool.return_view(closed);
    assert_eq!(pool.stats().closed_views, 1);
    pool.return_view(expired);
    assert_eq!((all(&pool), pool.stats().closed_views), ((0, 0, 0), 0));
}

#[test]
fn views_of_one_have_a_part_of_all_blocks_that_views_may_have() {
    let mut pool = shared(4);
    for name in 1..=2 {
        store(&mut pool, tenant(GREEDY), name, 0).unwrap();
        store(&mut pool, tenant(MODEST), name, 0).unwrap();
    }
    // The same block again and again, one index after the other: it is pinned already and takes nothing else.
    let view = open(&mut pool, tenant(GREEDY), &[1], 0);
    let append = |pool: &mut BlockPool<u32>, index| match pool.open_addition(
        tenant(GREEDY),
        view,
        &[(index, key(1))],
        1000,
        0,
    )? {
        Opened::Open(added) => pool.append_view(tenant(GREEDY), view, added, 0),
        Opened::Missing(_) => panic!("it is held"),
    };
    let refused = (2..).find_map(|index| append(&mut pool, index).err()).unwrap();
    assert!(is_share(&refused, "blocks of views"), "{refused}");
    let taken = pool.stats().shares[Resource::ViewedBlocks as usize].taken;
    assert!((40..=48).contains(&taken), "{taken} of 64");
    open(&mut pool, tenant(MODEST), &[1, 2], 0);
    pool.close_view(view);
    assert_eq!(pool.stats().shares[Resource::ViewedBlocks as usize].taken, 2);
    let twice =
        pool.open_view(tenant(MODEST), &[(0, key(1)), (7, key(2)), (9, key(1))], 1000, 0).unwrap_err();
    assert!(
        matches!(&twice, Error::Invalid { field: "keys", problem } if problem.contains(&key(1).to_string())),
        "{twice}"
    );
}

#[test]
fn blocks_that_are_read_go_from_the_tail_to_the_head_afterwards() {
    let mut pool = BlockPool::with_policy(config(3), Box::new(Lru::default())).unwrap();
    for name in 1..=3 {
        store(&mut pool, tenant(0), name, 0).unwrap();
    }
    pool.touch_all(tenant(0), &[key(1), key(2), key(9), key(3)], 10);
    for (round, gone) in [3, 2].into_iter().enumerate() {
        store(&mut pool, tenant(0), 10 + round as u8, 10 + RETENTION_MS).unwrap();
        assert_eq!(pool.peek(tenant(0), &[key(gone)]), [false], "{gone}");
    }
    assert_eq!(pool.peek(tenant(0), &[key(1)]), [true]);
    assert_eq!((pool.stats().hits_total, pool.stats().misses_total), (0, 0), "reads are no lookups");
}

#[test]
fn a_lease_may_become_shorter_when_it_is_renewed() {
    let mut pool = shared(4);
    let Ok(Opened::Open(view)) = pool.open_view(tenant(0), &[], 1_000_000, 0) else {
        panic!("an empty view opens")
    };
    pool.renew_view(tenant(0), view, 100, 50).unwrap();
    assert_eq!((pool.expire(149), pool.expire(150)), (0, 1));
    assert!(matches!(pool.renew_view(tenant(0), view, 100, 150), Err(Error::NotFound { .. })));
}
