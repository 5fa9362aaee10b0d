//! Errors of the attention primitive.

/// What sort of fault an [`Error`] is; a closed set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The caller passed something that can never work.
    InvalidInput,
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
}

impl Error {
    /// The sort of fault.
    pub fn kind(&self) -> Kind {
        Kind::InvalidInput
    }

    /// Whether the same call can succeed later: never.
    pub fn retryable(&self) -> bool {
        false
    }
}
