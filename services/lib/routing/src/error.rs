//! Errors of routing.

/// What sort of fault an [`Error`] is; a closed set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The caller passed something that can never work.
    InvalidInput,
    /// A limit is reached; retry later.
    Overloaded,
    /// Nobody can take the work now; retry later.
    Unavailable,
}

/// Faults of routing; each names what was asked for.
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
    /// No worker of a role, or every one has already failed this request.
    #[error(
        "no {role} worker is left: {known} known, {excluded} of them failed this request, hint: start one, or retry later"
    )]
    NoWorker {
        /// The role.
        role: &'static str,
        /// Workers that were candidates.
        known: usize,
        /// Candidates that were excluded.
        excluded: usize,
    },
    /// Every worker of a role has all the work that it may have.
    #[error("every {role} worker is at its limit, hint: retry later, or add a worker")]
    Overloaded {
        /// The role.
        role: &'static str,
    },
    /// The table itself is full.
    #[error("{what} are at their limit of {limit}, hint: retry later")]
    Full {
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// There is no shard to place blocks on.
    #[error("the cluster has no shards, hint: start a `kvstore`")]
    NoShards,
}

impl Error {
    /// The sort of fault.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Invalid { .. } => Kind::InvalidInput,
            Self::Overloaded { .. } | Self::Full { .. } => Kind::Overloaded,
            Self::NoWorker { .. } | Self::NoShards => Kind::Unavailable,
        }
    }

    /// Whether the same call can succeed later without a change by the caller.
    pub fn retryable(&self) -> bool {
        !matches!(self, Self::Invalid { .. })
    }
}
