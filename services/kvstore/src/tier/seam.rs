//! What tests and simulations put in the place of how a shard uses its disk.

use std::sync::Arc;

use super::{DiskTier, Tier};

/// Who reads tiles of the disk tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reads {
    /// Threads of the shard's own, as many as `kvstore.disk.readers` says, for attention; as many more read blocks for gets.
    OnThreads,
    /// Whoever needs a tile, one for gets at a time: for simulations, whose clock moves when all is quiet, which it never is while threads
    /// look for work by a clock of their own.
    ByWhoAsks,
}

/// How a shard uses its disk.
pub(crate) struct DiskSeam {
    /// Puts something around the tier.
    pub(crate) around: Box<dyn FnOnce(DiskTier) -> Arc<dyn Tier>>,
    /// Who reads.
    pub(crate) reads: Reads,
}

impl DiskSeam {
    /// Nothing around it: what every process does.
    pub(crate) fn plain() -> Self {
        Self { around: Box::new(|tier| Arc::new(tier)), reads: Reads::OnThreads }
    }
}
