//! The pool by hand-written stories; `schedule` drives it at random.

mod kept;
mod notes;
mod schedule;
mod shares;
mod tiers;

use super::*;
use crate::{Deployment, EXACT_PREFILL};

const LAYERS: u32 = 3;
const TILE_BYTES: u64 = 10;
const BLOCK_BYTES: u64 = TILE_BYTES * LAYERS as u64;
const RETENTION_MS: u64 = 100;

fn config(blocks: u64) -> PoolConfig {
    PoolConfig {
        budget_bytes: blocks * BLOCK_BYTES,
        tile_bytes: TILE_BYTES,
        layers: LAYERS,
        retention_ms: RETENTION_MS,
        writers_max: 8,
        readers_max: 8,
        tenant_percent: 100,
        views_max: 8,
        view_blocks_max: 64,
        view_secret: [7; 32],
    }
}

fn pool(blocks: u64) -> BlockPool<u32> {
    BlockPool::new(config(blocks)).expect("the configuration is valid")
}

fn tenant(salt: u8) -> Namespace {
    Deployment::from_bytes([1; 32]).namespace(EXACT_PREFILL, &[salt])
}

fn key(name: u8) -> BlockKey {
    BlockKey([name; 16])
}

fn page(layer: u32) -> Page<u32> {
    Page { payload: layer, crc32c: 1000 + layer }
}

/// Writes a whole block with a writer of its own.
fn store(pool: &mut BlockPool<u32>, namespace: Namespace, name: u8, now_ms: u64) -> Result<Put, Error> {
    let writer = pool.open_writer(namespace)?;
    let mut last = Ok(Put::Open);
    for layer in 0..LAYERS {
        last = pool.put(writer, key(name), layer, page(layer), now_ms);
    }
    pool.close_writer(writer);
    last
}

fn open(pool: &mut BlockPool<u32>, namespace: Namespace, names: &[u8], now_ms: u64) -> ViewId {
    let blocks: Vec<_> = names.iter().map(|name| (u64::from(*name), key(*name))).collect();
    match pool.open_view(namespace, &blocks, 1000, now_ms) {
        Ok(Opened::Open(id)) => id,
        other => panic!("view of {names:?}: {other:?}"),
    }
}

fn held(pool: &mut BlockPool<u32>, names: &[u8]) -> Vec<bool> {
    let keys: Vec<_> = names.iter().map(|name| key(*name)).collect();
    pool.lookup(tenant(0), &keys, 0)
}

#[test]
fn a_block_is_found_once_all_layers_came_in_any_order() {
    let mut pool = pool(2);
    let writer = pool.open_writer(tenant(0)).unwrap();
    for layer in [2, 0] {
        assert_eq!(pool.put(writer, key(1), layer, page(layer), 0), Ok(Put::Open));
        assert_eq!(pool.lookup(tenant(0), &[key(1)], 0), [false]);
    }
    assert_eq!(pool.stats().used_bytes, BLOCK_BYTES, "an open block occupies all of its pages");
    assert!(matches!(pool.put(writer, key(1), 1, page(1), 0), Ok(Put::Sealed(_))));
    assert_eq!(pool.lookup(tenant(0), &[key(1), key(2)], 0), [true, false]);
    let block = pool.get(tenant(0), key(1), 0).unwrap();
    assert_eq!(block.pages().unwrap().iter().map(|page| page.payload).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!((pool.stats().stored_total, pool.stats().open_blocks), (1, 0));
}

#[test]
fn tenants_do_not_find_each_others_blocks() {
    let mut pool = pool(4);
    store(&mut pool, tenant(0), 1, 0).unwrap();
    assert_eq!(pool.lookup(tenant(1), &[key(1)], 0), [false]);
    assert!(pool.get(tenant(1), key(1), 0).is_none());
    assert_eq!(pool.open_view(tenant(1), &[(0, key(1))], 1000, 0), Ok(Opened::Missing(vec![key(1)])));
    assert!(
        matches!(store(&mut pool, tenant(1), 1, 0), Ok(Put::Sealed(_))),
        "not told as a duplicate either"
    );
}

#[test]
fn the_first_writer_to_complete_wins_and_frees_the_others_pages() {
    let mut pool = pool(4);
    let (slow, fast) = (pool.open_writer(tenant(0)).unwrap(), pool.open_writer(tenant(0)).unwrap());
    pool.put(slow, key(1), 0, page(0), 0).unwrap();
    for layer in 0..LAYERS {
        pool.put(fast, key(1), layer, page(layer), 0).unwrap();
    }
    assert_eq!(pool.stats().used_bytes, BLOCK_BYTES);
    assert_eq!(pool.admit(slow, key(1), 1, 0), Ok(Admission::Duplicate));
    assert_eq!(pool.put(fast, key(1), 0, page(0), 0), Ok(Put::Duplicate));
    assert_eq!(pool.stats().duplicate_total, 2);
}

#[test]
fn a_superseded_writer_hears_duplicate_even_after_the_eviction() {
    let mut pool = pool(2);
    let (slow, fast) = (pool.open_writer(tenant(0)).unwrap(), pool.open_writer(tenant(0)).unwrap());
    pool.put(slow, key(1), 0, page(0), 0).unwrap();
    for layer in 0..LAYERS {
        pool.put(fast, key(1), layer, page(layer), 0).unwrap();
    }
    store(&mut pool, tenant(0), 2, RETENTION_MS).unwrap();
    store(&mut pool, tenant(0), 3, RETENTION_MS).unwrap();
    assert_eq!(held(&mut pool, &[1, 2, 3]), [false, true, true]);
    assert_eq!(pool.put(slow, key(1), 1, page(1), RETENTION_MS), Ok(Put::Duplicate));
}

#[test]
fn repeated_layers_are_told_with_the_first_checksum() {
    let mut pool = pool(1);
    let writer = pool.open_writer(tenant(0)).unwrap();
    pool.put(writer, key(1), 0, page(0), 0).unwrap();
    assert_eq!(pool.admit(writer, key(1), 0, 0), Ok(Admission::Repeated { crc32c: 1000 }));
    assert_eq!(pool.put(writer, key(1), 0, page(9), 0), Ok(Put::Repeated { crc32c: 1000 }));
}

#[test]
fn a_writer_that_ends_leaves_nothing_open() {
    let mut pool = pool(2);
    let writer = pool.open_writer(tenant(0)).unwrap();
    pool.put(writer, key(1), 0, page(0), 0).unwrap();
    pool.put(writer, key(2), 0, page(0), 0).unwrap();
    pool.discard(writer, key(1));
    assert_eq!(pool.stats().used_bytes, BLOCK_BYTES);
    pool.close_writer(writer);
    assert_eq!((pool.stats().used_bytes, pool.stats().dropped_total), (0, 2));
    let gone = pool.put(writer, key(1), 0, page(0), 0);
    assert!(matches!(gone, Err(Error::NotFound { .. })), "{gone:?}");
}

#[test]
fn refuses_layers_and_configurations_that_cannot_be() {
    let mut pool = pool(1);
    let writer = pool.open_writer(tenant(0)).unwrap();
    let beyond = pool.admit(writer, key(1), LAYERS, 0).unwrap_err();
    assert_eq!(beyond.to_string(), "`layer` is 3, blocks have 3 layers");
    for broken in [
        PoolConfig { tile_bytes: 0, ..config(1) },
        PoolConfig { layers: 0, ..config(1) },
        PoolConfig { tenant_percent: 0, ..config(1) },
        PoolConfig { tenant_percent: 101, ..config(1) },
        PoolConfig { budget_bytes: BLOCK_BYTES - 1, ..config(1) },
        PoolConfig { tile_bytes: u64::MAX, ..config(1) },
    ] {
        assert!(matches!(BlockPool::<u32>::new(broken), Err(Error::Invalid { .. })), "{broken:?}");
    }
}

#[test]
fn the_least_recently_used_block_goes_first_and_only_after_its_lease() {
    let mut pool = pool(2);
    store(&mut pool, tenant(0), 1, 0).unwrap();
    store(&mut pool, tenant(0), 2, 10).unwrap();
    let early = store(&mut pool, tenant(0), 3, RETENTION_MS - 1);
    assert!(matches!(early, Err(Error::NoSpace { .. })), "{early:?}");
    assert!(early.unwrap_err().retryable());
    store(&mut pool, tenant(0), 3, RETENTION_MS).unwrap();
    assert_eq!(held(&mut pool, &[1, 2, 3]), [false, true, true]);
    assert_eq!((pool.stats().evicted_total, pool.stats().no_space_total), (1, u64::from(LAYERS)));
}

#[test]
fn a_hit_renews_the_lease_and_keeps_the_head_of_a_prefix_longest() {
    let mut pool = pool(3);
    for name in 1..=3 {
        store(&mut pool, tenant(0), name, 0).unwrap();
    }
    pool.lookup(tenant(0), &[key(1), key(2), key(3)], 50);
    assert!(store(&mut pool, tenant(0), 4, RETENTION_MS + 49).is_err(), "promised until 150");
    store(&mut pool, tenant(0), 4, RETENTION_MS + 50).unwrap();
    assert_eq!(held(&mut pool, &[1, 2, 3]), [true, true, false]);
}

#[test]
fn pinned_blocks_stay_until_their_last_view_closes() {
    let mut pool = pool(1);
    store(&mut pool, tenant(0), 1, 0).unwrap();
    let (first, second) = (open(&mut pool, tenant(0), &[1], 0), open(&mut pool, tenant(0), &[1], 0));
    assert_eq!((pool.stats().pinned_blocks, pool.stats().views), (1, 2));
    for view in [first, second] {
        assert!(store(&mut pool, tenant(0), 2, 10 * RETENTION_MS).is_err());
        pool.close_view(view);
        pool.close_view(view);
    }
    store(&mut pool, tenant(0), 2, 10 * RETENTION_MS).unwrap();
    assert_eq!(held(&mut pool, &[1, 2]), [false, true]);
}

#[test]
fn views_open_whole_or_not_at_all() {
    let mut pool = pool(3);
    store(&mut pool, tenant(0), 1, 0).unwrap();
    let blocks = [(0, key(1)), (1, key(8)), (2, key(9))];
    assert_eq!(pool.open_view(tenant(0), &blocks, 1000, 0), Ok(Opened::Missing(vec![key(8), key(9)])));
    assert_eq!((pool.stats().views, pool.stats().pinned_blocks), (0, 0));
    let twice = pool.open_view(tenant(0), &[(1, key(1)), (1, key(1))], 1000, 0);
    assert!(matches!(twice, Err(Error::Invalid { field: "block_indices", .. })), "{twice:?}");
}

#[test]
fn a_view_answers_to_its_own_namespace_only() {
    let mut pool = pool(1);
    store(&mut pool, tenant(0), 1, 0).unwrap();
    let view = open(&mut pool, tenant(0), &[1], 0);
    assert!(pool.view(tenant(0), view, 0).is_ok());
    let other = pool.view(tenant(1), view, 0).unwrap_err();
    let never = pool.view(tenant(1), ViewId(view.0 ^ 1), 0).unwrap_err();
    assert!(matches!((&other, &never), (Error::NotFound { .. }, Error::NotFound { .. })));
}

#[test]
fn view_ids_do_not_repeat_in_another_incarnation() {
    let ids = |secret| {
        let mut pool = BlockPool::<u32>::new(PoolConfig { view_secret: [secret; 32], ..config(1) }).unwrap();
        (0..8).map(|_| open(&mut pool, tenant(0), &[], 0).0).collect::<Vec<_>>()
    };
    let (first, second) = (ids(1), ids(2));
    assert!(first.iter().all(|id| !second.contains(id) && *id != 0));
    assert_ne!(first[0] + 1, first[1], "not a sequence");
}

#[test]
fn appending_moves_the_blocks_and_may_be_repeated() {
    let mut pool = pool(4);
    for name in 1..=4 {
        store(&mut pool, tenant(0), name, 0).unwrap();
    }
    let view = open(&mut pool, tenant(0), &[1, 2], 0);
    for more in [&[3][..], &[2, 3], &[3, 4]] {
        let added = open(&mut pool, tenant(0), more, 0);
        assert_eq!(pool.append_view(tenant(0), view, added, 0), Ok(()));
        assert!(pool.view(tenant(0), added, 0).is_err(), "what was appended is closed");
    }
    let blocks = pool.view(tenant(0), view, 0).unwrap();
    assert_eq!(blocks.iter().map(|entry| entry.index).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert_eq!((pool.stats().views, pool.stats().pinned_blocks), (1, 4));
    pool.close_view(view);
    assert_eq!(pool.stats().pinned_blocks, 0);
}

#[test]
fn appending_refuses_another_block_in_the_place_of_an_old_one() {
    let mut pool = pool(4);
    for name in 1..=4 {
        store(&mut pool, tenant(0), name, 0).unwrap();
    }
    let view = open(&mut pool, tenant(0), &[1, 3], 0);
    let hole = open(&mut pool, tenant(0), &[2], 0);
    let Ok(Opened::Open(other)) = pool.open_view(tenant(0), &[(3, key(4))], 1000, 0) else { panic!("held") };
    for added in [hole, other] {
        let refused = pool.append_view(tenant(0), view, added, 0);
        assert!(matches!(refused, Err(Error::Invalid { field: "block_indices", .. })), "{refused:?}");
    }
    assert!(matches!(pool.append_view(tenant(0), ViewId(5), view, 0), Err(Error::NotFound { .. })));
    assert_eq!((pool.stats().views, pool.stats().pinned_blocks), (0, 0), "sources are closed in any case");
}

#[test]
fn views_expire_by_their_last_use() {
    let mut pool = pool(2);
    store(&mut pool, tenant(0), 1, 0).unwrap();
    let (used, idle) = (open(&mut pool, tenant(0), &[1], 0), open(&mut pool, tenant(0), &[1], 0));
    pool.view(tenant(0), used, 500).unwrap();
    assert_eq!(pool.expire(999), 0);
    assert_eq!(pool.expire(1000), 1);
    assert!(pool.view(tenant(0), idle, 1000).is_err());
    assert_eq!(pool.stats().pinned_blocks, 1);
    assert_eq!(pool.expire(1500), 1);
    assert_eq!((pool.stats().pinned_blocks, pool.stats().expired_views_total), (0, 2));
}

#[test]
fn appending_nothing_renews_a_lease() {
    let mut pool = pool(2);
    store(&mut pool, tenant(0), 1, 0).unwrap();
    let (kept, idle) = (open(&mut pool, tenant(0), &[1], 0), open(&mut pool, tenant(0), &[1], 0));
    let nothing = open(&mut pool, tenant(0), &[], 900);
    pool.append_view(tenant(0), kept, nothing, 900).unwrap();
    assert_eq!(pool.expire(1_500), 1);
    assert!(pool.view(tenant(0), idle, 1_500).is_err());
    assert_eq!(pool.view(tenant(0), kept, 1_500).unwrap().len(), 1);
}

#[test]
fn condemned_blocks_are_not_found_and_go_with_their_last_view() {
    let mut pool = pool(2);
    store(&mut pool, tenant(0), 1, 0).unwrap();
    let view = open(&mut pool, tenant(0), &[1], 0);
    let generation = pool.get(tenant(0), key(1), 0).unwrap().generation();
    pool.condemn(generation);
    pool.condemn(generation);
    assert_eq!(held(&mut pool, &[1]), [false]);
    let refused = pool.view(tenant(0), view, 0);
    assert!(matches!(refused, Err(Error::Corrupt { .. })), "{refused:?}");
    let stats = pool.stats();
    assert_eq!((stats.blocks, stats.condemned_blocks, stats.used_bytes), (0, 1, BLOCK_BYTES));
    // A new copy gets another generation and is not harmed by the end of the old one.
    let Ok(Put::Sealed(fresh)) = store(&mut pool, tenant(0), 1, 0) else { panic!("there is room") };
    assert_ne!(fresh, generation);
    pool.close_view(view);
    assert_eq!(held(&mut pool, &[1]), [true]);
    pool.condemn(fresh);
    assert_eq!(pool.stats().used_bytes, 0);
}

/// Tells what the pool tells its policy.
#[derive(Debug, Default)]
struct Probe {
    inner: Lru,
    told: std::sync::Arc<std::sync::Mutex<Vec<UsedAgain>>>,
}

impl EvictionPolicy for Probe {
    fn insert(&mut self, candidate: Candidate) {
        self.inner.insert(candidate);
    }

    fn remove(&mut self, block: Generation) {
        self.inner.remove(block);
    }

    fn pop(&mut self) -> Option<Generation> {
        self.inner.pop()
    }

    fn used_again(&mut self, again: UsedAgain) {
        self.told.lock().unwrap().push(again);
    }
}

#[test]
fn a_request_is_one_use_and_an_evicted_block_is_known_when_it_comes_back() {
    let probe = Probe::default();
    let told = std::sync::Arc::clone(&probe.told);
    let uses =
        || told.lock().unwrap().iter().map(|again| (again.uses, again.was_evicted)).collect::<Vec<_>>();
    let mut pool = BlockPool::with_policy(config(1), Box::new(probe)).unwrap();
    store(&mut pool, tenant(0), 1, 0).unwrap();
    // Looked up, viewed, viewed again a long time after, since a view held it all the time: still the first use.
    pool.lookup(tenant(0), &[key(1)], RETENTION_MS);
    let first = open(&mut pool, tenant(0), &[1], RETENTION_MS);
    let second = open(&mut pool, tenant(0), &[1], 50 * RETENTION_MS);
    pool.view(tenant(0), first, 51 * RETENTION_MS).unwrap();
    pool.close_view(second);
    pool.close_view(first);
    pool.lookup(tenant(0), &[key(1)], 52 * RETENTION_MS);
    assert_eq!(uses(), []);
    pool.lookup(tenant(0), &[key(1)], 53 * RETENTION_MS + 1);
    assert_eq!(uses(), [(1, false)]);
    store(&mut pool, tenant(0), 2, 60 * RETENTION_MS).unwrap();
    store(&mut pool, tenant(0), 1, 70 * RETENTION_MS).unwrap();
    assert_eq!(uses(), [(1, false), (2, true)]);
}

#[test]
fn every_set_has_a_limit() {
    let limits = PoolConfig { writers_max: 1, views_max: 1, view_blocks_max: 1, ..config(2) };
    let mut pool = BlockPool::<u32>::new(limits).unwrap();
    store(&mut pool, tenant(0), 1, 0).unwrap();
    store(&mut pool, tenant(0), 2, 0).unwrap();
    let long = pool.open_view(tenant(0), &[(0, key(1)), (1, key(2))], 1000, 0).unwrap_err();
    assert!(matches!(long, Error::Invalid { field: "blocks", .. }), "{long:?}");
    pool.open_writer(tenant(0)).unwrap();
    open(&mut pool, tenant(0), &[1], 0);
    for full in [
        pool.open_writer(tenant(0)).unwrap_err(),
        pool.open_view(tenant(0), &[(0, key(1))], 1000, 0).unwrap_err(),
    ] {
        assert!(matches!(full, Error::Full { limit: 1, .. }) && full.retryable(), "{full:?}");
    }
}
