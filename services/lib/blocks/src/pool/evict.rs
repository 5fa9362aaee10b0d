//! Which block goes first when room is needed.

mod frequency;
mod history;
mod queue;
mod recency;
mod reuse;
mod s3_fifo;
#[cfg(test)]
mod tests;

use super::Generation;

pub use frequency::Lfu;
pub(super) use history::{Ghosts, Uses};
pub use recency::{Fifo, Lru, Lru2};
pub use reuse::Reuse;
pub use s3_fifo::S3Fifo;

/// A block that may be evicted, and what is known of its use. Ticks are the pool's: larger for later, unique.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// The block. Later blocks have larger generations.
    pub block: Generation,
    /// Times that it was needed, the first time included and those before its last eviction too, as far as the pool remembers;
    /// at least 1.
    pub uses: u32,
    /// Tick of its last use. Of one prefix, the tail is used before the head.
    pub last_use: u64,
    /// Tick at which the use before that ended; 0 when there was none.
    pub previous_use: u64,
}

/// A block was needed again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UsedAgain {
    /// Uses before this one; at least 1.
    pub uses: u32,
    /// Ticks since the last of them.
    pub idle: u64,
    /// It had been evicted meanwhile, so that this is no hit.
    pub was_evicted: bool,
}

/// Orders the blocks that may be evicted: sealed, pinned by no view, retention lease over. Every block that is inserted is
/// later either popped or removed. Pure: no clock, no randomness; equal calls give equal answers. All calls take O(log n) time,
/// amortised, for n blocks.
pub trait EvictionPolicy: Send + std::fmt::Debug {
    /// A block may now be evicted.
    fn insert(&mut self, candidate: Candidate);
    /// A block that was inserted may no longer be evicted: it is used.
    fn remove(&mut self, block: Generation);
    /// Takes out the block that goes first.
    fn pop(&mut self) -> Option<Generation>;
    /// A block left the pool without being popped; it is not inserted at this time. Policies that remember blocks between
    /// removal and insertion forget it.
    fn forget(&mut self, block: Generation) {
        let _remembers_nothing = block;
    }
    /// A block was needed again, held or not: what a policy may learn from.
    fn used_again(&mut self, again: UsedAgain) {
        let _learns_nothing = again;
    }
}

/// The policies, by the names that a configuration has for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Eviction {
    /// [`Reuse`].
    #[default]
    Reuse,
    /// [`Lru`].
    Lru,
    /// [`Lru2`].
    Lru2,
    /// [`Lfu`].
    Lfu,
    /// [`S3Fifo`].
    S3Fifo,
    /// [`Fifo`].
    Fifo,
}

impl Eviction {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Reuse, Self::Lru, Self::Lru2, Self::Lfu, Self::S3Fifo, Self::Fifo];

    /// Name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reuse => "reuse",
            Self::Lru => "lru",
            Self::Lru2 => "lru-2",
            Self::Lfu => "lfu",
            Self::S3Fifo => "s3-fifo",
            Self::Fifo => "fifo",
        }
    }

    /// A fresh policy.
    pub fn policy(self) -> Box<dyn EvictionPolicy> {
        match self {
            Self::Reuse => Box::new(Reuse::default()),
            Self::Lru => Box::new(Lru::default()),
            Self::Lru2 => Box::new(Lru2::default()),
            Self::Lfu => Box::new(Lfu::default()),
            Self::S3Fifo => Box::new(S3Fifo::default()),
            Self::Fifo => Box::new(Fifo::default()),
        }
    }
}

impl std::str::FromStr for Eviction {
    type Err = crate::Error;

    fn from_str(name: &str) -> Result<Self, crate::Error> {
        Self::ALL.into_iter().find(|policy| policy.name() == name).ok_or_else(|| {
            let names: Vec<String> = Self::ALL.iter().map(|policy| format!("`{}`", policy.name())).collect();
            let problem = format!("is `{name}`, must be one of {}", names.join(", "));
            crate::Error::Invalid { field: "eviction", problem }
        })
    }
}
