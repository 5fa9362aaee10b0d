//! Progress of repair, for `Stats` and metrics.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use longshore_blocks::quorum::CopyRule;
use longshore_proto::types::{CopyStats, RepairStats};

/// Progress of repair.
#[derive(Debug, Default)]
pub(crate) struct RepairCounters {
    unchecked: AtomicU64,
    backlog: AtomicU64,
    sent: AtomicU64,
    sent_bytes: AtomicU64,
    failed: AtomicU64,
    dropped: AtomicU64,
    passes: AtomicU64,
    peers_down: AtomicU64,
    wanted: AtomicU32,
    write_acks: AtomicU32,
    short: AtomicU64,
    /// Blocks that were ever stored when the last whole search began, and one more; 0: there is none that still counts.
    searched: AtomicU64,
}

impl RepairCounters {
    pub(crate) fn stats(&self) -> RepairStats {
        RepairStats {
            unchecked_blocks: self.unchecked.load(Relaxed),
            backlog_blocks: self.backlog.load(Relaxed),
            sent_total: self.sent.load(Relaxed),
            sent_bytes_total: self.sent_bytes.load(Relaxed),
            failed_total: self.failed.load(Relaxed),
            dropped_total: self.dropped.load(Relaxed),
            passes_total: self.passes.load(Relaxed),
            peers_down: self.peers_down.load(Relaxed),
        }
    }

    /// How the copies of `blocks` stand, with `stored_total` blocks ever stored; but for what else the pool knows.
    pub(crate) fn copies(&self, blocks: u64, stored_total: u64) -> CopyStats {
        let unsearched_blocks = match (self.wanted.load(Relaxed), self.searched.load(Relaxed)) {
            (0 | 1, _) => 0,
            (_, 0) => blocks,
            (_, searched) => (stored_total + 1).saturating_sub(searched).min(blocks),
        };
        CopyStats {
            unsearched_blocks,
            wanted: self.wanted.load(Relaxed),
            write_acks: self.write_acks.load(Relaxed),
            short: self.short.load(Relaxed),
            unplaced_blocks: 0,
        }
    }

    /// How many copies there should be.
    pub(super) fn rule(&self, rule: CopyRule) {
        self.wanted.store(rule.copies() as u32, Relaxed);
        self.write_acks.store(rule.write_acks() as u32, Relaxed);
    }

    /// A whole search, which began when `stored_total` blocks had ever been stored, found so many copies missing.
    pub(super) fn short(&self, copies: u64, stored_total: u64) {
        self.short.store(copies, Relaxed);
        self.searched.store(stored_total + 1, Relaxed);
    }

    /// Something happened to a shard: what the last search found is no longer so.
    pub(super) fn outdated(&self) {
        self.searched.store(0, Relaxed);
    }

    /// So many blocks are still to be looked at.
    pub(super) fn unchecked(&self, blocks: usize) {
        self.unchecked.store(blocks as u64, Relaxed);
    }

    /// So many copies are to be sent.
    pub(super) fn found(&self, copies: usize) {
        self.backlog.fetch_add(copies as u64, Relaxed);
    }

    /// A copy that was to be sent was, or was not.
    pub(super) fn tried(&self, sent_bytes: Option<u64>) {
        self.backlog.fetch_sub(1, Relaxed);
        match sent_bytes {
            Some(bytes) => {
                self.sent.fetch_add(1, Relaxed);
                self.sent_bytes.fetch_add(bytes, Relaxed);
            }
            None => _ = self.failed.fetch_add(1, Relaxed),
        }
    }

    /// A copy was not sent, because it would have driven out another block.
    pub(super) fn no_room(&self) {
        self.failed.fetch_add(1, Relaxed);
    }

    pub(super) fn dropped(&self) {
        self.dropped.fetch_add(1, Relaxed);
    }

    pub(super) fn passed(&self) {
        self.passes.fetch_add(1, Relaxed);
    }

    pub(super) fn peers_down(&self, count: usize) {
        self.peers_down.store(count as u64, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_search_looked_at_is_told() {
        let counters = RepairCounters::default();
        assert_eq!(
            counters.copies(5, 5).unsearched_blocks,
            0,
            "nobody knows how many copies there should be"
        );
        counters.rule(CopyRule::default());
        assert_eq!(counters.copies(5, 5).unsearched_blocks, 0, "one copy is never searched for");
        counters.rule(CopyRule::new(2, 1).expect("a rule"));
        assert_eq!(counters.copies(5, 5).unsearched_blocks, 5, "no search ended yet");
        counters.short(1, 5);
        assert_eq!((counters.copies(5, 5).unsearched_blocks, counters.copies(5, 5).short), (0, 1));
        assert_eq!(counters.copies(7, 8).unsearched_blocks, 3, "so many came since");
        assert_eq!(counters.copies(2, 8).unsearched_blocks, 2, "but not more than there are");
        counters.outdated();
        assert_eq!(counters.copies(7, 8).unsearched_blocks, 7, "something happened to a shard");
        counters.short(0, 0);
        assert_eq!(counters.copies(0, 0).unsearched_blocks, 0, "a search of nothing counts");
    }
}
