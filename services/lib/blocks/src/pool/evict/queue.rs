//! Blocks by rank.

use std::collections::{BTreeMap, HashMap};

use super::Generation;

/// Blocks in the order of their ranks, with something to remember of each. About 100 bytes a block.
#[derive(Debug)]
pub(super) struct RankQueue<R, V> {
    order: BTreeMap<(R, Generation), V>,
    ranks: HashMap<Generation, R>,
}

impl<R: Ord, V> Default for RankQueue<R, V> {
    fn default() -> Self {
        Self { order: BTreeMap::new(), ranks: HashMap::new() }
    }
}

impl<R: Ord + Copy, V> RankQueue<R, V> {
    pub(super) fn insert(&mut self, block: Generation, rank: R, value: V) {
        self.ranks.insert(block, rank);
        self.order.insert((rank, block), value);
    }

    pub(super) fn remove(&mut self, block: Generation) {
        if let Some(rank) = self.ranks.remove(&block) {
            self.order.remove(&(rank, block));
        }
    }

    /// Takes out the block of the lowest rank.
    pub(super) fn pop(&mut self) -> Option<(R, Generation, V)> {
        let ((rank, block), value) = self.order.pop_first()?;
        self.ranks.remove(&block);
        Some((rank, block, value))
    }

    pub(super) fn len(&self) -> usize {
        self.order.len()
    }
}
