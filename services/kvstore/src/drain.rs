//! Draining: a shard that is to leave hands its blocks to the others. It belongs to no owners any more, sends its blocks to those
//! that do (the search for missing copies does that), and answers nobody's questions about its own copies, so that no other
//! shard drops one because of it. It drops none itself and serves what it holds until it is stopped: at no moment are there
//! fewer copies than without the drain.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use longshore_blocks::pool::PoolStats;
use longshore_proto::types::DrainStats;
use tokio::{sync::watch, time::Instant};

/// Whether the shard is drained, and how far that is.
#[derive(Debug)]
pub(crate) struct Drain {
    state: Mutex<State>,
    on: watch::Sender<bool>,
    /// New blocks are refused: there are enough other shards for them.
    refuses: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    since: Option<Instant>,
    found: Option<Found>,
}

/// What a whole search through the blocks of a shard that is drained found.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Found {
    /// When it began.
    pub(crate) began: Instant,
    /// Blocks that had been stored when it began.
    pub(crate) stored_total: u64,
    /// Blocks by what became of them.
    pub(crate) moved: u64,
    pub(crate) waiting: u64,
    pub(crate) no_room: u64,
    pub(crate) too_few_hosts: u64,
}

impl Default for Drain {
    fn default() -> Self {
        Self { state: Mutex::default(), on: watch::Sender::new(false), refuses: AtomicBool::new(false) }
    }
}

impl Drain {
    /// Begins or ends it; what it is already stays as it is.
    /// False when it was so before.
    pub(crate) fn set(&self, on: bool) -> bool {
        let mut state = self.lock();
        if on == state.since.is_some() {
            return false;
        }
        *state = State { since: on.then(Instant::now), found: None };
        self.refuses.store(false, Relaxed);
        self.on.send_replace(on);
        true
    }

    /// Whether the shard is being drained.
    pub(crate) fn is_on(&self) -> bool {
        *self.on.borrow()
    }

    /// Shows whether it is on as that changes.
    pub(crate) fn changes(&self) -> watch::Receiver<bool> {
        self.on.subscribe()
    }

    /// Whether new blocks are to go elsewhere.
    pub(crate) fn refuses(&self) -> bool {
        self.refuses.load(Relaxed)
    }

    /// Whether there are enough other shards for new blocks.
    pub(crate) fn enough_others(&self, enough: bool) {
        self.refuses.store(enough && self.is_on(), Relaxed);
    }

    /// A search that went through all blocks ended.
    pub(crate) fn found(&self, found: Found) {
        let mut state = self.lock();
        if state.since.is_some_and(|since| found.began >= since) {
            state.found = Some(found);
        }
    }

    /// How far it is; `placed` is how many blocks have a place.
    pub(crate) fn stats(&self, pool: &PoolStats, placed: u64, settle_ms: u64) -> DrainStats {
        let state = self.lock();
        let Some(since) = state.since else { return DrainStats::default() };
        let takes_blocks = !self.refuses();
        let Some(found) = state.found else {
            return DrainStats { draining: true, takes_blocks, ..DrainStats::default() };
        };
        let left = found.waiting + found.no_room + found.too_few_hosts;
        let is_late_enough = found.began >= since + Duration::from_millis(settle_ms);
        let nothing_since = found.stored_total == pool.stored_total && pool.open_blocks == 0;
        DrainStats {
            draining: true,
            drained: left == 0 && is_late_enough && nothing_since && placed == pool.blocks,
            takes_blocks,
            blocks: found.moved + left,
            moved_blocks: found.moved,
            waiting_blocks: found.waiting,
            no_room_blocks: found.no_room,
            too_few_hosts_blocks: found.too_few_hosts,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTLE_MS: u64 = 1_000;

    fn found(began: Instant) -> Found {
        Found { began, stored_total: 5, moved: 3, waiting: 0, no_room: 0, too_few_hosts: 0 }
    }

    fn pool() -> PoolStats {
        PoolStats { blocks: 3, stored_total: 5, ..PoolStats::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn drained_is_what_was_searched_late_enough_and_stayed_so() {
        let drain = Drain::default();
        let stats = |pool: &PoolStats, placed| drain.stats(pool, placed, SETTLE_MS);
        drain.found(found(Instant::now()));
        assert_eq!(stats(&pool(), 3), DrainStats::default(), "nobody asked for it");
        drain.set(true);
        assert!(stats(&pool(), 3).draining && !stats(&pool(), 3).drained);
        drain.found(found(Instant::now()));
        assert!(!stats(&pool(), 3).drained, "what others were told before may still have effects");
        tokio::time::advance(Duration::from_millis(SETTLE_MS)).await;
        drain.set(true);
        drain.found(found(Instant::now()));
        let done = stats(&pool(), 3);
        assert!(done.drained && done.blocks == 3 && done.moved_blocks == 3, "{done:?}");
        assert!(!stats(&PoolStats { stored_total: 6, ..pool() }, 3).drained, "a block came since");
        assert!(!stats(&PoolStats { open_blocks: 1, ..pool() }, 3).drained, "a block is coming");
        assert!(!stats(&pool(), 2).drained, "a block has no place");
        for left in [
            Found { waiting: 1, ..found(Instant::now()) },
            Found { no_room: 1, ..found(Instant::now()) },
            Found { too_few_hosts: 1, ..found(Instant::now()) },
        ] {
            drain.found(left);
            assert!(!stats(&pool(), 3).drained && stats(&pool(), 3).blocks == 4, "{left:?}");
        }
        drain.set(false);
        assert_eq!(stats(&pool(), 3), DrainStats::default());
    }

    #[test]
    fn blocks_are_refused_only_while_there_are_others_for_them() {
        let drain = Drain::default();
        drain.enough_others(true);
        assert!(!drain.refuses(), "it is not drained");
        drain.set(true);
        assert!(!drain.refuses(), "nobody knows yet");
        drain.enough_others(true);
        assert!(drain.refuses());
        drain.enough_others(false);
        assert!(!drain.refuses());
        drain.enough_others(true);
        drain.set(false);
        assert!(!drain.refuses());
    }
}
