//! Errors of a prefill.

use std::time::Duration;

use longshore_blocks::{BlockKey, ShardId};
use longshore_fabric::Code;

/// When a caller that found the queue full may try again.
const QUEUE_RETRY: Duration = Duration::from_secs(1);
/// When a caller that found the shards full may try again.
const SPACE_RETRY: Duration = Duration::from_secs(5);

/// Why a prompt was not turned into KV.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The layer walk failed.
    #[error(transparent)]
    Engine(#[from] longshore_engine::Error),
    /// The request itself is at fault.
    #[error(transparent)]
    Request(#[from] longshore_fabric::Error),
    /// Too many prompts wait.
    #[error("{limit} prompts are under way or waiting already; hint: retry later or add a prefill worker")]
    QueueFull {
        /// Prompts under way and waiting.
        limit: usize,
    },
    /// A shard has no room.
    #[error(
        "shard `{shard}` has no room for block `{key}`; hint: retry later, add shards or give them more memory"
    )]
    NoSpace {
        /// The shard.
        shard: ShardId,
        /// The block.
        key: BlockKey,
    },
    /// A block arrived damaged twice.
    #[error(
        "block `{key}` arrived damaged at shard `{shard}` twice; hint: check memory and network of both machines"
    )]
    Corrupt {
        /// The shard.
        shard: ShardId,
        /// The block.
        key: BlockKey,
    },
    /// A shard hangs.
    #[error(
        "{what} made no progress for {waited_ms} ms; hint: look at the shards, or raise `prefill.shard_timeout_ms`"
    )]
    Stalled {
        /// What was waited for.
        what: &'static str,
        /// How long.
        waited_ms: u64,
    },
    /// A policy that cannot be used here.
    #[error(
        "`start.prefill_policy` is `{policy}`: {problem}; hint: give all processes the same version and `model.head_plan`"
    )]
    Policy {
        /// What the caller named.
        policy: String,
        /// Why not.
        problem: String,
    },
    /// A position between query tiles, or behind the prompt.
    #[error(
        "`start.dense_from` is {position}, must be a multiple of {} and at most the {prompt_tokens} tokens of the prompt",
        longshore_attention::QUERY_TILE
    )]
    DenseFrom {
        /// What the caller sent.
        position: u64,
        /// Tokens of the prompt.
        prompt_tokens: u64,
    },
    /// More of the answer than there is of all.
    #[error(
        "`start.generated_tokens` is {generated_tokens}, must be at most the {prompt_tokens} tokens that follow"
    )]
    Generated {
        /// What the caller sent.
        generated_tokens: u64,
        /// Tokens that follow.
        prompt_tokens: u64,
    },
    /// A policy that selects needs something of the whole prompt's KV in this process.
    #[error(
        "`start.prompt_tokens` is {prompt_tokens}: with the prefill policy `{policy}` a worker keeps {kept} of the whole prompt, \
         {needed_bytes} bytes, at most {limit_bytes} are allowed; hint: raise `prefill.local_kv_bytes`, or ask for the policy \
         `exact`"
    )]
    TooLongForPolicy {
        /// The policy.
        policy: String,
        /// Tokens of the prompt.
        prompt_tokens: u64,
        /// What it keeps.
        kept: &'static str,
        /// Bytes of that, of its full blocks.
        needed_bytes: u64,
        /// `prefill.local_kv_bytes`.
        limit_bytes: u64,
    },
    /// The worker stops.
    #[error("the prefill worker is shutting down; hint: retry")]
    ShuttingDown,
}

impl Error {
    /// The sort of fault, as the code that callers see.
    pub fn kind(&self) -> Code {
        match self {
            Self::Engine(error) => error.kind(),
            Self::Request(error) => error.code,
            Self::QueueFull { .. } | Self::NoSpace { .. } => Code::ResourceExhausted,
            Self::Policy { .. } | Self::DenseFrom { .. } | Self::Generated { .. } => Code::InvalidArgument,
            Self::TooLongForPolicy { .. } => Code::OutOfRange,
            Self::Corrupt { .. } => Code::DataLoss,
            Self::Stalled { .. } | Self::ShuttingDown => Code::Unavailable,
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
            Error::QueueFull { .. } => converted.with_retry_after(QUEUE_RETRY),
            Error::NoSpace { .. } => converted.with_retry_after(SPACE_RETRY),
            Error::Policy { .. } => converted.with_field("start.prefill_policy"),
            Error::DenseFrom { .. } => converted.with_field("start.dense_from"),
            Error::Generated { .. } => converted.with_field("start.generated_tokens"),
            Error::TooLongForPolicy { .. } => converted.with_field("start.prompt_tokens"),
            Error::Corrupt { .. } | Error::Stalled { .. } | Error::ShuttingDown => converted,
        }
    }
}
