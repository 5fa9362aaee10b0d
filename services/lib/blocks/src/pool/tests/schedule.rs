//! Random schedules: whatever happens, bytes are counted right, the budget holds, pinned blocks stay and nothing leaks.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

const BUDGET_BLOCKS: u64 = 5;

#[derive(Debug, Clone)]
enum Op {
    OpenWriter { tenant: u8 },
    Put { writer: usize, name: u8, layer: u32 },
    Discard { writer: usize, name: u8 },
    CloseWriter { writer: usize },
    Lookup { tenant: u8, name: u8 },
    OpenView { tenant: u8, names: Vec<u8>, lease_ms: u64 },
    Append { into: usize, name: u8 },
    UseView { view: usize },
    CloseView { view: usize },
    Condemn { tenant: u8, name: u8 },
    Relinquish { tenant: u8, name: u8 },
    Wait { ms: u64 },
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let (tenant, name, pick) = (0u8..2, 1u8..8, 0usize..4);
    let op = prop_oneof![
        2 => tenant.clone().prop_map(|tenant| Op::OpenWriter { tenant }),
        24 => (pick.clone(), name.clone(), 0..LAYERS).prop_map(|(writer, name, layer)| Op::Put { writer, name, layer }),
        1 => (pick.clone(), name.clone()).prop_map(|(writer, name)| Op::Discard { writer, name }),
        1 => pick.clone().prop_map(|writer| Op::CloseWriter { writer }),
        2 => (tenant.clone(), name.clone()).prop_map(|(tenant, name)| Op::Lookup { tenant, name }),
        3 => (tenant.clone(), prop::collection::btree_set(name.clone(), 0..3), 1u64..300)
            .prop_map(|(tenant, names, lease_ms)| Op::OpenView { tenant, names: names.into_iter().collect(), lease_ms }),
        2 => (pick.clone(), name.clone()).prop_map(|(into, name)| Op::Append { into, name }),
        2 => pick.clone().prop_map(|view| Op::UseView { view }),
        1 => pick.prop_map(|view| Op::CloseView { view }),
        1 => (tenant.clone(), name.clone()).prop_map(|(tenant, name)| Op::Condemn { tenant, name }),
        1 => (tenant, name).prop_map(|(tenant, name)| Op::Relinquish { tenant, name }),
        3 => (1u64..80).prop_map(|ms| Op::Wait { ms }),
    ];
    prop::collection::vec(op, 1..400)
}

/// A pool with the ids that a driver would know.
struct Run {
    pool: BlockPool<u32>,
    now_ms: u64,
    writers: Vec<WriterId>,
    views: Vec<(Namespace, ViewId)>,
    /// Blocks that are held, as the journal tells it.
    told: HashSet<(Namespace, BlockKey)>,
}

impl Run {
    fn step(&mut self, op: &Op) {
        let now_ms = self.now_ms;
        match op {
            Op::OpenWriter { tenant: salt } => {
                if let Ok(writer) = self.pool.open_writer(tenant(*salt)) {
                    self.writers.push(writer);
                }
            }
            Op::Put { writer, name, layer } => {
                if let Some(writer) = self.writers.get(*writer) {
                    let put = self.pool.put(*writer, key(*name), *layer, page(*layer), now_ms);
                    assert!(put.as_ref().is_ok() || put.as_ref().is_err_and(Error::retryable), "{put:?}");
                }
            }
            Op::Discard { writer, name } => {
                if let Some(writer) = self.writers.get(*writer) {
                    self.pool.discard(*writer, key(*name));
                }
            }
            Op::CloseWriter { writer } => {
                if *writer < self.writers.len() {
                    let writer = self.writers.remove(*writer);
                    self.pool.close_writer(writer);
                }
            }
            Op::Lookup { tenant: salt, name } => {
                self.pool.lookup(tenant(*salt), &[key(*name)], now_ms);
            }
            Op::Condemn { tenant: salt, name } => {
                if let Some(block) = self.pool.get(tenant(*salt), key(*name), now_ms) {
                    self.pool.condemn(block.generation());
                }
            }
            Op::Relinquish { tenant: salt, name } => {
                let (namespace, key) = (tenant(*salt), key(*name));
                let pinned = self.pool.index.get(&(namespace, key)).map(|held| self.pool.held[held].pins > 0);
                let gone = self.pool.relinquish(namespace, key, now_ms);
                assert!(!gone || pinned == Some(false), "only blocks that nobody uses are given up");
                assert!(!gone || self.pool.peek(namespace, &[key]) == [false]);
            }
            Op::Wait { ms } => {
                self.now_ms += ms;
                self.pool.expire(self.now_ms);
            }
            view_op => self.step_view(view_op),
        }
    }

    fn step_view(&mut self, op: &Op) {
        let now_ms = self.now_ms;
        match op {
            Op::OpenView { tenant: salt, names, lease_ms } => {
                let blocks: Vec<_> = names.iter().map(|name| (u64::from(*name), key(*name))).collect();
                if let Ok(Opened::Open(id)) = self.pool.open_view(tenant(*salt), &blocks, *lease_ms, now_ms) {
                    self.views.push((tenant(*salt), id));
                }
            }
            Op::Append { into, name } => {
                let Some(&(namespace, into)) = self.views.get(*into) else { return };
                let block = [(u64::from(*name), key(*name))];
                if let Ok(Opened::Open(added)) = self.pool.open_view(namespace, &block, 50, now_ms) {
                    let _refused_or_done = self.pool.append_view(namespace, into, added, now_ms);
                }
            }
            Op::UseView { view } => {
                if let Some(&(namespace, id)) = self.views.get(*view) {
                    let _expired_or_there = self.pool.view(namespace, id, now_ms);
                }
            }
            Op::CloseView { view } => {
                if *view < self.views.len() {
                    let (_, id) = self.views.remove(*view);
                    self.pool.close_view(id);
                }
            }
            other => unreachable!("{other:?} is no operation on views"),
        }
    }

    /// The journal tells every block that came and went, once.
    fn follow(&mut self) {
        for event in self.pool.take_events() {
            let name = (event.namespace, event.key);
            let new = if event.gone.is_none() { self.told.insert(name) } else { self.told.remove(&name) };
            assert!(new, "{event:?} is told twice or of nothing");
        }
        assert_eq!(self.told, self.pool.index.keys().copied().collect());
        let of_one = self.pool.keys(tenant(0)).len();
        assert_eq!(of_one, self.told.iter().filter(|(namespace, _)| *namespace == tenant(0)).count());
    }

    /// Everything that is counted agrees with what is there.
    fn check(&self) {
        let pool = &self.pool;
        let stats = pool.stats();
        assert_eq!(stats.open_blocks, pool.count_open());
        assert_eq!(stats.used_bytes, (pool.held.len() as u64 + pool.count_open()) * BLOCK_BYTES);
        assert!(stats.used_bytes <= stats.budget_bytes, "over budget");
        let pins = pool.count_pins();
        for (generation, held) in &pool.held {
            assert_eq!(held.pins, pins.get(generation).copied().unwrap_or(0));
            let name = (held.block.namespace(), held.block.key());
            assert_eq!(pool.index.get(&name) == Some(generation), !held.condemned, "found unless condemned");
            let leased = pool.leases.contains(&(held.lease_until_ms, *generation));
            assert!(held.pins == 0 || !leased, "pinned blocks are in no queue");
            assert!(!held.condemned || held.pins > 0, "condemned blocks go with their last pin");
        }
        assert!(pins.keys().all(|generation| pool.held.contains_key(generation)), "a pinned block is gone");
        assert_eq!(pool.index.len() as u64, stats.blocks);
        let pinned = pool.held.values().filter(|held| held.pins > 0 && !held.condemned).count() as u64;
        assert_eq!(stats.pinned_blocks, pinned);
        let condemned = pool.held.values().filter(|held| held.condemned).count() as u64;
        assert_eq!(stats.condemned_blocks, condemned);
    }

    /// After everybody left, only sealed blocks remain, and all of them can make way.
    fn settle(mut self) {
        self.writers.iter().for_each(|writer| self.pool.close_writer(*writer));
        self.pool.expire(u64::MAX);
        self.check();
        let stats = self.pool.stats();
        assert_eq!(
            (stats.open_blocks, stats.views, stats.pinned_blocks, stats.condemned_blocks),
            (0, 0, 0, 0)
        );
        assert_eq!(stats.used_bytes, stats.blocks * BLOCK_BYTES);
        for name in 100..100 + BUDGET_BLOCKS as u8 {
            let sealed = store(&mut self.pool, tenant(9), name, u64::MAX);
            assert!(matches!(sealed, Ok(Put::Sealed(_))), "{sealed:?} although nobody holds anything");
        }
        self.check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn random_schedules_keep_the_books(ops in ops(), which in 0..Eviction::ALL.len()) {
        let policy = Eviction::ALL[which].policy();
        let pool = BlockPool::with_policy(config(BUDGET_BLOCKS), policy).expect("the configuration is valid");
        let mut run = Run { pool, now_ms: 0, writers: Vec::new(), views: Vec::new(), told: HashSet::new() };
        run.pool.keep_journal();
        for op in &ops {
            run.step(op);
            run.follow();
            run.check();
        }
        run.settle();
    }
}
