//! Compute off the reactors: on rayon's pool, awaited.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tokio::sync::oneshot;

use crate::Error;

/// Runs `work` on rayon's pool. `None` when it panicked: a panic must not take the pool's process down.
async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (done, result) = oneshot::channel();
    rayon::spawn(move || {
        // A caller that went away before its turn needs no result.
        if !done.is_closed() {
            let result = catch_unwind(AssertUnwindSafe(work)).ok();
            let _caller_is_gone = done.send(result);
        }
    });
    result.await.ok().flatten()
}

impl crate::store::Store {
    /// Runs `work` on rayon's pool.
    pub(crate) async fn compute<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        run(work).await.ok_or_else(|| self.panicked())
    }

    /// Runs `work`, which mostly copies or waits for a lock, on tokio's blocking threads.
    pub(crate) async fn block_on_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        tokio::task::spawn_blocking(work).await.map_err(|_| self.panicked())
    }

    fn panicked(&self) -> Error {
        Error::Panicked { shard: self.identity().shard_id.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_a_missing_result() {
        assert_eq!(run(|| 7).await, Some(7));
        assert_eq!(run(|| panic!("as a test")).await, None::<()>);
    }
}
