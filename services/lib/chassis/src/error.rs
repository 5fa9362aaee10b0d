//! Errors of the chassis.

use std::{io, net::SocketAddr};

use crate::ConfigError;

/// What sort of fault an [`Error`] is; a closed set that the binary maps to exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The configuration is at fault.
    Config,
    /// A listener could not be opened.
    Bind,
    /// The process could not be set up.
    Setup,
}

/// Faults of starting a process; each names what was tried and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// One or more sources of the configuration are at fault.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A listen address cannot be understood or found.
    #[error("cannot listen on `{address}`: {problem}, hint: {hint}")]
    Address {
        /// The address as it was written.
        address: String,
        /// What is wrong with it.
        problem: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// The system refused the socket.
    #[error("cannot listen on `{address}`: {cause}, hint: {hint}")]
    Bind {
        /// The resolved address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        cause: io::Error,
        /// What to do about it.
        hint: &'static str,
    },
    /// Logging was set up before, or its filter makes no sense.
    #[error("cannot set up logging: {problem}")]
    Telemetry {
        /// What is wrong.
        problem: String,
    },
    /// The system refused a signal handler.
    #[error("cannot listen for signals: {cause}")]
    Signals {
        /// What the system said.
        #[source]
        cause: io::Error,
    },
}

impl Error {
    /// The sort of fault.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Config(_) => Kind::Config,
            Self::Address { .. } | Self::Bind { .. } => Kind::Bind,
            Self::Telemetry { .. } | Self::Signals { .. } => Kind::Setup,
        }
    }

    /// Whether the same call can succeed later without a change by the caller: only when a port is taken for now.
    pub fn retryable(&self) -> bool {
        matches!(self, Self::Bind { cause, .. } if cause.kind() == io::ErrorKind::AddrInUse)
    }
}
