//! Blocks that something keeps and that leave memory all the same, for the tier below: because nothing else makes room, or because the
//! process stops. They are not given up for a copy there that may not be readable.

use super::{BlockPool, Disk, Generation, Spill, Stage};
use crate::pool::Candidate;

/// Copies that are looked at for one that no view holds.
const LOOKS_MAX: usize = 64;

/// What may lose its place to a block that needs one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Losers {
    /// Places of blocks that are in memory as well, then the blocks that the policy names.
    Any,
    /// A stop saves the block. Places of blocks that are in memory as well stay: they would be saved next. So do those of blocks that it
    /// saved before, which are worth more. Others lose theirs when the policy would let them go before this one, or, without a candidate,
    /// because the block is kept.
    Colder(Option<Candidate>),
}

/// What is believed of the tier below.
#[derive(Debug, Default)]
pub(super) struct Trust {
    /// Something went wrong there and nothing was read since: copies are read before anything relies on them.
    pub(super) doubted: bool,
    /// Until then nothing is even tried: a read went wrong just now.
    unread_until_ms: u64,
}

impl Trust {
    fn read_failed(&mut self, until_ms: u64) {
        *self = Self { doubted: true, unread_until_ms: until_ms };
    }
}

impl<T> BlockPool<T> {
    /// A read of the tier below went wrong, or took too long. Until one goes well, no block that something keeps leaves memory because it
    /// lies there too.
    pub fn read_failed(&mut self, now_ms: u64) {
        if let Some(disk) = &mut self.disk {
            disk.trust.read_failed(now_ms.saturating_add(disk.config.pause_ms));
        }
    }

    /// Moves a block that nothing but a promise keeps in memory: on the tier below it is kept as well. True when that takes a while.
    pub(super) fn spill_promised(&mut self, now_ms: u64) -> bool {
        let Some(disk) = &self.disk else { return false };
        let promised = self.leases.first().or_else(|| self.pinned.first().copied());
        let Some((_, victim)) = promised else { return false };
        let (doubted, fails) = (disk.trust.doubted, now_ms < disk.trust.unread_until_ms);
        let is_copied = disk.copies.contains(&victim);
        let pinned = self.held.get(&victim).is_some_and(|held| held.pins > 0);
        // What a view holds is not written to a disk that cannot be read; a promise is no reason to refuse others.
        let may_be_written = !(is_copied || fails && pinned);
        if may_be_written && self.spill_kept(victim, now_ms) {
            return true;
        }
        if doubted && fails {
            return false;
        }
        // Whatever keeps it, and while nothing is written: nothing is lost by that as long as the disk can be read.
        let copied = if is_copied && !doubted { Some(victim) } else { self.first_copied() };
        let Some(copied) = copied else { return false };
        if doubted && self.held.get(&copied).is_some_and(|held| held.pins > 0) {
            return self.order_check(copied);
        }
        self.take_down_copied(copied);
        false
    }

    /// Orders the write of a queued block that something keeps. False when it cannot go down; it is where it was then.
    fn spill_kept(&mut self, victim: Generation, now_ms: u64) -> bool {
        self.unqueue(victim);
        self.policy.forget(victim);
        let ordered = self.order_spill(victim, now_ms, false);
        if !ordered {
            self.queue(victim);
        }
        ordered
    }

    /// A block in memory that lies below as well, if possible one that no view holds.
    fn first_copied(&self) -> Option<Generation> {
        let copies = &self.disk.as_ref()?.copies;
        let unpinned =
            |generation: &&Generation| self.held.get(generation).is_some_and(|held| held.pins == 0);
        copies.iter().take(LOOKS_MAX).find(unpinned).or_else(|| copies.first()).copied()
    }

    /// Orders that the copy of a block is read, for which the block leaves memory if that goes well. False when enough is on its way.
    fn order_check(&mut self, generation: Generation) -> bool {
        if self.disk.as_ref().is_none_or(|disk| disk.leaving >= disk.config.moves_max) {
            return false;
        }
        self.unqueue(generation);
        self.policy.forget(generation);
        let held = self.held.get_mut(&generation).expect("copies are of held blocks");
        held.stage = Stage::Leaving;
        let block = held.block.clone();
        let (pages, extent) = (block.pages(), block.extent());
        let (pages, extent) = pages.zip(extent).expect("copies are of blocks in memory and have a place");
        let disk = self.disk.as_mut().expect("looked at above");
        disk.copies.remove(&generation);
        disk.leaving += 1;
        disk.orders.push_back(Spill { block, pages, extent, is_check: true });
        true
    }

    /// Ends a check whose block stays in memory: the copy could not be read, or the block is damaged anyway. The copy is given up.
    pub(super) fn give_up_copy(&mut self, spill: Spill<T>, was_read: bool, now_ms: u64) {
        let generation = spill.block.generation();
        if !was_read {
            self.read_failed(now_ms);
        }
        // Its own handle is not to count as a reader of the place.
        drop(spill.block.drop_copy());
        if let Some(disk) = &mut self.disk {
            disk.extents.retire(spill.extent);
        }
        self.settle(generation);
    }

    /// Takes a queued block out of memory that lies below as well; false when it does not.
    pub(in crate::pool) fn take_down_copied(&mut self, generation: Generation) -> bool {
        let Some(copy) = self.held.get(&generation).and_then(|held| held.block.extent()) else {
            return false;
        };
        self.unqueue(generation);
        self.policy.forget(generation);
        self.take_down(generation, copy);
        true
    }

    /// Blocks that are in memory alone, in the order in which they are worth saving: those that views hold first, then those that were used
    /// last, of a prefix the head before the tail. Empty where there is no tier below.
    pub fn only_in_memory(&self) -> Vec<Generation> {
        if self.disk.is_none() {
            return Vec::new();
        }
        let alone = self.held.iter().filter(|(_, held)| {
            held.stage == Stage::Memory && !held.condemned && held.block.extent().is_none()
        });
        let mut alone: Vec<_> = alone.map(|(one, held)| (held.pins > 0, held.uses.last, *one)).collect();
        alone.sort_unstable();
        alone.into_iter().rev().map(|(_, _, generation)| generation).collect()
    }

    /// Milliseconds until something is written again; 0 unless writing pauses.
    pub fn pause_left_ms(&self, now_ms: u64) -> u64 {
        self.disk.as_ref().map_or(0, |disk| disk.paused_until_ms.saturating_sub(now_ms))
    }

    /// Orders the write of a block that is in memory alone, whether room is needed or not; [`Self::finish_spill`] ends it. None when it is
    /// so no more, is not worth a write, writing pauses ([`Self::pause_left_ms`]), or it has no place below, where others that are in memory
    /// keep theirs and so do those that the policy would keep longer, or that were saved before: the most useful ones are to be saved first.
    pub fn begin_save(&mut self, generation: Generation, now_ms: u64) -> Option<Spill<T>> {
        let held = self.held.get(&generation)?;
        let alone = held.stage == Stage::Memory && !held.condemned && held.block.extent().is_none();
        let kept = held.pins > 0 || held.lease_until_ms > now_ms;
        if !alone || self.disk.is_none() {
            return None;
        }
        let wanted = (!kept).then_some(held.block.key());
        let candidate = (!kept).then(|| held.uses.candidate(generation));
        let extent = self.extent_for(wanted, Losers::Colder(candidate), now_ms)?;
        self.unqueue(generation);
        self.policy.forget(generation);
        let spill = self.spill_to(generation, extent);
        self.disk.as_mut().expect("an extent was taken from it").saved.insert(generation);
        Some(spill)
    }
}

impl<T> Disk<T> {
    /// Takes out the block that goes first, unless that would be `candidate`, which is not here.
    pub(super) fn pop_before(&mut self, candidate: Candidate) -> Option<Generation> {
        self.policy.insert(candidate);
        let first = self.policy.pop().filter(|first| *first != candidate.block);
        self.policy.remove(candidate.block);
        self.policy.forget(candidate.block);
        first
    }

    /// A read went well.
    pub(super) fn was_read(&mut self) {
        self.trust = Trust::default();
    }
}
