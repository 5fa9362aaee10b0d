//! Errors of membership.

/// What sort of fault an [`Error`] is; a closed set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A member or a list of members can never work.
    InvalidInput,
    /// The id is in use.
    AlreadyExists,
    /// The member is not one of the configured ones.
    NotFound,
}

/// Faults of membership; each names the member and the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A field of a member has a value that can never work.
    #[error("`{field}` of member `{member}` {problem}")]
    Invalid {
        /// The member, as far as it is known: its id, or the text that it was read from.
        member: String,
        /// Name of the field.
        field: &'static str,
        /// What is wrong with it, as a verb phrase.
        problem: String,
    },
    /// Two members have one id.
    #[error(
        "`id` `{id}` is taken, hint: ids are unique over all roles, wait for the other process to leave or choose another"
    )]
    Taken {
        /// The id.
        id: String,
    },
    /// More members than a cluster can have.
    #[error("`members` are {members}, must be at most {members_max}")]
    TooMany {
        /// How many there are.
        members: usize,
        /// How many there may be.
        members_max: usize,
    },
    /// A process that static membership does not list.
    #[error("`id` `{id}` is not a configured member, hint: add it to the member list of every process")]
    Unknown {
        /// The id.
        id: String,
    },
}

impl Error {
    pub(crate) fn invalid(member: &str, field: &'static str, problem: impl Into<String>) -> Self {
        Self::Invalid { member: member.to_owned(), field, problem: problem.into() }
    }

    /// The sort of fault.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Invalid { .. } | Self::TooMany { .. } => Kind::InvalidInput,
            Self::Taken { .. } => Kind::AlreadyExists,
            Self::Unknown { .. } => Kind::NotFound,
        }
    }

    /// Whether the same call can succeed later without a change by the caller: when the holder of an id leaves.
    pub fn retryable(&self) -> bool {
        matches!(self, Self::Taken { .. })
    }
}
