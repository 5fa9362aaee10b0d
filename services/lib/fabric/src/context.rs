//! What travels with every call.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// The lane over which a call came, as whoever serves it sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lane {
    /// From this process.
    #[default]
    Local,
    /// Over a connection with shared memory.
    Shm,
    /// Over gRPC, with bodies of tiles from GPU to GPU.
    Nccl,
    /// Over gRPC, with tiles on a connection of their own.
    Tcp,
    /// Over any other connection.
    Grpc,
}

impl Lane {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Local, Self::Shm, Self::Nccl, Self::Tcp, Self::Grpc];

    /// Name in metrics and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Shm => "shm",
            Self::Nccl => "nccl",
            Self::Tcp => "tcp",
            Self::Grpc => "grpc",
        }
    }
}

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
    /// How the call came to whoever serves it; means nothing to its caller.
    pub lane: Lane,
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
