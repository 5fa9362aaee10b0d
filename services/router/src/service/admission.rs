//! Admission: how many requests run and how many wait; the rest is refused at once.

use std::{sync::Arc, time::Duration};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};

use crate::{Config, Error, metrics::RouterMetrics};

/// Places for requests.
#[derive(Debug)]
pub(crate) struct Admission {
    running: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    wait: Duration,
    retry_after: Duration,
    metrics: RouterMetrics,
}

/// A place; dropping it lets the next request in.
#[derive(Debug)]
pub(crate) struct Place {
    _running: OwnedSemaphorePermit,
    metrics: RouterMetrics,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.metrics.in_flight.dec();
    }
}

/// Counts a waiting request, also when its future is dropped.
struct Waiting<'a>(&'a RouterMetrics);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.queued.dec();
    }
}

impl Admission {
    pub(crate) fn new(config: &Config, metrics: RouterMetrics) -> Self {
        Self {
            running: Arc::new(Semaphore::new(config.requests_max as usize)),
            waiting: Arc::new(Semaphore::new(config.queue_max as usize)),
            wait: Duration::from_millis(config.queue_wait_ms),
            retry_after: config.retry_after(),
            metrics,
        }
    }

    /// Takes a place, waiting for one if the queue has room. First come, first served.
    pub(crate) async fn admit(&self) -> Result<Place, Error> {
        match Arc::clone(&self.running).try_acquire_owned() {
            Ok(permit) => return Ok(self.place(permit)),
            Err(TryAcquireError::Closed) => return Err(Error::Draining),
            Err(TryAcquireError::NoPermits) => {}
        }
        let Ok(_queued) = self.waiting.try_acquire() else {
            self.metrics.rejected.inc();
            return Err(self.overloaded("the request queue is full", "router.queue_max"));
        };
        self.metrics.queued.inc();
        let _waiting = Waiting(&self.metrics);
        match tokio::time::timeout(self.wait, Arc::clone(&self.running).acquire_owned()).await {
            Ok(Ok(permit)) => Ok(self.place(permit)),
            Ok(Err(_)) => Err(Error::Draining),
            Err(_) => {
                self.metrics.rejected.inc();
                Err(self.overloaded("the request waited too long for a place", "router.requests_max"))
            }
        }
    }

    fn place(&self, running: OwnedSemaphorePermit) -> Place {
        self.metrics.in_flight.inc();
        Place { _running: running, metrics: self.metrics.clone() }
    }

    fn overloaded(&self, what: &'static str, key: &'static str) -> Error {
        Error::Overloaded { what, key, retry_after: self.retry_after }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(requests_max: u32, queue_max: u32, queue_wait_ms: u64) -> Admission {
        let config = Config { requests_max, queue_max, queue_wait_ms, ..Config::default() };
        Admission::new(&config, RouterMetrics::default())
    }

    #[tokio::test]
    async fn refuses_when_the_queue_is_full_and_recovers() {
        let admission = admission(1, 0, 1_000);
        let place = admission.admit().await.unwrap();
        let error = admission.admit().await.unwrap_err();
        assert!(matches!(error, Error::Overloaded { key: "router.queue_max", .. }), "{error}");
        drop(place);
        admission.admit().await.unwrap();
    }

    #[tokio::test]
    async fn waits_for_a_place() {
        let admission = admission(1, 1, 60_000);
        let place = admission.admit().await.unwrap();
        let (second, ()) = tokio::join!(admission.admit(), async { drop(place) });
        second.unwrap();
        assert_eq!(admission.metrics.queued.get(), 0);
        assert_eq!(admission.metrics.in_flight.get(), 0);
    }

    #[tokio::test]
    async fn gives_up_waiting_in_time() {
        let admission = admission(1, 1, 5);
        let _place = admission.admit().await.unwrap();
        let error = admission.admit().await.unwrap_err();
        assert!(matches!(error, Error::Overloaded { key: "router.requests_max", .. }), "{error}");
        assert_eq!(admission.metrics.rejected.get(), 1);
        assert_eq!(admission.metrics.queued.get(), 0);
    }
}
