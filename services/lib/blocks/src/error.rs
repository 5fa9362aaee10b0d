//! Errors of block bookkeeping.

/// What sort of fault an [`Error`] is; a closed set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The caller passed something that can never work.
    InvalidInput,
    /// The thing asked for is not there.
    NotFound,
    /// Bytes did not match their checksum, key or shape.
    Corrupt,
    /// No room now, or a limit is reached.
    NoSpace,
}

/// Faults of block bookkeeping; each names the field.
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
    /// A block, view or pending write is unknown.
    #[error("{what} is not held")]
    NotFound {
        /// What was looked for.
        what: String,
    },
    /// Bytes did not match their checksum, key or shape.
    #[error("{what} is corrupt: {problem}")]
    Corrupt {
        /// What was checked.
        what: String,
        /// What did not match.
        problem: String,
    },
    /// The budget is used up by blocks that cannot be evicted.
    #[error(
        "no room for {needed_bytes} bytes: {used_bytes} of {budget_bytes} are in use and nothing can be evicted"
    )]
    NoSpace {
        /// Bytes asked for.
        needed_bytes: u64,
        /// Bytes in use.
        used_bytes: u64,
        /// The budget.
        budget_bytes: u64,
    },
    /// One tenant would take so much that too little was left for others.
    #[error(
        "the tenant has {taken} of the {limit} {what} that there may be, and more would leave too little for others; hint: retry when \
         some ended, or raise `kvstore.tenant_percent` (it is {percent}) or the limit"
    )]
    Share {
        /// What it takes too much of, in the plural.
        what: &'static str,
        /// What it has.
        taken: u64,
        /// What there may be, of all tenants.
        limit: u64,
        /// What one tenant alone may have.
        percent: u32,
    },
    /// A bounded set is full.
    #[error("there are {limit} {what} already, the most allowed")]
    Full {
        /// What there is too much of, in the plural.
        what: &'static str,
        /// Its limit.
        limit: u64,
    },
}

impl Error {
    /// The sort of fault.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Invalid { .. } => Kind::InvalidInput,
            Self::NotFound { .. } => Kind::NotFound,
            Self::Corrupt { .. } => Kind::Corrupt,
            Self::NoSpace { .. } | Self::Share { .. } | Self::Full { .. } => Kind::NoSpace,
        }
    }

    /// Whether the same call can succeed later without a change by the caller.
    pub fn retryable(&self) -> bool {
        self.kind() == Kind::NoSpace
    }
}
