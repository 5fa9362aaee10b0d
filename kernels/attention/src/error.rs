//! Errors of the attention primitive.

/// What sort of fault an [`Error`] is; a closed set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The caller passed something that can never work.
    InvalidInput,
    /// The device has no room at the moment.
    Exhausted,
    /// The device failed.
    Device,
}

/// Faults of the attention primitive; each names the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A field has a value that can never work.
    #[error("`{field}` {problem}")]
    Invalid {
        /// Name of the field.
        field: &'static str,
        /// What is wrong with it, as a verb phrase.
        problem: String,
    },
    /// The device that computes has no room for it; what it is busy with ends.
    #[error("cannot attend: {0}")]
    Exhausted(String),
    /// The device that computes failed.
    #[error("cannot attend: {0}")]
    Device(String),
}

impl Error {
    /// A refusal told in other words, by its field and problem; faults of a device stay as they are.
    pub(crate) fn retold(self, tell: impl FnOnce(&'static str, String) -> (&'static str, String)) -> Self {
        match self {
            Self::Invalid { field, problem } => {
                let (field, problem) = tell(field, problem);
                Self::Invalid { field, problem }
            }
            other => other,
        }
    }

    /// The sort of fault.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Invalid { .. } => Kind::InvalidInput,
            Self::Exhausted(_) => Kind::Exhausted,
            Self::Device(_) => Kind::Device,
        }
    }

    /// Whether the same call can succeed later.
    pub fn retryable(&self) -> bool {
        self.kind() == Kind::Exhausted
    }
}
