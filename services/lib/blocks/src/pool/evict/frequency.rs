//! A policy that counts uses.

use super::{Candidate, EvictionPolicy, Generation, queue::RankQueue};

/// The block with the fewest uses goes first, where the count of a block starts at that of the last victim: LFU with dynamic
/// aging, which is GDSF (Cherkasova 1998) for blocks of one size and one cost. The cost of a block's recomputation grows
/// with its position, but a block is worth nothing without all that are before it, so that the cost may not keep it longer
/// than those.
#[derive(Debug, Default)]
pub struct Lfu {
    queue: RankQueue<(u64, u64), ()>,
    /// Count of the last victim.
    floor: u64,
}

impl EvictionPolicy for Lfu {
    fn insert(&mut self, candidate: Candidate) {
        let count = self.floor.saturating_add(u64::from(candidate.uses));
        self.queue.insert(candidate.block, (count, candidate.last_use), ());
    }

    fn remove(&mut self, block: Generation) {
        self.queue.remove(block);
    }

    fn pop(&mut self) -> Option<Generation> {
        let ((count, _), block, ()) = self.queue.pop()?;
        self.floor = count;
        Some(block)
    }
}
