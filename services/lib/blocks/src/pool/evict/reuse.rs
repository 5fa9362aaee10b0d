//! The default: recency, corrected by how much likelier blocks of a certain number of uses come back.

use super::{Candidate, EvictionPolicy, Generation, UsedAgain, queue::RankQueue};

/// Blocks are told apart by 1, 2, 3, 4 to 7, 8 to 15 and more uses.
const CLASSES: usize = 6;
/// Weight of the assumption that all classes come back alike, in blocks. Blocks of one prompt come and go together, so that
/// some dozens of prompts are needed to know better.
const PRIOR: f64 = 512.0;
/// Blocks of a class after which older ones begin to count less.
const MEMORY: f64 = 65_536.0;

/// Ranks blocks by how likely it is that they are needed again about now, learned from the blocks of the pool and those that it
/// evicted lately.
///
/// Let a block of u uses come back with probability p(u), after a time that is exponentially distributed with mean τ. Seen from
/// its last use, it comes back after an idle time a with density p(u)/τ · e^(−a/τ): blocks of equal `last_use + τ · ln p(u)` are
/// worth the same, now and ever after. That is the rank: it does not change while a block waits, so that a heap orders
/// blocks. p(u) is the share that came back among blocks of u uses of which it is known: they came back, or they
/// were evicted. Nothing is tuned to a workload: without evictions, or without a difference between the classes, it is LRU.
///
/// A block has at most the uses of the one before it in its prefix, and was used at most as recently; and more uses never
/// lower a rank. So leaves go before their parents, but where the learned numbers changed between two insertions.
#[derive(Debug)]
pub struct Reuse {
    queue: RankQueue<(u64, u64), usize>,
    /// By class: blocks whose next use is known to have come or not.
    known: [f64; CLASSES],
    /// By class: those of them that came back.
    again: [f64; CLASSES],
    /// Mean time between two uses, ticks.
    idle_mean: f64,
    idle_count: f64,
}

impl Default for Reuse {
    fn default() -> Self {
        Self {
            queue: RankQueue::default(),
            known: [0.0; CLASSES],
            again: [0.0; CLASSES],
            idle_mean: 0.0,
            idle_count: 0.0,
        }
    }
}

impl Reuse {
    fn odds(&self, class: usize) -> f64 {
        (self.again[class] + PRIOR) / (self.known[class] + PRIOR)
    }

    /// Ticks that a block of this class is worth more than one that was used once.
    fn bonus(&self, class: usize) -> u64 {
        let best = (1..=class).map(|lower| self.odds(lower)).fold(self.odds(0), f64::max);
        (self.idle_mean * (best / self.odds(0)).ln()) as u64
    }

    fn learn(&mut self, class: usize) {
        self.known[class] += 1.0;
        if self.known[class] > MEMORY {
            self.known[class] /= 2.0;
            self.again[class] /= 2.0;
        }
    }
}

fn class(uses: u32) -> usize {
    match uses {
        0 | 1 => 0,
        2 => 1,
        3 => 2,
        4..=7 => 3,
        8..=15 => 4,
        _ => 5,
    }
}

impl EvictionPolicy for Reuse {
    fn insert(&mut self, candidate: Candidate) {
        let class = class(candidate.uses);
        let rank = candidate.last_use.saturating_add(self.bonus(class));
        self.queue.insert(candidate.block, (rank, candidate.last_use), class);
    }

    fn remove(&mut self, block: Generation) {
        self.queue.remove(block);
    }

    fn pop(&mut self) -> Option<Generation> {
        let (_, block, class) = self.queue.pop()?;
        self.learn(class);
        Some(block)
    }

    fn used_again(&mut self, again: UsedAgain) {
        let class = class(again.uses);
        if !again.was_evicted {
            self.learn(class);
        }
        self.again[class] += 1.0;
        self.idle_count = (self.idle_count + 1.0).min(MEMORY);
        self.idle_mean += (again.idle as f64 - self.idle_mean) / self.idle_count;
    }
}
