//! Errors of the layer walk.

use std::sync::Arc;

use longshore_blocks::{BlockKey, ShardId};
use longshore_fabric::{CallContext, Code};

/// Keys that a message spells out; the rest is counted.
const KEYS_SHOWN: usize = 4;

/// Why a sequence cannot go on.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The model refused its input or cannot compute.
    #[error("cannot compute the forward pass: {0}")]
    Model(Arc<longshore_model::Error>),
    /// The attention primitive refused its input.
    #[error("cannot compute attention: {0}")]
    Attention(#[from] longshore_attention::Error),
    /// A geometry or shape that can never work.
    #[error(transparent)]
    Blocks(#[from] longshore_blocks::Error),
    /// A shard does not hold blocks that the sequence needs.
    #[error("shard `{shard}` does not hold {}; hint: prefill again, then continue", list(.keys))]
    Missing {
        /// The shard that should hold them.
        shard: ShardId,
        /// Blocks that are missing.
        keys: Vec<BlockKey>,
    },
    /// A shard answered something that does not fit the question.
    #[error("shard `{shard}` answered {problem}")]
    Mismatch {
        /// The shard.
        shard: ShardId,
        /// What does not fit, as a noun phrase.
        problem: String,
    },
    /// A call to a shard failed.
    #[error("shard `{shard}` failed: {source}")]
    Shard {
        /// The shard.
        shard: ShardId,
        /// What it said.
        source: longshore_fabric::Error,
    },
    /// A shard takes longer than it usually does, and another copy is there to be asked.
    #[error("shard `{shard}` has not answered for {waited_ms} ms, which is late")]
    Late {
        /// The shard.
        shard: ShardId,
        /// How long it was waited for.
        waited_ms: u64,
    },
    /// There is nowhere to put a block.
    #[error("the cluster has no shards; hint: start `longshore kvstore`")]
    NoShards,
    /// An earlier failure left the sequence in a state that cannot be used; it can only be closed.
    #[error("the sequence is broken since {0}")]
    Broken(&'static str),
    /// The caller went away.
    #[error("the caller went away")]
    Cancelled,
    /// The deadline passed.
    #[error("the deadline passed")]
    DeadlineExceeded,
    /// The caller passed something that can never work.
    #[error("`{field}` {problem}")]
    Invalid {
        /// Name of the field.
        field: &'static str,
        /// What is wrong with it, as a verb phrase.
        problem: String,
    },
}

impl Error {
    /// What a failed call to `shard` means for a sequence under `ctx`. A deadline of the call that is not the caller's
    /// own says that the shard is too slow.
    pub(crate) fn of_shard(ctx: &CallContext, shard: &ShardId, source: longshore_fabric::Error) -> Self {
        match check(ctx) {
            Err(stopped) => stopped,
            Ok(()) => Self::Shard { shard: shard.clone(), source },
        }
    }

    /// The shard that failed, answered nonsense or was late.
    pub(crate) fn failed_shard(&self) -> Option<&ShardId> {
        match self {
            Self::Shard { shard, .. } | Self::Mismatch { shard, .. } | Self::Late { shard, .. } => {
                Some(shard)
            }
            _ => None,
        }
    }

    /// The sort of fault, as the code that callers see.
    pub fn kind(&self) -> Code {
        match self {
            Self::Model(error) if error.kind() == longshore_model::Kind::InvalidInput => {
                Code::InvalidArgument
            }
            Self::Model(error) if error.kind() == longshore_model::Kind::Exhausted => Code::ResourceExhausted,
            Self::Model(_) | Self::Attention(_) | Self::Blocks(_) => Code::Internal,
            Self::Missing { .. } => Code::NotFound,
            Self::Mismatch { .. } => Code::DataLoss,
            Self::Shard { source, .. } => of_shard_code(source.code),
            Self::NoShards | Self::Broken(_) | Self::Late { .. } => Code::Unavailable,
            Self::Cancelled => Code::Cancelled,
            Self::DeadlineExceeded => Code::DeadlineExceeded,
            Self::Invalid { .. } => Code::InvalidArgument,
        }
    }

    /// Whether the same call can succeed later without a change by the caller.
    pub fn retryable(&self) -> bool {
        matches!(self.kind(), Code::Unavailable | Code::ResourceExhausted)
    }
}

/// A shard of another epoch, one that is stuck and one that went away are the same to a sequence: it must move.
fn of_shard_code(code: Code) -> Code {
    match code {
        Code::NotFound | Code::DataLoss | Code::ResourceExhausted | Code::Unavailable => code,
        Code::FailedPrecondition | Code::DeadlineExceeded | Code::Cancelled => Code::Unavailable,
        Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented | Code::Internal => Code::Internal,
    }
}

impl From<longshore_model::Error> for Error {
    fn from(error: longshore_model::Error) -> Self {
        Self::Model(Arc::new(error))
    }
}

impl From<Error> for longshore_fabric::Error {
    fn from(error: Error) -> Self {
        let mut converted = Self::new(error.kind(), error.to_string());
        match error {
            Error::Shard { source, .. } => converted.retry_after = source.retry_after,
            Error::Invalid { field, .. } => converted.field = Some(field.to_owned()),
            _ => {}
        }
        converted
    }
}

/// Fails when the caller of `ctx` no longer wants an answer.
pub(crate) fn check(ctx: &CallContext) -> Result<(), Error> {
    if ctx.cancel.is_cancelled() {
        return Err(Error::Cancelled);
    }
    match ctx.time_left() {
        Some(left) if left.is_zero() => Err(Error::DeadlineExceeded),
        _ => Ok(()),
    }
}

fn list(keys: &[BlockKey]) -> String {
    let shown: Vec<String> = keys.iter().take(KEYS_SHOWN).map(|key| format!("`{key}`")).collect();
    match keys.len().saturating_sub(KEYS_SHOWN) {
        0 => format!("block {}", shown.join(", ")),
        more => format!("blocks {} and {more} more", shown.join(", ")),
    }
}
