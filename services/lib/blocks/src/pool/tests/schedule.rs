//! Random schedules: whatever happens, bytes are counted right, the budget holds, pinned blocks stay and nothing leaks.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;
use crate::{AdmissionFilter, AdmissionRule};

const BUDGET_BLOCKS: u64 = 5;
const DISK_BLOCKS: u64 = 4;
const MOVES_MAX: usize = 2;

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
    BorrowView { view: usize },
    ReturnView { borrowed: usize },
    Condemn { tenant: u8, name: u8 },
    Relinquish { tenant: u8, name: u8 },
    Wait { ms: u64 },
    TakeSpill,
    FinishSpill { spill: usize, written: bool },
    BeginPromotion { tenant: u8, name: u8 },
    FinishPromotion { promotion: usize, read: bool },
    PauseSpills,
    ReadFailed,
    Save { at: usize },
    Note { tenant: u8, name: u8, layer: usize, bytes: u64 },
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
        1 => pick.clone().prop_map(|view| Op::CloseView { view }),
        2 => pick.clone().prop_map(|view| Op::BorrowView { view }),
        2 => pick.prop_map(|borrowed| Op::ReturnView { borrowed }),
        1 => (tenant.clone(), name.clone()).prop_map(|(tenant, name)| Op::Condemn { tenant, name }),
        1 => (tenant.clone(), name.clone()).prop_map(|(tenant, name)| Op::Relinquish { tenant, name }),
        8 => Just(Op::TakeSpill),
        8 => (0usize..MOVES_MAX, prop::bool::weighted(0.8)).prop_map(|(spill, written)| Op::FinishSpill { spill, written }),
        4 => (tenant, name).prop_map(|(tenant, name)| Op::BeginPromotion { tenant, name }),
        4 => (0usize..MOVES_MAX, prop::bool::weighted(0.8)).prop_map(|(promotion, read)| Op::FinishPromotion { promotion, read }),
        1 => Just(Op::PauseSpills),
        1 => Just(Op::ReadFailed),
        2 => (0usize..4).prop_map(|at| Op::Save { at }),
        6 => (0u8..2, 1u8..8, 0..LAYERS as usize, 1u64..20)
            .prop_map(|(tenant, name, layer, bytes)| Op::Note { tenant, name, layer, bytes }),
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
    borrowed: Vec<(ViewId, Arc<Vec<ViewBlock<u32>>>)>,
    /// Blocks that are held, as the journal tells it.
    told: HashSet<(Namespace, BlockKey)>,
    spills: Vec<Spill<u32>>,
    promotions: Vec<Promotion<u32>>,
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
            Op::TakeSpill => self.spills.extend(self.pool.next_spill()),
            Op::FinishSpill { spill, written } => {
                if *spill < self.spills.len() {
                    let spill = self.spills.remove(*spill);
                    self.pool.finish_spill(spill, *written, now_ms);
                }
            }
            Op::PauseSpills => self.pool.pause_spills(now_ms),
            Op::ReadFailed => self.pool.read_failed(now_ms),
            Op::Save { at } => {
                let alone = self.pool.only_in_memory();
                let spill = alone.get(*at).and_then(|one| self.pool.begin_save(*one, now_ms));
                self.spills.extend(spill);
            }
            Op::Note { tenant: salt, name, layer, bytes } => {
                let Some(block) = self.pool.peek_block(tenant(*salt), key(*name)) else { return };
                let noted = self.pool.take_note(block.generation(), *layer, Arc::new(*name), *bytes, now_ms);
                let kept = block.note::<u8>(*layer);
                assert!(noted != Noted::Kept || kept.as_deref() == Some(name), "{noted:?}, {kept:?}");
            }
            move_op @ (Op::BeginPromotion { .. } | Op::FinishPromotion { .. }) => self.step_up(move_op),
            view_op => self.step_view(view_op),
        }
    }

    fn step_up(&mut self, op: &Op) {
        match op {
            Op::BeginPromotion { tenant: salt, name } => {
                let Some(block) = self.pool.get(tenant(*salt), key(*name), self.now_ms) else { return };
                if let Promote::Read(promotion) = self.pool.begin_promotion(block.generation(), self.now_ms) {
                    self.promotions.push(promotion);
                }
            }
            Op::FinishPromotion { promotion, read } => {
                if *promotion < self.promotions.len() {
                    let promotion = self.promotions.remove(*promotion);
                    let pages = read.then(|| (0..LAYERS).map(page).collect());
                    self.pool.finish_promotion(promotion, pages);
                }
            }
            other => unreachable!("{other:?} is no promotion"),
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
                if let Ok(Opened::Open(added)) = self.pool.open_addition(namespace, into, &block, 50, now_ms)
                {
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
            Op::BorrowView { view } => {
                if let Some(&(namespace, id)) = self.views.get(*view)
                    && let Ok(blocks) = self.pool.borrow_view(namespace, id, now_ms)
                {
                    self.borrowed.push((id, blocks));
                }
            }
            Op::ReturnView { borrowed } => {
                if *borrowed < self.borrowed.len() {
                    self.pool.return_view(self.borrowed.remove(*borrowed).0);
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
        let pages = (in_memory_blocks(pool) + pool.count_open()) * BLOCK_BYTES;
        assert_eq!(stats.used_bytes, pages + stats.note_bytes);
        self.check_notes();
        assert!(stats.used_bytes <= stats.budget_bytes, "over budget");
        let pins = pool.count_pins();
        for (generation, held) in &pool.held {
            assert_eq!(held.pins, pins.get(generation).copied().unwrap_or(0));
            let name = (held.block.namespace(), held.block.key());
            assert_eq!(pool.index.get(&name) == Some(generation), !held.condemned, "found unless condemned");
            let leased = pool.leases.contains(&(held.lease_until_ms, *generation));
            assert!(held.pins == 0 || !leased, "pinned blocks are in no queue");
            assert!(
                !held.condemned || held.pins > 0 || held.stage.is_moving(),
                "condemned blocks go with their last pin or move"
            );
        }
        self.check_tiers();
        for namespace in [tenant(0), tenant(1), tenant(9)] {
            let told = Resource::ALL.map(|resource| pool.shares.of(namespace, resource));
            assert_eq!(told, pool.count_taken(namespace), "{:?}", Resource::ALL);
        }
        let borrowed = self.borrowed.iter().flat_map(|(_, blocks)| blocks.iter());
        let mut kept = borrowed.map(|entry| pins.contains_key(&entry.block.generation()));
        assert!(kept.all(|kept| kept), "a borrowed block was let go");
        assert!(pins.keys().all(|generation| pool.held.contains_key(generation)), "a pinned block is gone");
        assert_eq!(pool.index.len() as u64, stats.blocks);
        let pinned = pool.held.values().filter(|held| held.pins > 0 && !held.condemned).count() as u64;
        assert_eq!(stats.pinned_blocks, pinned);
        let condemned = pool.held.values().filter(|held| held.condemned).count() as u64;
        assert_eq!(stats.condemned_blocks, condemned);
    }

    /// Notes are counted once, in bounds, and go with their blocks.
    fn check_notes(&self) {
        let pool = &self.pool;
        assert_eq!(pool.note_bytes, pool.held.values().map(|held| held.note_bytes).sum::<u64>());
        assert!(pool.note_bytes <= BUDGET_BLOCKS * BLOCK_BYTES / 4, "notes take a quarter at most");
        for (generation, held) in &pool.held {
            let noted = (0..LAYERS as usize).any(|layer| held.block.note::<u8>(layer).is_some());
            assert_eq!(noted, held.note_bytes > 0);
            let droppable = pool.noted.contains(&(held.uses.last, *generation));
            assert!(!droppable || (noted && held.pins == 0 && !held.condemned));
            assert!(droppable || !noted || held.pins > 0 || held.stage.is_moving(), "nobody can drop them");
        }
        let known = |(last, generation): &(u64, Generation)| {
            pool.held.get(generation).is_some_and(|held| held.uses.last == *last)
        };
        assert!(pool.noted.iter().all(known), "notes of blocks that are gone");
    }

    /// Blocks are where their stage says, every place has one block, and moves are counted.
    fn check_tiers(&self) {
        let (pool, stats) = (&self.pool, self.pool.stats().disk);
        let Some(disk) = &pool.disk else { return };
        let mut places = std::collections::BTreeSet::new();
        for (generation, held) in &pool.held {
            let in_memory = held.block.pages().is_some();
            assert_eq!(in_memory, matches!(held.stage, Stage::Memory | Stage::Leaving));
            assert_eq!(disk.copies.contains(generation), in_memory && held.block.extent().is_some());
            if let Some(extent) = held.block.extent() {
                assert!(places.insert(extent.index()), "two blocks in one place");
            }
            let pinned = held.stage == Stage::Memory && held.pins > 0 && !held.condemned;
            assert_eq!(pool.pinned.contains(&(held.uses.last, *generation)), pinned);
        }
        let stages = |stage| pool.held.values().filter(|held| held.stage == stage).count();
        assert_eq!((stages(Stage::Leaving), stages(Stage::Coming)), (disk.leaving, disk.coming));
        assert!(disk.leaving <= MOVES_MAX + 1 && disk.coming <= MOVES_MAX, "moves are bounded");
        assert!(places.len() as u64 + self.spills.len() as u64 <= disk.extents.used());
        assert!(stats.used_bytes <= stats.budget_bytes);
        assert_eq!(stats.blocks + in_memory_blocks(pool), pool.held.len() as u64);
    }

    /// Ends every move.
    fn finish_moves(&mut self) {
        self.spills.extend(std::iter::from_fn(|| self.pool.next_spill()));
        for spill in self.spills.drain(..) {
            self.pool.finish_spill(spill, true, u64::MAX);
        }
        for promotion in self.promotions.drain(..) {
            self.pool.finish_promotion(promotion, None);
        }
    }

    /// Stores a block, making room as a shard would.
    fn store_with_room(&mut self, name: u8) -> Result<Put, Error> {
        let writer = self.pool.open_writer(tenant(9))?;
        while self.pool.admit(writer, key(name), 0, u64::MAX)? == Admission::MakeRoom {
            let spill = self.pool.next_spill().expect("whoever has to make room finds an order");
            self.pool.finish_spill(spill, true, u64::MAX);
        }
        let puts: Vec<_> =
            (0..LAYERS).map(|layer| self.pool.put(writer, key(name), layer, page(layer), u64::MAX)).collect();
        self.pool.close_writer(writer);
        puts.into_iter().next_back().expect("there are layers")
    }

    /// After everybody left, only sealed blocks remain, and all of them can make way.
    fn settle(mut self) {
        self.writers.iter().for_each(|writer| self.pool.close_writer(*writer));
        self.pool.expire(u64::MAX);
        self.finish_moves();
        self.check();
        self.borrowed.drain(..).for_each(|(id, _)| self.pool.return_view(id));
        self.check();
        let stats = self.pool.stats();
        assert_eq!(
            (stats.open_blocks, stats.views, stats.closed_views, stats.pinned_blocks, stats.condemned_blocks),
            (0, 0, 0, 0, 0)
        );
        assert_eq!(stats.used_bytes, (stats.blocks - stats.disk.blocks) * BLOCK_BYTES + stats.note_bytes);
        for name in 100..100 + BUDGET_BLOCKS as u8 {
            let sealed = self.store_with_room(name);
            assert!(matches!(sealed, Ok(Put::Sealed(_))), "{sealed:?} although nobody holds anything");
        }
        self.check();
    }
}

fn in_memory_blocks(pool: &BlockPool<u32>) -> u64 {
    pool.held.values().filter(|held| held.stage.takes_memory()).count() as u64
}

fn run(mut pool: BlockPool<u32>, ops: &[Op]) {
    pool.keep_journal();
    let (writers, views, borrowed, told, spills, promotions) = Default::default();
    let mut run = Run { pool, now_ms: 0, writers, views, borrowed, told, spills, promotions };
    for op in ops {
        run.step(op);
        run.follow();
        run.check();
    }
    run.settle();
}

fn pool_with(policy: Eviction, tenant_percent: u32) -> BlockPool<u32> {
    let config = PoolConfig { tenant_percent, ..config(BUDGET_BLOCKS) };
    BlockPool::with_policy(config, policy.policy()).expect("the configuration is valid")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn random_schedules_keep_the_books(ops in ops(), which in 0..Eviction::ALL.len(), shared: bool) {
        run(pool_with(Eviction::ALL[which], if shared { 60 } else { 100 }), &ops);
    }

    #[test]
    fn random_schedules_keep_the_books_of_two_tiers(
        ops in ops(),
        which in 0..Eviction::ALL.len(),
        rule in 0..AdmissionRule::ALL.len(),
        shared: bool,
    ) {
        let (policy, rule) = (Eviction::ALL[which], AdmissionRule::ALL[rule]);
        let disk = DiskConfig { blocks: DISK_BLOCKS, moves_max: MOVES_MAX, pause_ms: 1_000 };
        let filter = AdmissionFilter::new(rule, DISK_BLOCKS as usize, 7);
        run(pool_with(policy, if shared { 60 } else { 100 }).with_disk(disk, policy.policy(), filter), &ops);
    }
}
