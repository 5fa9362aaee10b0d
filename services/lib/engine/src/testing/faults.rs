//! What goes wrong with a shard in memory, by order of a test.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use longshore_fabric::{Code, Error};
use tokio::sync::Barrier;

/// What goes wrong, and how often.
#[derive(Debug, Default)]
pub struct Faults {
    /// Blocks still to be acknowledged as corrupt, each once.
    pub corrupt_puts: AtomicU64,
    /// Acknowledges every block as corrupt.
    pub corrupt_all_puts: AtomicBool,
    /// Blocks still to be refused for want of room.
    pub refused_puts: AtomicU64,
    /// Calls of `put_blocks` still to fail with `Unavailable`.
    pub failed_puts: AtomicU64,
    /// Milliseconds before a block is acknowledged.
    pub ack_delay_ms: AtomicU64,
    /// Attention queries still to fail with `DataLoss`.
    pub corrupt_attends: AtomicU64,
    /// Attention queries still to fail with `Unavailable`.
    pub failed_attends: AtomicU64,
    /// Attention answers that still lack their last stripe.
    pub short_attends: AtomicU64,
    /// Answers with summaries that still come in another layer's name.
    pub misplaced_summaries: AtomicU64,
    /// Answers with summaries that still break off half-way.
    pub broken_summaries: AtomicU64,
    /// Answers with blocks that still break off half-way.
    pub broken_gets: AtomicU64,
    /// Answers with summaries that are still not finite.
    pub infinite_summaries: AtomicU64,
    /// Calls of `open_view` that append still to fail without an answer.
    pub failed_appends: AtomicU64,
    /// Every call fails with `Unavailable`.
    pub away: AtomicBool,
    /// Milliseconds before an attention query is answered.
    pub attend_delay_ms: AtomicU64,
    /// Nothing is answered for as long as it is set, as by a process that is stopped; then all that was asked is.
    pub silent: AtomicBool,
    /// Milliseconds before a view is opened.
    pub open_delay_ms: AtomicU64,
    /// Milliseconds before blocks are appended to a view.
    pub append_delay_ms: AtomicU64,
    /// Answers with blocks that still stop half-way, without an end.
    pub stalled_gets: AtomicU64,
    /// Summaries come once so many readers wait for some, of all shards that share it.
    pub summaries_together: Mutex<Option<Arc<Barrier>>>,
    /// Every view lacks a block that nobody asked for.
    pub alien_missing: AtomicBool,
}

impl Faults {
    pub(super) fn check_here(&self) -> Result<(), Error> {
        match self.away.load(Ordering::SeqCst) {
            true => Err(Error::new(Code::Unavailable, "the shard is away")),
            false => Ok(()),
        }
    }

    /// The same once it is not silent any more.
    pub(super) async fn check_awake(&self) -> Result<(), Error> {
        while self.silent.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.check_here()
    }
}

/// Takes one from a counter of faults.
pub(super) fn strikes(fault: &AtomicU64) -> bool {
    fault.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
}

/// Ends an answer in its middle, as a shard that dies would.
pub(super) fn break_off<T>(messages: &mut Vec<Result<T, Error>>) {
    messages.truncate(messages.len() / 2);
    messages.push(Err(Error::new(Code::Unavailable, "the shard is ill")));
}
