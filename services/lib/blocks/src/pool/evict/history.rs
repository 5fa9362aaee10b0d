//! What is known of a block's use, while it is held and for some time after.

use std::collections::{HashMap, VecDeque};

use super::{Candidate, Generation, UsedAgain};
use crate::{BlockKey, Namespace};

/// What a block is found by.
type Name = (Namespace, BlockKey);

/// Uses of one block.
///
/// One request touches a block several times: it is looked up, stored, viewed by a prefill and by a decode worker. Touches
/// count as one use unless the block was left alone for the retention time between them (the correlated reference period of
/// LRU-K).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::pool) struct Uses {
    /// At least 1.
    pub(in crate::pool) count: u32,
    /// Tick of the last touch.
    pub(in crate::pool) last: u64,
    /// Tick of the last touch of the use before; 0 when there was none.
    pub(in crate::pool) previous: u64,
    /// Time of the last touch.
    last_ms: u64,
}

impl Uses {
    /// The first use.
    pub(in crate::pool) fn first(tick: u64, now_ms: u64) -> Self {
        Self { count: 1, last: tick, previous: 0, last_ms: now_ms }
    }

    /// What a policy needs to know of a block with these uses.
    pub(in crate::pool) fn candidate(&self, block: Generation) -> Candidate {
        Candidate { block, uses: self.count, last_use: self.last, previous_use: self.previous }
    }

    /// A touch. Tells when it is a use of its own: the last touch is more than `quiet_ms` ago.
    pub(in crate::pool) fn touch(&mut self, tick: u64, now_ms: u64, quiet_ms: u64) -> Option<UsedAgain> {
        let is_new = now_ms > self.last_ms.saturating_add(quiet_ms);
        self.last_ms = self.last_ms.max(now_ms);
        let before = std::mem::replace(&mut self.last, tick);
        if !is_new {
            return None;
        }
        let again = UsedAgain { uses: self.count, idle: tick.saturating_sub(before), was_evicted: false };
        self.count = self.count.saturating_add(1);
        self.previous = before;
        Some(again)
    }
}

/// Uses of blocks that were evicted lately: when one of them is stored again, it is known. Holds so many at most and drops
/// the one that was evicted first. About 200 bytes each.
#[derive(Debug)]
pub(in crate::pool) struct Ghosts {
    limit: usize,
    uses: HashMap<Name, (u64, Uses)>,
    /// In the order of their eviction, with the number of it: a block that came back and went again has a later one.
    order: VecDeque<(u64, Name)>,
    evictions: u64,
}

impl Ghosts {
    /// Remembers up to `limit` blocks.
    pub(in crate::pool) fn new(limit: usize) -> Self {
        Self { limit, uses: HashMap::new(), order: VecDeque::new(), evictions: 0 }
    }

    /// A block was evicted.
    pub(in crate::pool) fn remember(&mut self, name: Name, uses: Uses) {
        self.evictions += 1;
        self.uses.insert(name, (self.evictions, uses));
        self.order.push_back((self.evictions, name));
        // Entries of blocks that came back fill the order too, and count.
        while self.order.len() > self.limit {
            let Some((eviction, name)) = self.order.pop_front() else { return };
            if self.uses.get(&name).is_some_and(|(latest, _)| *latest == eviction) {
                self.uses.remove(&name);
            }
        }
    }

    /// A block is stored: its uses, this one included, and what to learn when it was here before.
    pub(in crate::pool) fn recall(
        &mut self,
        name: &Name,
        tick: u64,
        now_ms: u64,
    ) -> (Uses, Option<UsedAgain>) {
        let Some((_, mut uses)) = self.uses.remove(name) else { return (Uses::first(tick, now_ms), None) };
        let again = UsedAgain { uses: uses.count, idle: tick.saturating_sub(uses.last), was_evicted: true };
        uses.previous = uses.last;
        uses.count = uses.count.saturating_add(1);
        uses.last = tick;
        uses.last_ms = uses.last_ms.max(now_ms);
        (uses, Some(again))
    }

    /// Blocks that are remembered.
    #[cfg(test)]
    pub(in crate::pool) fn len(&self) -> usize {
        self.uses.len()
    }
}
