//! Compute off the reactors: on tokio's blocking threads, which take their turns on the compute pool.

use crate::Error;

impl crate::store::Store {
    /// Runs `work` off the reactor. A panic of it must not take the process down. Work whose caller goes away before it began
    /// is dropped; callers bound how much there is.
    pub(crate) async fn off_reactor<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        tokio::task::spawn_blocking(work).await.map_err(|_| self.panicked())
    }

    pub(crate) fn panicked(&self) -> Error {
        Error::Panicked { shard: self.identity().shard_id.clone() }
    }
}
