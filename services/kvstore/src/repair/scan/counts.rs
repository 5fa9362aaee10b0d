//! What a search found: copies that are missing, and how far a drain is.

use longshore_blocks::{quorum::CopyRule, repair::Holding};
use tokio::time::Instant;

use super::Context;
use crate::{drain::Found, store::Store};

/// What one search found so far.
pub(super) struct Counts {
    short: u64,
    /// Missing copies of the blocks that are being sent.
    under_way: u64,
    found: Found,
}

impl Counts {
    pub(super) fn new(began: Instant, stored_total: u64) -> Self {
        let found = Found { began, stored_total, moved: 0, waiting: 0, no_room: 0, too_few_hosts: 0 };
        Self { short: 0, under_way: 0, found }
    }

    /// There is nobody else for any of so many blocks.
    pub(super) fn alone(&mut self, blocks: u64, rule: CopyRule) {
        self.short = blocks * (rule.copies() as u64 - 1);
        self.found.too_few_hosts = blocks;
    }

    /// One block: where it belongs and who was asked, best first, whether it is sent and an owner has no room for it, and who
    /// holds it.
    pub(super) fn block(
        &mut self,
        context: &Context<'_>,
        (owners, asked): (&[usize], &[usize]),
        (sends, no_room): (bool, bool),
        holding: impl Fn(usize) -> Holding,
    ) {
        let &Context { me, leaving, rule, .. } = context;
        let held = |shard: usize| shard != me && holding(shard) == Holding::Held;
        let is_first =
            asked.iter().find(|&&shard| shard == me || held(shard)).is_none_or(|&first| first == me);
        if is_first {
            let copies = asked.iter().filter(|&&shard| held(shard)).count() + usize::from(!leaving);
            let missing = rule.copies().saturating_sub(copies) as u64;
            let counter = if sends && !no_room { &mut self.under_way } else { &mut self.short };
            *counter += missing;
        }
        let elsewhere = owners.iter().filter(|&&shard| held(shard)).count();
        if elsewhere >= rule.copies() {
            self.found.moved += 1;
        } else if no_room {
            self.found.no_room += 1;
        } else if elsewhere == owners.len() {
            self.found.too_few_hosts += 1;
        } else {
            self.found.waiting += 1;
        }
    }

    /// What was being sent arrived, or some of it did not.
    pub(super) fn sent(&mut self, all: bool) {
        let sent = std::mem::take(&mut self.under_way);
        self.short += if all { 0 } else { sent };
    }

    /// Tells what the whole search found.
    pub(super) fn tell(&self, store: &Store) {
        store.repair.short(self.short, self.found.stored_total);
        store.drain.found(self.found);
    }
}
