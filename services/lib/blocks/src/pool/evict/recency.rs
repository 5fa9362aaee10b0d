//! Policies that look at times only.

use super::{Candidate, EvictionPolicy, Generation, queue::RankQueue};

/// The least recently used block goes first.
#[derive(Debug, Default)]
pub struct Lru {
    queue: RankQueue<u64, ()>,
}

impl EvictionPolicy for Lru {
    fn insert(&mut self, candidate: Candidate) {
        self.queue.insert(candidate.block, candidate.last_use, ());
    }

    fn remove(&mut self, block: Generation) {
        self.queue.remove(block);
    }

    fn pop(&mut self) -> Option<Generation> {
        self.queue.pop().map(|(_, block, ())| block)
    }
}

/// The block whose last use but one lies furthest back goes first: LRU-K with K = 2 (O'Neil, O'Neil and Weikum 1993). Blocks
/// that were used once go before all others.
#[derive(Debug, Default)]
pub struct Lru2 {
    queue: RankQueue<(u64, u64), ()>,
}

impl EvictionPolicy for Lru2 {
    fn insert(&mut self, candidate: Candidate) {
        self.queue.insert(candidate.block, (candidate.previous_use, candidate.last_use), ());
    }

    fn remove(&mut self, block: Generation) {
        self.queue.remove(block);
    }

    fn pop(&mut self) -> Option<Generation> {
        self.queue.pop().map(|(_, block, ())| block)
    }
}

/// The block that was stored first goes first, however much it is used. For comparison: it takes the head of a prefix before
/// the tail.
#[derive(Debug, Default)]
pub struct Fifo {
    queue: RankQueue<(), ()>,
}

impl EvictionPolicy for Fifo {
    fn insert(&mut self, candidate: Candidate) {
        self.queue.insert(candidate.block, (), ());
    }

    fn remove(&mut self, block: Generation) {
        self.queue.remove(block);
    }

    fn pop(&mut self) -> Option<Generation> {
        self.queue.pop().map(|(_, block, ())| block)
    }
}
