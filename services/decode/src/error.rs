//! Errors of a decode.

use std::time::Duration;

use longshore_fabric::Code;

/// When a caller that found the queue full may try again.
const QUEUE_RETRY: Duration = Duration::from_secs(1);

/// Why a sequence does not go on.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The layer walk failed.
    #[error(transparent)]
    Engine(#[from] longshore_engine::Error),
    /// The request itself is at fault.
    #[error(transparent)]
    Request(#[from] longshore_fabric::Error),
    /// A sampling parameter can never work.
    #[error("`start.sampling`: {problem}")]
    Sampling {
        /// What the sampler said.
        problem: String,
    },
    /// The logits make no token.
    #[error("cannot choose a token: {problem}")]
    Choice {
        /// What the sampler said.
        problem: String,
    },
    /// A policy that cannot be followed here.
    #[error(
        "`start.prefill_policy` is `{policy}`: {problem}; hint: give all processes the same version and `model.head_plan`"
    )]
    Policy {
        /// What the caller named.
        policy: String,
        /// Why not.
        problem: String,
    },
    /// Too many sequences wait.
    #[error("{limit} sequences are under way or waiting already; hint: retry later or add a decode worker")]
    QueueFull {
        /// Sequences under way and waiting.
        limit: usize,
    },
    /// The reader does not read.
    #[error("nobody read the answer for {waited_ms} ms; hint: read faster, or raise `stall_timeout_ms`")]
    Stalled {
        /// How long the worker waited.
        waited_ms: u64,
    },
    /// The shards do not take the sequence's blocks.
    #[error(
        "{waiting} blocks wait for their shards, the limit is {limit}; the last failure: {last}; hint: add shards or give them more memory"
    )]
    NotStored {
        /// Full blocks that wait here.
        waiting: usize,
        /// How many may.
        limit: usize,
        /// Why the last block was not stored.
        last: String,
    },
    /// The worker stops.
    #[error("the decode worker is shutting down; hint: retry")]
    ShuttingDown,
}

impl Error {
    /// The sort of fault, as the code that callers see.
    pub fn kind(&self) -> Code {
        match self {
            Self::Engine(error) => error.kind(),
            Self::Request(error) => error.code,
            Self::Sampling { .. } | Self::Policy { .. } => Code::InvalidArgument,
            Self::Choice { .. } => Code::Internal,
            Self::QueueFull { .. } | Self::Stalled { .. } | Self::NotStored { .. } => Code::ResourceExhausted,
            Self::ShuttingDown => Code::Unavailable,
        }
    }

    /// Whether the same call can succeed later without a change by the caller.
    pub fn retryable(&self) -> bool {
        matches!(self.kind(), Code::Unavailable | Code::ResourceExhausted)
    }
}

impl From<Error> for longshore_fabric::Error {
    fn from(error: Error) -> Self {
        let converted = Self::new(error.kind(), error.to_string());
        match error {
            Error::Engine(error) => error.into(),
            Error::Request(error) => error,
            Error::Sampling { .. } => converted.with_field("start.sampling"),
            Error::Policy { .. } => converted.with_field("start.prefill_policy"),
            Error::QueueFull { .. } | Error::NotStored { .. } => converted.with_retry_after(QUEUE_RETRY),
            Error::Choice { .. } | Error::Stalled { .. } | Error::ShuttingDown => converted,
        }
    }
}
