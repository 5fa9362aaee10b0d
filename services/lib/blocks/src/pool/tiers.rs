//! The tier below memory: which blocks go there, which come back, which go altogether. Bytes are moved by others: the pool
//! gives an order, stays usable meanwhile, and is told the outcome.

mod kept;

use std::{
    collections::{BTreeSet, HashSet, VecDeque},
    sync::Arc,
};

use super::{
    BlockPool, Departure, EvictionPolicy, Generation, Held, Pages, Resource, SealedBlock, Stage, Uses,
};
use crate::{
    AdmissionFilter, BlockKey, Error, Namespace,
    tier::{Extent, Extents, Tier},
};

use kept::Losers;

/// Sizes and limits of the tier below memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskConfig {
    /// Blocks that it holds.
    pub blocks: u64,
    /// Blocks that may be on their way down at a time, and as many up.
    pub moves_max: usize,
    /// How long nothing is written after a write failed, milliseconds.
    pub pause_ms: u64,
}

/// An order to bring a block to the tier below. [`BlockPool::finish_spill`] ends it.
#[derive(Debug)]
#[must_use = "the block's memory is kept until the pool is told the outcome"]
pub struct Spill<T> {
    /// The block.
    pub block: Arc<SealedBlock<T>>,
    /// Its tiles.
    pub pages: Pages<T>,
    /// Where to.
    pub extent: Arc<Extent>,
    /// It lies there already and has to be read and compared with its checksums instead: memory is given up only if that goes well.
    pub is_check: bool,
}

/// An order to read a block back into memory. [`BlockPool::finish_promotion`] ends it.
#[derive(Debug)]
#[must_use = "memory is reserved until the pool is told the outcome"]
pub struct Promotion<T> {
    /// The block.
    pub block: Arc<SealedBlock<T>>,
    /// Where from.
    pub extent: Arc<Extent>,
}

/// What became of the wish to have a block in memory.
#[derive(Debug)]
pub enum Promote<T> {
    /// Read it: there is room.
    Read(Promotion<T>),
    /// Room is being made: carry out a spill or wait for one, then ask again.
    MakeRoom,
    /// It is in memory, gone, or memory is needed for others.
    No,
}

/// Whether there is room for one more block in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    Ready,
    /// Not before a spill ended.
    Moving,
}

/// Why a block does not go down.
enum Denied {
    /// No place, or nothing is written at the moment.
    NoRoom,
    /// The admission filter does not want it.
    Unworthy,
}

/// The tier below memory.
#[derive(Debug)]
pub(super) struct Disk<T> {
    pub(super) config: DiskConfig,
    pub(super) extents: Extents,
    /// Unpinned blocks that are there alone, by the end of their lease; then in `policy`.
    pub(super) leases: BTreeSet<(u64, Generation)>,
    pub(super) policy: Box<dyn EvictionPolicy>,
    pub(super) filter: AdmissionFilter,
    /// Blocks in memory that are there too: what goes first when it is full, since nothing is lost.
    pub(super) copies: BTreeSet<Generation>,
    orders: VecDeque<Spill<T>>,
    pub(super) leaving: usize,
    pub(super) coming: usize,
    paused_until_ms: u64,
    trust: kept::Trust,
    /// Blocks that a stop wrote, or is writing: worth more than all that is written later. Below they are in no queue.
    pub(super) saved: HashSet<Generation>,
}

impl<T> Disk<T> {
    /// Blocks that could come from memory, whichever they are, without any being evicted here.
    pub(super) fn room(&self, now_ms: u64) -> u64 {
        if now_ms < self.paused_until_ms || !self.filter.admits_all() {
            return 0;
        }
        self.extents.capacity() - self.extents.used() + self.copies.len() as u64
    }
}

impl<T> BlockPool<T> {
    /// Adds a tier below memory with its own order of eviction; `filter` decides which blocks that nothing keeps go there.
    pub fn with_disk(
        mut self,
        config: DiskConfig,
        policy: Box<dyn EvictionPolicy>,
        filter: AdmissionFilter,
    ) -> Self {
        self.disk = Some(Disk {
            config,
            extents: Extents::new(config.blocks),
            leases: BTreeSet::new(),
            policy,
            filter,
            copies: BTreeSet::new(),
            orders: VecDeque::new(),
            leaving: 0,
            coming: 0,
            paused_until_ms: 0,
            trust: kept::Trust::default(),
            saved: HashSet::new(),
        });
        self
    }

    /// Takes in a block that a start found on the tier below: `number` is its generation's. Of two with one name the younger
    /// one stays. False when it was not taken: its place is taken or beyond the capacity, or it is the older one.
    pub fn restore(
        &mut self,
        namespace: Namespace,
        key: BlockKey,
        number: u64,
        checksums: Box<[u32]>,
        index: u64,
    ) -> bool {
        let generation = Generation(number);
        if self.held.contains_key(&generation) || checksums.len() != self.config.layers as usize {
            return false;
        }
        let older = self.index.get(&(namespace, key)).copied();
        if older.is_some_and(|other| other > generation) {
            return false;
        }
        let Some(extent) = self.disk.as_mut().and_then(|disk| disk.extents.claim(index)) else {
            return false;
        };
        if let Some(older) = older {
            self.remove(older);
            self.note(namespace, key, Some(Departure::Evicted));
        }
        self.last_id = self.last_id.max(number);
        let block = Arc::new(SealedBlock::on_disk(namespace, key, generation, checksums, extent));
        let uses = Uses::first(self.next_tick(), 0);
        let (pins, lease_until_ms, note_bytes, condemned) = (0, 0, 0, false);
        let held = Held { block, pins, uses, lease_until_ms, note_bytes, condemned, stage: Stage::Disk };
        self.held.insert(generation, held);
        self.index.insert((namespace, key), generation);
        self.queue(generation);
        self.note(namespace, key, None);
        self.totals.restored += 1;
        true
    }

    /// Makes room for one more block of `tenant` in memory, or fails.
    pub(super) fn make_room(&mut self, tenant: Namespace, now_ms: u64) -> Result<Room, Error> {
        loop {
            if let Some(room) = self.room_for(self.config.block_bytes(), now_ms) {
                return Ok(room);
            }
            if !self.break_promise(tenant) {
                return Err(self.no_space());
            }
        }
    }

    /// Makes room of `bytes` in memory: first by blocks that nothing keeps, then by moving those that something keeps to the tier
    /// below, then by notes of blocks that no view holds. `None` when that is not enough.
    pub(super) fn room_for(&mut self, bytes: u64, now_ms: u64) -> Option<Room> {
        self.end_leases(bytes, now_ms);
        while !self.fits(bytes) {
            if self.moves_are_full(now_ms) {
                return Some(Room::Moving);
            }
            if let Some(victim) = self.policy.pop() {
                if self.leave(victim, now_ms) {
                    return Some(Room::Moving);
                }
                continue;
            }
            let memory = self.memory_blocks;
            if self.spill_promised(now_ms) {
                return Some(Room::Moving);
            }
            if self.memory_blocks < memory {
                continue;
            }
            // What is on its way down may become room, unless the disk is so slow that nobody waits for it.
            let on_its_way = |disk: &Disk<T>| disk.leaving > 0 && now_ms >= disk.paused_until_ms;
            if self.disk.as_ref().is_some_and(on_its_way) {
                return Some(Room::Moving);
            }
            if !self.drop_oldest_notes() {
                return None;
            }
        }
        Some(Room::Ready)
    }

    /// A refusal for want of room, counted.
    pub(super) fn no_space(&mut self) -> Error {
        self.totals.no_space += 1;
        Error::NoSpace {
            needed_bytes: self.config.block_bytes(),
            used_bytes: self.used_bytes(),
            budget_bytes: self.config.budget_bytes,
        }
    }

    fn moves_are_full(&self, now_ms: u64) -> bool {
        let full = |disk: &Disk<T>| disk.leaving >= disk.config.moves_max && now_ms >= disk.paused_until_ms;
        self.disk.as_ref().is_some_and(full)
    }

    /// Writes nothing for a while: what must leave memory is lost unless something keeps it.
    pub fn pause_spills(&mut self, now_ms: u64) {
        if let Some(disk) = &mut self.disk {
            disk.trust.doubted = true;
            disk.paused_until_ms = now_ms.saturating_add(disk.config.pause_ms);
        }
    }

    /// Blocks whose lease ended may go, when there is no room of `bytes`.
    fn end_leases(&mut self, bytes: u64, now_ms: u64) {
        if self.fits(bytes) {
            return;
        }
        while let Some((until, generation)) = self.leases.first().filter(|(until, _)| *until <= now_ms) {
            let held = self.held.get(&generation).expect("leased blocks are held");
            let (tenant, uses) = (held.block.namespace(), held.uses);
            self.leases.remove(tenant, (until, generation));
            self.shares.give(tenant, Resource::PromisedBlocks);
            self.policy.insert(uses.candidate(generation));
        }
    }

    /// Takes a block that was popped from the policy out of memory. True when it has to be written first.
    fn leave(&mut self, victim: Generation, now_ms: u64) -> bool {
        let block = self.held.get(&victim).expect("queued blocks are held").block.clone();
        if let Some(copy) = block.extent() {
            self.take_down(victim, copy);
            return false;
        }
        if self.order_spill(victim, now_ms, true) {
            return true;
        }
        self.evict(victim);
        false
    }

    /// Orders the write of a block that is in no queue. False when it cannot go down, or (`ask`) is not worth it.
    fn order_spill(&mut self, victim: Generation, now_ms: u64, ask: bool) -> bool {
        let key = self.held.get(&victim).expect("queued blocks are held").block.key();
        let Some(extent) = self.extent_for(ask.then_some(key), Losers::Any, now_ms) else { return false };
        let spill = self.spill_to(victim, extent);
        self.disk.as_mut().expect("an extent was taken from it").orders.push_back(spill);
        true
    }

    /// A place for a block on the tier below; `wanted` is its key unless it is kept and need not be worth it. Counts why there is none.
    fn extent_for(&mut self, wanted: Option<BlockKey>, losers: Losers, now_ms: u64) -> Option<Arc<Extent>> {
        let disk = self.disk.as_ref()?;
        let extent = if now_ms < disk.paused_until_ms {
            Err(Denied::NoRoom)
        } else if wanted.is_some_and(|key| !disk.filter.admits(&key, None)) {
            Err(Denied::Unworthy)
        } else {
            self.take_extent(wanted, losers, now_ms)
        };
        match extent {
            Ok(extent) => return Some(extent),
            Err(Denied::NoRoom) => self.totals.spills_skipped += 1,
            Err(Denied::Unworthy) => self.totals.spills_refused += 1,
        }
        None
    }

    /// A block in no queue is on its way to a place.
    fn spill_to(&mut self, generation: Generation, extent: Arc<Extent>) -> Spill<T> {
        let held = self.held.get_mut(&generation).expect("queued blocks are held");
        held.stage = Stage::Leaving;
        let block = held.block.clone();
        let pages = block.pages().expect("blocks that leave memory are in memory");
        let disk = self.disk.as_mut().expect("an extent was taken from it");
        disk.leaving += 1;
        disk.saved.remove(&generation);
        Spill { block, pages, extent, is_check: false }
    }

    /// A free place on the tier below; blocks that are in memory as well lose theirs first, then the policy decides.
    /// `wanted` is the block that asks, unless it is kept and need not be worth it.
    fn take_extent(
        &mut self,
        wanted: Option<BlockKey>,
        losers: Losers,
        now_ms: u64,
    ) -> Result<Arc<Extent>, Denied> {
        loop {
            let disk = self.disk.as_mut().ok_or(Denied::NoRoom)?;
            if let Some(extent) = disk.extents.take() {
                return Ok(extent);
            }
            if losers == Losers::Any
                && let Some(generation) = disk.copies.pop_first()
            {
                let copy = self.held.get(&generation).and_then(|held| held.block.drop_copy());
                disk.extents.retire(copy.expect("the blocks in `copies` have one"));
                continue;
            }
            while let Some(&(until, generation)) = disk.leases.first().filter(|(until, _)| *until <= now_ms) {
                disk.leases.remove(&(until, generation));
                let uses = self.held.get(&generation).expect("leased blocks are held").uses;
                disk.policy.insert(uses.candidate(generation));
            }
            let victim = match losers {
                Losers::Colder(Some(candidate)) => disk.pop_before(candidate),
                Losers::Any | Losers::Colder(None) => disk.policy.pop(),
            };
            let victim = victim.ok_or(Denied::NoRoom)?;
            let other = self.held.get(&victim).expect("queued blocks are held").block.key();
            if wanted.is_some_and(|key| !disk.filter.admits(&key, Some(&other))) {
                self.queue(victim);
                return Err(Denied::Unworthy);
            }
            self.evict(victim);
            self.totals.evicted_disk += 1;
        }
    }

    /// A block in no queue that lies below already leaves memory at once.
    fn take_down(&mut self, generation: Generation, copy: Arc<Extent>) {
        let held = self.held.get_mut(&generation).expect("queued blocks are held");
        held.block.leave_memory(copy);
        held.stage = Stage::Disk;
        self.memory_blocks -= 1;
        if let Some(disk) = &mut self.disk {
            disk.copies.remove(&generation);
        }
        self.queue(generation);
    }

    /// The oldest order that nobody took.
    pub fn next_spill(&mut self) -> Option<Spill<T>> {
        self.disk.as_mut()?.orders.pop_front()
    }

    /// Ends a spill: the block is below, or nothing was written and writing pauses. A check ends in the same way when the block was read.
    pub fn finish_spill(&mut self, spill: Spill<T>, written: bool, now_ms: u64) {
        let generation = spill.block.generation();
        let Some(disk) = &mut self.disk else { return };
        disk.leaving -= 1;
        let held = self.held.get_mut(&generation).expect("blocks on their way are held");
        let kept = held.pins > 0 || held.lease_until_ms > now_ms;
        held.stage = Stage::Memory;
        if written && !held.condemned {
            match spill.is_check {
                true => disk.was_read(),
                false => self.totals.spilled += 1,
            }
            drop(spill.pages);
            self.take_down(generation, spill.extent);
            return;
        }
        if spill.is_check {
            return self.give_up_copy(spill, written, now_ms);
        }
        if !written {
            disk.trust.doubted = true;
            self.totals.spills_failed += 1;
            disk.paused_until_ms = now_ms.saturating_add(disk.config.pause_ms);
        }
        disk.extents.retire(spill.extent);
        let lost = !held.condemned && !kept;
        if lost {
            self.evict(generation);
        } else {
            self.settle(generation);
        }
    }

    /// Asks to have a block of the tier below in memory. A block that a view keeps may displace others, any block may use
    /// room that is free.
    pub fn begin_promotion(&mut self, generation: Generation, now_ms: u64) -> Promote<T> {
        let Some(held) = self.held.get(&generation) else { return Promote::No };
        let (pinned, there) = (held.pins > 0, held.stage == Stage::Disk && !held.condemned);
        let room = self.disk.as_ref().is_some_and(|disk| disk.coming < disk.config.moves_max);
        if !there || !room {
            return Promote::No;
        }
        let bytes = self.config.block_bytes();
        self.end_leases(bytes, now_ms);
        while !self.fits(bytes) {
            if !pinned {
                return Promote::No;
            }
            if self.moves_are_full(now_ms) {
                return Promote::MakeRoom;
            }
            let Some(victim) = self.policy.pop() else { return Promote::No };
            if self.leave(victim, now_ms) {
                return Promote::MakeRoom;
            }
        }
        // Making room may have taken this very block's place.
        let Some(held) = self.held.get(&generation).filter(|held| held.stage == Stage::Disk) else {
            return Promote::No;
        };
        let block = held.block.clone();
        let extent = block.extent().expect("blocks on the tier below have a place");
        self.unqueue(generation);
        self.held.get_mut(&generation).expect("it was found").stage = Stage::Coming;
        self.memory_blocks += 1;
        if let Some(disk) = &mut self.disk {
            disk.policy.forget(generation);
            disk.coming += 1;
        }
        Promote::Read(Promotion { block, extent })
    }

    /// Ends a promotion: the verified tiles, or none when they could not be read. The block stays below as well.
    pub fn finish_promotion(&mut self, promotion: Promotion<T>, pages: Option<Pages<T>>) {
        let generation = promotion.block.generation();
        let Some(disk) = &mut self.disk else { return };
        disk.coming -= 1;
        let held = self.held.get_mut(&generation).expect("blocks on their way are held");
        match pages {
            Some(pages) if !held.condemned => {
                held.block.enter_memory(pages);
                held.stage = Stage::Memory;
                disk.copies.insert(generation);
                disk.was_read();
                self.totals.promoted += 1;
            }
            _ => {
                held.stage = Stage::Disk;
                self.memory_blocks -= 1;
            }
        }
        self.settle(generation);
    }

    /// A block whose move ended goes to its queue, or goes altogether.
    fn settle(&mut self, generation: Generation) {
        let held = self.held.get(&generation).expect("blocks on their way are held");
        if held.condemned && held.pins == 0 {
            self.take_out(generation);
        } else {
            self.queue(generation);
        }
    }

    /// Where a block's tiles count.
    pub(super) fn tier_of(&self, generation: Generation) -> Option<Tier> {
        self.held.get(&generation).map(|held| match held.stage {
            Stage::Memory | Stage::Leaving => Tier::Dram,
            Stage::Disk | Stage::Coming => Tier::Disk,
        })
    }

    /// Every block that is held, condemned ones too; for walks over all of them.
    pub fn generations(&self) -> Vec<Generation> {
        self.held.keys().copied().collect()
    }

    /// A block by its generation, without counting as a use.
    pub fn block(&self, generation: Generation) -> Option<Arc<SealedBlock<T>>> {
        self.held.get(&generation).filter(|held| !held.condemned).map(|held| held.block.clone())
    }
}
