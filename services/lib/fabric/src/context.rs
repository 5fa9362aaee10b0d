//! What travels with every call.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Deadline, cancellation, request name and trace context of one call. Lanes forward all of it.
#[derive(Debug, Clone, Default)]
pub struct CallContext {
    /// When the answer is no longer wanted; `None` means never.
    pub deadline: Option<Instant>,
    /// Fires when the caller went away. A `child_token` per hop.
    pub cancel: CancellationToken,
    /// Name of the request in logs; travels as `x-request-id`.
    pub request_id: String,
    /// W3C `traceparent`, when the caller sent one.
    pub traceparent: Option<String>,
}

impl CallContext {
    /// A context for `request_id` without deadline.
    pub fn new(request_id: impl Into<String>) -> Self {
        Self { request_id: request_id.into(), ..Self::default() }
    }

    /// The same with a deadline from now.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        let limit = Instant::now() + timeout;
        self.deadline = Some(self.deadline.map_or(limit, |deadline| deadline.min(limit)));
        self
    }

    /// The same with a child cancellation token.
    pub fn child(&self) -> Self {
        Self { cancel: self.cancel.child_token(), ..self.clone() }
    }

    /// Time left, `None` when there is no deadline.
    pub fn time_left(&self) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }
}
