//! Occupancy and counters of a pool.

use super::{BlockPool, Resource, ResourceStats};

/// Occupancy now and counters since start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Bytes that pages and notes may occupy.
    pub budget_bytes: u64,
    /// Bytes of memory that pages (of open, sealed and condemned blocks) and notes occupy.
    pub used_bytes: u64,
    /// Bytes of notes beside blocks, of `used_bytes`.
    pub note_bytes: u64,
    /// Sealed blocks that can be found.
    pub blocks: u64,
    /// Sealed blocks that a view keeps from eviction.
    pub pinned_blocks: u64,
    /// Blocks being written, one per writer and key.
    pub open_blocks: u64,
    /// Blocks that failed a check and wait for their views to end.
    pub condemned_blocks: u64,
    /// Writers at work.
    pub writers: u64,
    /// Open views.
    pub views: u64,
    /// Views that were closed and that readers have not returned: their blocks stay pinned.
    pub closed_views: u64,
    /// Blocks sealed since start.
    pub stored_total: u64,
    /// Blocks that came although they were held, since start.
    pub duplicate_total: u64,
    /// Open blocks dropped before they were complete, since start.
    pub dropped_total: u64,
    /// Blocks evicted since start.
    pub evicted_total: u64,
    /// Blocks withdrawn after a failed check since start.
    pub condemned_total: u64,
    /// Blocks refused for want of room since start.
    pub no_space_total: u64,
    /// Lookups of a block that was held, since start.
    pub hits_total: u64,
    /// Lookups of a block that was not held, since start.
    pub misses_total: u64,
    /// Views that expired since start.
    pub expired_views_total: u64,
    /// Tenants with views, streams or incomplete blocks.
    pub tenants: u64,
    /// How each resource is shared, in the order of [`Resource::ALL`].
    pub shares: [ResourceStats; Resource::ALL.len()],
    /// Blocks dropped before their promise ended, because their tenant kept most, since start.
    pub broken_promises_total: u64,
    /// The tier below memory; all zero without one.
    pub disk: DiskStats,
}

/// Occupancy and counters of the tier below memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskStats {
    /// Bytes that blocks may occupy.
    pub budget_bytes: u64,
    /// Bytes that blocks, copies of blocks in memory and places still being read occupy.
    pub used_bytes: u64,
    /// Sealed blocks that are there and not in memory.
    pub blocks: u64,
    /// Blocks that are there and in memory.
    pub copies: u64,
    /// Blocks being written.
    pub leaving: u64,
    /// Blocks being read into memory.
    pub coming: u64,
    /// Hits of blocks that were not in memory, of all hits since start.
    pub hits_total: u64,
    /// Blocks written since start.
    pub spilled_total: u64,
    /// Writes that failed since start.
    pub spills_failed_total: u64,
    /// Blocks let go because the admission filter did not want them, since start.
    pub spills_refused_total: u64,
    /// Blocks that could not go down because it was full of kept blocks or writing paused after a failure, since start.
    pub spills_skipped_total: u64,
    /// Blocks read into memory since start.
    pub promoted_total: u64,
    /// Blocks evicted from there, of all evictions since start.
    pub evicted_total: u64,
    /// Blocks that the start found.
    pub restored_total: u64,
}

/// Counters since start.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Totals {
    pub(super) stored: u64,
    pub(super) duplicates: u64,
    pub(super) dropped: u64,
    pub(super) evicted: u64,
    pub(super) condemned: u64,
    pub(super) no_space: u64,
    pub(super) hits: u64,
    pub(super) misses: u64,
    pub(super) expired_views: u64,
    pub(super) broken_promises: u64,
    pub(super) hits_disk: u64,
    pub(super) spilled: u64,
    pub(super) spills_failed: u64,
    pub(super) spills_refused: u64,
    pub(super) spills_skipped: u64,
    pub(super) promoted: u64,
    pub(super) evicted_disk: u64,
    pub(super) restored: u64,
}

impl<T> BlockPool<T> {
    /// Bytes that pages and notes occupy: every block takes all of its pages from its first tile on.
    pub fn used_bytes(&self) -> u64 {
        (self.memory_blocks + self.open_blocks) * self.config.block_bytes() + self.note_bytes
    }

    /// Occupancy and counters.
    pub fn stats(&self) -> PoolStats {
        PoolStats {
            budget_bytes: self.config.budget_bytes,
            used_bytes: self.used_bytes(),
            note_bytes: self.note_bytes,
            blocks: self.index.len() as u64,
            pinned_blocks: self.pinned_blocks,
            open_blocks: self.open_blocks,
            condemned_blocks: self.condemned_blocks,
            writers: self.writers.len() as u64,
            views: self.views.len() as u64,
            closed_views: self.closed_views.len() as u64,
            stored_total: self.totals.stored,
            duplicate_total: self.totals.duplicates,
            dropped_total: self.totals.dropped,
            evicted_total: self.totals.evicted,
            condemned_total: self.totals.condemned,
            no_space_total: self.totals.no_space,
            hits_total: self.totals.hits,
            misses_total: self.totals.misses,
            expired_views_total: self.totals.expired_views,
            tenants: self.shares.tenants(),
            shares: self.shares.stats(),
            broken_promises_total: self.totals.broken_promises,
            disk: self.disk_stats(),
        }
    }

    /// Bytes of blocks that could come without any block being lost for them: what is free in memory and, where any block may go
    /// there, what is free on the tier below.
    pub fn room_bytes(&self, now_ms: u64) -> u64 {
        let bytes = self.config.block_bytes();
        let memory = self.config.budget_bytes.saturating_sub(self.used_bytes()) / bytes;
        (memory + self.disk.as_ref().map_or(0, |disk| disk.room(now_ms))) * bytes
    }

    fn disk_stats(&self) -> DiskStats {
        let Some(disk) = &self.disk else { return DiskStats::default() };
        let bytes = self.config.block_bytes();
        DiskStats {
            budget_bytes: disk.extents.capacity() * bytes,
            used_bytes: disk.extents.used() * bytes,
            blocks: self.held.len() as u64 - self.memory_blocks,
            copies: disk.copies.len() as u64,
            leaving: disk.leaving as u64,
            coming: disk.coming as u64,
            hits_total: self.totals.hits_disk,
            spilled_total: self.totals.spilled,
            spills_failed_total: self.totals.spills_failed,
            spills_refused_total: self.totals.spills_refused,
            spills_skipped_total: self.totals.spills_skipped,
            promoted_total: self.totals.promoted,
            evicted_total: self.totals.evicted_disk,
            restored_total: self.totals.restored,
        }
    }
}
