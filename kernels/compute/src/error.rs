//! Errors of the compute pool.

/// What sort of fault an [`Error`] is; a closed set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The caller passed something that can never work.
    InvalidInput,
    /// The system refused something that it may grant another time.
    Unavailable,
}

/// Faults of the compute pool.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More threads than a pool may have.
    #[error("`threads` is {found}, must be at most {limit}")]
    TooManyThreads {
        /// Threads asked for.
        found: usize,
        /// The most that a pool may have.
        limit: usize,
    },
    /// A thread could not be bound to a core.
    #[error(
        "`pin` names core {core}, which this process may not use: {source}; hint: `taskset -p $$` shows those it may"
    )]
    Pin {
        /// The core.
        core: usize,
        /// What the system said.
        source: std::io::Error,
    },
    /// A thread could not be started.
    #[error("cannot start a compute thread: {0}; hint: lower `threads` or raise the process limit")]
    Thread(#[source] std::io::Error),
}

impl Error {
    /// The sort of fault.
    pub fn kind(&self) -> Kind {
        match self {
            Self::TooManyThreads { .. } | Self::Pin { .. } => Kind::InvalidInput,
            Self::Thread(_) => Kind::Unavailable,
        }
    }

    /// Whether the same call can succeed later.
    pub fn retryable(&self) -> bool {
        self.kind() == Kind::Unavailable
    }
}
