//! Errors of a shard.

use std::time::Duration;

use longshore_blocks::{Kind, ShardId};
use longshore_fabric::Code;

/// When a caller that met a full limit may try again.
const FULL_RETRY: Duration = Duration::from_secs(1);

/// Why a shard refused.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The bookkeeping refused.
    #[error(transparent)]
    Blocks(#[from] longshore_blocks::Error),
    /// The executor refused.
    #[error(transparent)]
    Attention(#[from] longshore_attention::Error),
    /// The disk tier cannot be used.
    #[error(transparent)]
    Disk(#[from] crate::DiskError),
    /// The disk tier did not answer in time.
    #[error("the disk of shard `{shard}` does not answer in time; hint: retry, or look at the disk")]
    SlowDisk {
        /// This shard.
        shard: ShardId,
    },
    /// A field of the request has a value that can never work.
    #[error("`{field}` {problem}")]
    Invalid {
        /// Dotted path of the field.
        field: String,
        /// What is wrong with it, as a verb phrase.
        problem: String,
    },
    /// The caller serves another model, representation or block size.
    #[error(
        "`identity.deployment` is not that of shard `{shard}`; hint: start both processes with the same model and KV settings"
    )]
    OtherDeployment {
        /// This shard.
        shard: ShardId,
    },
    /// The caller places blocks by another set of shards.
    #[error(
        "`identity.shard_map_epoch` is {theirs:#x}, shard `{shard}` is in epoch {own:#x}; hint: refresh the membership, then retry"
    )]
    OtherEpoch {
        /// This shard.
        shard: ShardId,
        /// The caller's epoch.
        theirs: u64,
        /// This shard's epoch.
        own: u64,
    },
    /// Attention over stored values gave something that is no number.
    #[error(
        "the blocks of view `{view_id}` hold values that are no finite numbers; hint: compute them again"
    )]
    NotFinite {
        /// The view.
        view_id: u64,
    },
    /// One put stream has too many refused blocks under way.
    #[error("{limit} refused blocks are still being sent in this stream; hint: heed the acknowledgements")]
    Deaf {
        /// The limit.
        limit: usize,
    },
    /// A stream that keeps something from others made no progress.
    #[error(
        "{what} for {stall_ms} ms, so this {stream} stream is ended; hint: open it again when there is something to do"
    )]
    Stalled {
        /// What kind of stream.
        stream: &'static str,
        /// What its caller did not do.
        what: &'static str,
        /// How long it was waited for.
        stall_ms: u64,
    },
    /// The caller went away.
    #[error("the caller went away")]
    Cancelled,
    /// The deadline passed.
    #[error("the deadline passed")]
    DeadlineExceeded,
    /// The shard is being drained, so that nobody is to count on its copies.
    #[error("shard `{shard}` is being drained: its copies count for nobody; hint: ask the other shards")]
    Draining {
        /// This shard.
        shard: ShardId,
    },
    /// The process stops.
    #[error("shard `{shard}` is shutting down; hint: retry")]
    ShuttingDown {
        /// This shard.
        shard: ShardId,
    },
    /// A bug: code of the shard panicked.
    #[error("shard `{shard}` failed while it computed; hint: see its log")]
    Panicked {
        /// This shard.
        shard: ShardId,
    },
}

impl Error {
    /// A field with a value that can never work.
    pub(crate) fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), problem: problem.into() }
    }

    /// The sort of fault, as the code that callers see.
    pub fn kind(&self) -> Code {
        match self {
            Self::Blocks(error) => match error.kind() {
                Kind::InvalidInput => Code::InvalidArgument,
                Kind::NotFound => Code::NotFound,
                Kind::Corrupt => Code::DataLoss,
                Kind::NoSpace => Code::ResourceExhausted,
            },
            Self::Attention(error) => match error.kind() {
                longshore_attention::Kind::InvalidInput => Code::InvalidArgument,
                longshore_attention::Kind::Exhausted => Code::ResourceExhausted,
                longshore_attention::Kind::Device => Code::Internal,
            },
            Self::Invalid { .. } => Code::InvalidArgument,
            Self::Disk(_)
            | Self::OtherDeployment { .. }
            | Self::OtherEpoch { .. }
            | Self::Draining { .. } => Code::FailedPrecondition,
            Self::NotFinite { .. } => Code::DataLoss,
            Self::Deaf { .. } | Self::Stalled { .. } => Code::ResourceExhausted,
            Self::Cancelled => Code::Cancelled,
            Self::DeadlineExceeded => Code::DeadlineExceeded,
            Self::ShuttingDown { .. } | Self::SlowDisk { .. } => Code::Unavailable,
            Self::Panicked { .. } => Code::Internal,
        }
    }

    /// Whether the same call can succeed later without a change by the caller.
    pub fn retryable(&self) -> bool {
        matches!(self.kind(), Code::Unavailable | Code::ResourceExhausted)
    }

    fn field(&self) -> Option<&str> {
        match self {
            Self::Invalid { field, .. } => Some(field),
            Self::Blocks(longshore_blocks::Error::Invalid { field, .. })
            | Self::Attention(longshore_attention::Error::Invalid { field, .. }) => Some(field),
            Self::OtherDeployment { .. } => Some("identity.deployment"),
            Self::OtherEpoch { .. } => Some("identity.shard_map_epoch"),
            _ => None,
        }
    }
}

impl From<Error> for longshore_fabric::Error {
    fn from(error: Error) -> Self {
        let mut converted = Self::new(error.kind(), error.to_string());
        converted.field = error.field().map(str::to_owned);
        if error.kind() == Code::ResourceExhausted {
            converted = converted.with_retry_after(FULL_RETRY);
        }
        converted
    }
}
