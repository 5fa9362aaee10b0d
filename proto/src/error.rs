//! Faults of messages that came over the wire.

/// What sort of fault a [`WireError`] is; a closed set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The sender said something that can never work.
    InvalidInput,
    /// Bytes did not match their checksum.
    Corrupt,
}

/// A message that does not mean anything; names the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A field is missing or has a value that can never work.
    #[error("`{field}` {problem}")]
    Invalid {
        /// Dotted path of the field, for example `start.sampling.temperature`.
        field: String,
        /// What is wrong with it, as a verb phrase.
        problem: String,
    },
    /// A payload does not match its checksum.
    #[error("`{field}` does not match its checksum")]
    Checksum {
        /// Dotted path of the field.
        field: String,
    },
}

impl WireError {
    /// A field with a value that can never work.
    pub fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), problem: problem.into() }
    }

    /// The same fault seen from the message that holds the faulty one in field `outer`.
    pub fn within(self, outer: &str) -> Self {
        let path =
            |field: String| if field.is_empty() { outer.to_owned() } else { format!("{outer}.{field}") };
        match self {
            Self::Invalid { field, problem } => Self::Invalid { field: path(field), problem },
            Self::Checksum { field } => Self::Checksum { field: path(field) },
        }
    }

    /// The sort of fault.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Invalid { .. } => Kind::InvalidInput,
            Self::Checksum { .. } => Kind::Corrupt,
        }
    }

    /// Whether the same call can succeed later without a change by the caller: corrupt bytes may be whole the next time.
    pub fn retryable(&self) -> bool {
        self.kind() == Kind::Corrupt
    }

    /// Dotted path of the field.
    pub fn field(&self) -> &str {
        match self {
            Self::Invalid { field, .. } | Self::Checksum { field } => field,
        }
    }
}
