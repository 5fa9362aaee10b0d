//! A clean stop: blocks that are in memory alone go to disk, the most useful first, for as long as there is time.

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use futures::future::join_all;
use longshore_blocks::pool::Generation;
use longshore_chassis::Tasks;

use crate::store::Store;

/// How often progress is told.
const TELL: Duration = Duration::from_secs(1);

/// Waits until `tasks` are cancelled, and saves then: whoever else has the store may let go of it first.
pub(crate) async fn at_stop(store: Arc<Store>, tasks: Tasks) {
    tasks.cancelled().await;
    store.save().await;
}

/// What is left to write, and how far that is.
#[derive(Debug)]
struct Saving {
    /// The next one last.
    left: Mutex<Vec<Generation>>,
    /// Where a pause of the disk is waited for; nobody ends it sooner.
    pause: Condvar,
    saved: AtomicU64,
    until: Instant,
}

impl Saving {
    /// Orders the next write that there is room for. One after the other, so that a block never takes the last room before one that is worth
    /// more. An order that comes too early says how long writing pauses, and is given again then. None when nothing is left or the time is
    /// over, or will be before the pause is.
    fn next<T>(&self, order: impl Fn(Generation) -> Result<Option<T>, Duration>) -> Option<T> {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(generation) = left.last().copied() {
            let time = self.until.saturating_duration_since(Instant::now());
            if time.is_zero() {
                return None;
            }
            match order(generation) {
                Err(pause) if pause >= time => return None,
                Err(pause) => {
                    left = self.pause.wait_timeout(left, pause).unwrap_or_else(PoisonError::into_inner).0;
                }
                Ok(ordered) => {
                    left.pop();
                    if ordered.is_some() {
                        return ordered;
                    }
                }
            }
        }
        None
    }
}

impl Store {
    /// Writes blocks that are in memory alone, within the configured time.
    async fn save(self: &Arc<Self>) {
        let limit = Duration::from_millis(self.config().disk.save_ms);
        let mut left = self.with_pool(|pool, _| pool.only_in_memory());
        if left.is_empty() || limit.is_zero() {
            return;
        }
        left.reverse();
        let (shard, blocks, started) = (&self.identity().shard_id, left.len(), Instant::now());
        let bytes = blocks as u64 * self.block_bytes();
        tracing::info!(%shard, blocks, bytes, limit_ms = limit.as_millis() as u64, "stopping: blocks that are in memory alone are written to disk");
        let saving = Arc::new(Saving {
            left: Mutex::new(left),
            pause: Condvar::new(),
            saved: AtomicU64::new(0),
            until: started + limit,
        });
        let saved = || saving.saved.load(Relaxed);
        let writers = (0..self.config().disk.writes_max).map(|_| {
            let (store, saving) = (Arc::clone(self), Arc::clone(&saving));
            self.off_reactor(move || store.save_some(&saving))
        });
        let telling = async {
            loop {
                tokio::time::sleep(TELL).await;
                tracing::info!(%shard, saved = saved(), of = blocks, "stopping: blocks are written to disk");
            }
        };
        tokio::select! {
            _panics_are_logged = join_all(writers) => {}
            () = telling => {}
            () = tokio::time::sleep(Duration::from_millis(self.config().disk.stop_ms())) => {}
        }
        let (saved, seconds) = (saved(), started.elapsed().as_secs_f64());
        match blocks as u64 - saved {
            0 => tracing::info!(%shard, saved, seconds, "stopping: all blocks are on disk"),
            lost => {
                tracing::warn!(%shard, saved, lost, seconds, "stopping: some blocks are not on disk and are lost, for want of time (`kvstore.disk.save_ms`), because nothing colder makes room there, or because a write failed or the admission filter did not want them");
            }
        }
    }

    /// Writes blocks until none is left or the time is over.
    fn save_some(&self, saving: &Saving) {
        let Some(disk) = self.disk() else { return };
        let order = |generation| {
            self.with_pool(|pool, now| match pool.pause_left_ms(now) {
                0 => Ok(pool.begin_save(generation, now)),
                pause_ms => Err(Duration::from_millis(pause_ms)),
            })
        };
        while let Some(spill) = saving.next(order) {
            if self.spill(disk, spill) {
                saving.saved.fetch_add(1, Relaxed);
            }
        }
    }
}
