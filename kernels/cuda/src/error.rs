//! Faults of the GPU half.

/// What sort of fault an [`Error`] is; a closed set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The caller passed something that can never work.
    InvalidInput,
    /// The device or its memory is in use: the same call may succeed later.
    Exhausted,
    /// This machine lacks a device, a driver or a library.
    Unavailable,
    /// The device failed; its context is lost.
    Device,
    /// A kernel does not compile or does not fit the device: a bug of ours.
    Internal,
}

/// Faults of the GPU half.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value that can never work.
    #[error("`{field}` {problem}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
    /// A kernel could not be compiled.
    #[error("kernel `{kernel}` does not compile for {architecture}:\n{log}")]
    Compile {
        /// Its entry.
        kernel: String,
        /// What it was compiled for.
        architecture: String,
        /// What the compiler said.
        log: String,
    },
    /// The device has no memory left for it.
    #[error("the device has no room for {bytes} bytes: {problem}; hint: lower the memory budget, or wait")]
    OutOfMemory {
        /// What was asked for.
        bytes: usize,
        /// What the driver said.
        problem: String,
    },
    /// The device, or what stands for it, refused a call.
    #[error("{call} failed: {problem}")]
    Device {
        /// What was being done.
        call: &'static str,
        /// What was said.
        problem: String,
    },
}

impl Error {
    /// The sort of fault.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Invalid { .. } => Kind::InvalidInput,
            Self::Compile { .. } => Kind::Internal,
            Self::OutOfMemory { .. } => Kind::Exhausted,
            Self::Device { .. } => Kind::Device,
        }
    }

    /// Whether the same call can succeed later.
    pub fn retryable(&self) -> bool {
        self.kind() == Kind::Exhausted
    }
}
