//! Which blocks are worth a write when they leave memory.

use crate::{BlockKey, Namespace};

/// Decides whether a block that must leave memory goes to the tier below or is let go. Most blocks are used once: writing
/// those costs the disk its life and helps nobody. Blocks that a view or a lease keeps are not asked about.
pub trait AdmissionFilter: Send + std::fmt::Debug {
    /// A block was stored, looked up or opened.
    fn used(&mut self, namespace: Namespace, key: BlockKey);
    /// Whether to keep a block that leaves memory.
    fn admits(&mut self, namespace: Namespace, key: BlockKey) -> bool;
}

/// Keeps every block.
#[derive(Debug, Clone, Copy, Default)]
pub struct AdmitAll;

impl AdmissionFilter for AdmitAll {
    fn used(&mut self, _: Namespace, _: BlockKey) {}

    fn admits(&mut self, _: Namespace, _: BlockKey) -> bool {
        true
    }
}
