//! Tiers: where sealed blocks are kept. The bookkeeping of the tier below memory: which place of it holds which block, which
//! blocks go there and which go from there. Does no I/O: whoever moves bytes asks the pool for an order and tells its outcome.

mod extents;

pub use extents::{Extent, Extents};

/// Where a block's tiles are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// Main memory.
    Dram,
    /// Files.
    Disk,
}

impl Tier {
    /// Name in metrics and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dram => "dram",
            Self::Disk => "disk",
        }
    }
}
