//! Which block goes first when room is needed.

use std::collections::BTreeSet;

use super::Generation;

/// Orders the blocks that may be evicted: sealed, pinned by no view, retention lease over. Every block that is inserted is
/// later either popped or removed.
pub trait EvictionPolicy: Send + std::fmt::Debug {
    /// A block may now be evicted. `last_use` is larger for a later use and unique.
    fn insert(&mut self, block: Generation, last_use: u64);
    /// A block may no longer be evicted; `last_use` is what it was inserted with.
    fn remove(&mut self, block: Generation, last_use: u64);
    /// Takes out the block that goes first.
    fn pop(&mut self) -> Option<Generation>;
}

/// The least recently used block goes first.
#[derive(Debug, Default)]
pub struct Lru {
    order: BTreeSet<(u64, Generation)>,
}

impl EvictionPolicy for Lru {
    fn insert(&mut self, block: Generation, last_use: u64) {
        self.order.insert((last_use, block));
    }

    fn remove(&mut self, block: Generation, last_use: u64) {
        self.order.remove(&(last_use, block));
    }

    fn pop(&mut self) -> Option<Generation> {
        self.order.pop_first().map(|(_, block)| block)
    }
}
