//! Errors of models.

use std::path::PathBuf;

/// What sort of fault an [`Error`] is; a closed set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The caller passed something that can never work.
    InvalidInput,
    /// A model file is damaged or lies about itself, or computes numbers that are not finite.
    Corrupt,
    /// A model asks for something that is not implemented.
    Unsupported,
    /// A file cannot be read.
    Io,
    /// The device or its memory is in use: the same call may succeed later.
    Exhausted,
    /// The device failed.
    Device,
}

/// Faults of models; each names the field, tensor or file and, where there is one, the remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field has a value that can never work.
    #[error("`{field}` {problem}")]
    Invalid {
        /// Name of the field.
        field: String,
        /// What is wrong with it, as a verb phrase.
        problem: String,
    },
    /// A model file is damaged or lies about itself.
    #[error("{path}: `{field}` {problem}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Header field, metadata key or tensor.
        field: String,
        /// What is wrong with it, as a verb phrase.
        problem: String,
    },
    /// A model asks for something that is not implemented.
    #[error("{path}: {feature} is not supported; hint: {hint}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// For example "architecture `mamba`".
        feature: String,
        /// What would work.
        hint: String,
    },
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A computed number is not finite: damaged weights, or activations that overflow.
    #[error("{what} is `{value}`, not a finite number; hint: check the model file's digest")]
    NotFinite {
        /// Which number.
        what: String,
        /// NaN or an infinity.
        value: f32,
    },
    /// The device that a backend computes on lacks room or failed.
    #[error("the device cannot compute: {source}")]
    Device {
        /// It lacks room, or time: the same call may succeed later.
        exhausted: bool,
        /// What it said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Error {
    /// The sort of fault.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Invalid { .. } => Kind::InvalidInput,
            Self::Corrupt { .. } | Self::NotFinite { .. } => Kind::Corrupt,
            Self::Unsupported { .. } => Kind::Unsupported,
            Self::Io { .. } => Kind::Io,
            Self::Device { exhausted: true, .. } => Kind::Exhausted,
            Self::Device { exhausted: false, .. } => Kind::Device,
        }
    }

    /// Whether the same call can succeed later without a change by the caller.
    pub fn retryable(&self) -> bool {
        matches!(self.kind(), Kind::Io | Kind::Exhausted)
    }
}
