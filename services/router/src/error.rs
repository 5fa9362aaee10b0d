//! Errors of the front door and how they cross lanes.

use std::time::Duration;

use longshore_fabric::{Code, Error as CallError};

/// What sort of fault an [`Error`] is; a closed set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The client asked for something that can never work.
    InvalidInput,
    /// The model is not served here.
    NotFound,
    /// The prompt does not fit the context.
    TooLong,
    /// A queue is full.
    Overloaded,
    /// No worker can answer now.
    Unavailable,
    /// Workers do not fit this router.
    Mismatch,
    /// The client went away.
    Cancelled,
    /// The deadline passed.
    Deadline,
    /// A bug, here or in a worker.
    Internal,
}

/// Faults of the front door; each names the field or the worker and, where there is one, the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A field has a value that can never work.
    #[error("`{field}` {problem}")]
    Invalid {
        /// Dotted path of the field.
        field: String,
        /// What is wrong with it, as a verb phrase.
        problem: String,
    },
    /// The model is not served here.
    #[error("the model `{name}` is not served here; hint: ask for `{served}`")]
    UnknownModel {
        /// What was asked for.
        name: String,
        /// What there is.
        served: String,
    },
    /// The prompt does not fit the context.
    #[error(
        "the prompt is longer than {limit_tokens} tokens: the context of `{model}` holds {context_tokens} tokens, prompt and \
         answer together; hint: shorten the prompt, or start the cluster with a larger `--max-context-tokens`"
    )]
    PromptTooLong {
        /// Model.
        model: String,
        /// Most tokens that a prompt may have.
        limit_tokens: u64,
        /// Positions of the context.
        context_tokens: u64,
    },
    /// The queue of the router is full, or a place took too long to come free.
    #[error("{what}; hint: retry after {} ms, or raise `{key}`", retry_after.as_millis())]
    Overloaded {
        /// What is full.
        what: &'static str,
        /// Configuration key that bounds it.
        key: &'static str,
        /// When to try again.
        retry_after: Duration,
    },
    /// No worker of a role can answer.
    #[error("no {role} worker can answer: {why}; hint: retry, and check that a {role} worker runs")]
    NoWorker {
        /// `prefill` or `decode`.
        role: &'static str,
        /// What was tried.
        why: String,
        /// When to try again.
        retry_after: Duration,
    },
    /// There is no shard to place blocks on.
    #[error("the cluster has no shards; hint: start a `kvstore` process, then retry")]
    NoShards {
        /// When to try again.
        retry_after: Duration,
    },
    /// Every worker of a role has all the work that it may have, or no room for what it is to store.
    #[error("every {role} worker is at its limit{}; hint: retry later, or add a worker", said(.last.as_deref()))]
    WorkersBusy {
        /// `prefill` or `decode`.
        role: &'static str,
        /// What the one that was asked last said, where one was asked.
        last: Option<String>,
        /// When to try again.
        retry_after: Duration,
    },
    /// A worker runs another model, KV representation or version.
    #[error("worker `{worker}` {problem}; hint: start all processes with the same model and settings")]
    Mismatch {
        /// Worker.
        worker: String,
        /// What differs, as a verb phrase.
        problem: String,
    },
    /// Other workers took over as often as is allowed.
    #[error(
        "gave up after {attempts} attempts, the last one failed: {last}; hint: retry, and check the workers' logs"
    )]
    GaveUp {
        /// Attempts made.
        attempts: u32,
        /// Failure of the last one.
        last: String,
        /// When to try again.
        retry_after: Duration,
    },
    /// The router stops.
    #[error("the router is shutting down; hint: retry on another router")]
    Draining,
    /// The client went away.
    #[error("the client went away")]
    Cancelled,
    /// The client does not read its answer.
    #[error("the client read nothing for {} ms while its answer was waiting", waited.as_millis())]
    ClientStalled {
        /// How long the router waited.
        waited: Duration,
    },
    /// The client stopped sending its prompt.
    #[error("`prompt` did not go on for {} ms; hint: close the prompt stream when the prompt is complete", waited.as_millis())]
    PromptStalled {
        /// How long the router waited.
        waited: Duration,
    },
    /// The deadline passed.
    #[error(
        "the deadline passed before the answer was complete; hint: allow more time, or ask for fewer `max_tokens`"
    )]
    Deadline,
    /// A worker refused or failed in a way that another attempt would not mend.
    #[error("{0}")]
    Worker(CallError),
    /// A bug.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    /// A field with a value that can never work.
    pub fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), problem: problem.into() }
    }

    /// The sort of fault.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Invalid { .. } => Kind::InvalidInput,
            Self::UnknownModel { .. } => Kind::NotFound,
            Self::PromptTooLong { .. } => Kind::TooLong,
            Self::Overloaded { .. } | Self::WorkersBusy { .. } => Kind::Overloaded,
            Self::NoWorker { .. } | Self::NoShards { .. } | Self::GaveUp { .. } | Self::Draining => {
                Kind::Unavailable
            }
            Self::Mismatch { .. } => Kind::Mismatch,
            Self::Cancelled | Self::ClientStalled { .. } => Kind::Cancelled,
            Self::Deadline | Self::PromptStalled { .. } => Kind::Deadline,
            Self::Worker(error) => kind_of(error.code),
            Self::Internal(_) => Kind::Internal,
        }
    }

    /// Whether the same call can succeed later without a change by the caller.
    pub fn retryable(&self) -> bool {
        matches!(self.kind(), Kind::Overloaded | Kind::Unavailable)
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Overloaded { retry_after, .. }
            | Self::WorkersBusy { retry_after, .. }
            | Self::NoShards { retry_after }
            | Self::GaveUp { retry_after, .. }
            | Self::NoWorker { retry_after, .. } => Some(*retry_after),
            Self::Worker(error) => error.retry_after,
            _ => None,
        }
    }

    fn field(&self) -> Option<String> {
        match self {
            Self::Invalid { field, .. } => Some(field.clone()),
            Self::UnknownModel { .. } => Some("model".to_owned()),
            Self::PromptTooLong { .. } => Some("prompt".to_owned()),
            Self::Worker(error) => error.field.clone(),
            _ => None,
        }
    }
}

fn said(last: Option<&str>) -> String {
    last.map_or_else(String::new, |last| format!(", the last said: {last}"))
}

fn kind_of(code: Code) -> Kind {
    match code {
        Code::InvalidArgument | Code::Unimplemented => Kind::InvalidInput,
        Code::OutOfRange => Kind::TooLong,
        Code::ResourceExhausted => Kind::Overloaded,
        Code::Unavailable | Code::NotFound | Code::DataLoss => Kind::Unavailable,
        Code::FailedPrecondition => Kind::Mismatch,
        Code::Cancelled => Kind::Cancelled,
        Code::DeadlineExceeded => Kind::Deadline,
        Code::Internal => Kind::Internal,
    }
}

impl Kind {
    /// The code that crosses lanes.
    pub fn code(self) -> Code {
        match self {
            Self::InvalidInput => Code::InvalidArgument,
            Self::NotFound => Code::NotFound,
            Self::TooLong => Code::OutOfRange,
            Self::Overloaded => Code::ResourceExhausted,
            Self::Unavailable => Code::Unavailable,
            Self::Mismatch => Code::FailedPrecondition,
            Self::Cancelled => Code::Cancelled,
            Self::Deadline => Code::DeadlineExceeded,
            Self::Internal => Code::Internal,
        }
    }
}

impl From<Error> for CallError {
    fn from(error: Error) -> Self {
        let code = error.kind().code();
        Self { field: error.field(), retry_after: error.retry_after(), ..Self::new(code, error.to_string()) }
    }
}

impl From<longshore_model::Error> for Error {
    fn from(error: longshore_model::Error) -> Self {
        match error {
            longshore_model::Error::Invalid { field, problem } => Self::Invalid { field, problem },
            other => Self::Internal(other.to_string()),
        }
    }
}
