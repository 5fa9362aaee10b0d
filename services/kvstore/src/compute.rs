//! What a shard computes with, and compute off the reactors: on tokio's blocking threads, which take their turns on the compute pool
//! or on the device.

use std::sync::Arc;

use longshore_attention::{CpuExecutor, Executor};
use longshore_compute::ComputePool;
use tokio::task::JoinHandle;

use crate::Error;

/// What a shard computes with.
#[derive(Debug, Clone)]
pub struct ShardCompute {
    /// Threads for checksums and summaries.
    pub pool: Arc<ComputePool>,
    /// Answers attention, on the CPU or on a device. Shards and workers of a process may share it.
    pub executor: Arc<dyn Executor>,
}

impl From<&Arc<ComputePool>> for ShardCompute {
    /// Everything on the threads of a pool.
    fn from(pool: &Arc<ComputePool>) -> Self {
        Self { pool: Arc::clone(pool), executor: Arc::new(CpuExecutor::new(Arc::clone(pool))) }
    }
}

/// Ends work that has not begun when nobody waits for it any more.
struct Waited<T>(JoinHandle<T>);

impl<T> Drop for Waited<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// `None` when `work` panicked.
async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let mut waited = Waited(tokio::task::spawn_blocking(work));
    (&mut waited.0).await.ok()
}

impl crate::store::Store {
    /// Runs `work` off the reactor. A panic of it must not take the process down. Work whose caller goes away before it began
    /// is dropped; what bounds how
    /// much there is (a permit) belongs into `work`, which runs on when it has begun.
    pub(crate) async fn off_reactor<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        run(work).await.ok_or_else(|| self.panicked())
    }

    pub(crate) fn panicked(&self) -> Error {
        Error::Panicked { shard: self.identity().shard_id.clone() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc::sync_channel,
    };

    use tokio::task::JoinSet;

    use super::run;

    #[test]
    fn work_that_nobody_waits_for_never_begins() {
        let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build().unwrap();
        runtime.block_on(async {
            let (release, released) = sync_channel::<()>(1);
            let mut tasks = JoinSet::new();
            tasks.spawn(run(move || released.recv().is_ok()));
            let began = Arc::new(AtomicBool::new(false));
            let flag = Arc::clone(&began);
            let second =
                tasks.spawn(async move { run(move || flag.store(true, SeqCst)).await.map(|()| true) });
            tokio::task::yield_now().await;
            second.abort();
            assert!(tasks.join_next().await.unwrap().unwrap_err().is_cancelled());
            release.send(()).unwrap();
            assert_eq!(tasks.join_next().await.unwrap().unwrap(), Some(true));
            assert_eq!(run(|| 7).await, Some(7));
            assert!(!began.load(SeqCst));
        });
    }

    #[tokio::test]
    async fn a_panic_is_a_missing_result() {
        assert_eq!(run(|| panic!("as a test")).await, None::<()>);
    }
}
