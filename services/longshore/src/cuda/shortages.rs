//! Says that a GPU is full, now and then: a full one does not say so with every call.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use longshore_cuda::{Error, Shortage};

/// Between two lines of the log, at least.
const PAUSE: Duration = Duration::from_secs(30);

/// When something was said, and what has not been said since.
#[derive(Debug, Default)]
pub(crate) struct Shortages(Mutex<Said>);

#[derive(Debug, Default)]
struct Said {
    last: Option<Instant>,
    calls: u64,
}

impl Shortages {
    /// Notes a call that the CPU did; says so where nothing was said for a while.
    pub(crate) fn tell(&self, now: Instant, shortage: Shortage, error: &Error) {
        let Some(calls) = self.due(now) else { return };
        tracing::warn!(
            reason = shortage.name(),
            calls,
            "attention is computed on the CPU, the GPU has no room for it: {error}"
        );
    }

    /// Calls since the last line, with this one, where another line is due.
    fn due(&self, now: Instant) -> Option<u64> {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        said.calls += 1;
        if said.last.is_some_and(|last| now.saturating_duration_since(last) < PAUSE) {
            return None;
        }
        said.last = Some(now);
        Some(std::mem::take(&mut said.calls))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_and_told_now_and_then() {
        let (shortages, start) = (Shortages::default(), Instant::now());
        let after = |seconds| shortages.due(start + Duration::from_secs(seconds));
        assert_eq!([0, 1, 29].map(after), [Some(1), None, None]);
        assert_eq!([30, 31, 90, 91].map(after), [Some(3), None, Some(2), None]);
    }
}
