//! The one error that crosses lanes; its codes are gRPC's.

use std::time::Duration;

use longshore_proto::WireError;

/// Code of an [`Error`]; the subset of gRPC's codes that Longshore uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// The caller went away.
    Cancelled,
    /// A field has a value that can never work.
    InvalidArgument,
    /// The deadline passed.
    DeadlineExceeded,
    /// Not there; for KV: recompute.
    NotFound,
    /// A limit or queue is full; retry later.
    ResourceExhausted,
    /// The two sides do not fit together (deployment, epoch, version).
    FailedPrecondition,
    /// Beyond a limit of the deployment.
    OutOfRange,
    /// Not offered.
    Unimplemented,
    /// A bug.
    Internal,
    /// No process can answer now; retry later.
    Unavailable,
    /// Bytes did not match their checksum.
    DataLoss,
}

/// A typed failure of a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// Code.
    pub code: Code,
    /// Lower case, no final stop, offending values in backticks, remedy after `hint:`.
    pub message: String,
    /// Dotted path of the field at fault, when there is one; travels as `BadRequest` detail.
    pub field: Option<String>,
    /// When to try again; travels as `RetryInfo` detail.
    pub retry_after: Option<Duration>,
}

impl Error {
    /// An error of `code`.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), field: None, retry_after: None }
    }

    /// `InvalidArgument` naming a field.
    pub fn invalid(field: impl Into<String>, problem: impl std::fmt::Display) -> Self {
        let field = field.into();
        Self {
            message: format!("`{field}` {problem}"),
            field: Some(field),
            ..Self::new(Code::InvalidArgument, "")
        }
    }

    /// The same naming a field.
    pub fn with_field(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }

    /// The same with the name of its field, where it has one, below `parent`; the message keeps the short name.
    pub(crate) fn within(mut self, parent: &str) -> Self {
        self.field = self.field.map(|field| format!("{parent}.{field}"));
        self
    }

    /// The same with a retry hint.
    pub fn with_retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// Whether the same call can succeed later without a change by the caller.
    pub fn retryable(&self) -> bool {
        matches!(self.code, Code::ResourceExhausted | Code::Unavailable)
    }
}

impl From<WireError> for Error {
    /// A fault of a message that somebody sent to us: the sender is to blame.
    fn from(fault: WireError) -> Self {
        let code = match fault {
            WireError::Invalid { .. } => Code::InvalidArgument,
            WireError::Checksum { .. } => Code::DataLoss,
        };
        Self::new(code, fault.to_string()).with_field(fault.field())
    }
}

impl Error {
    /// A fault of an answer that we got: the peer is to blame, and what it sent is not used.
    pub(crate) fn bad_answer(fault: &WireError) -> Self {
        Self::new(Code::DataLoss, format!("the answer of the peer makes no sense: {fault}"))
    }
}
