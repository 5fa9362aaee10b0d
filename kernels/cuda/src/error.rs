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
    /// A communicator between GPUs failed and was aborted, on this side at least: make another, or take another way.
    Communication,
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
    /// A kernel was compiled to something that is not what its launches expect.
    #[error("kernel `{kernel}` {problem}")]
    Kernel {
        /// Its entry.
        kernel: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The device has no memory left for it.
    #[error("the device has no room for {bytes} bytes: {problem}; hint: lower the memory budget, or wait")]
    OutOfMemory {
        /// What was asked for.
        bytes: usize,
        /// What the driver said.
        problem: String,
    },
    /// There is no page for a tile: the budget has room for none, or others use them all.
    #[error("no page is left: {problem}; hint: raise the memory budget, or wait")]
    OutOfPages {
        /// Why.
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
    /// A library of CUDA is missing, too old, or none.
    #[error("{library} cannot be used: {problem}; hint: {remedy}")]
    Library {
        /// Its name.
        library: &'static str,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The driver is older than what is needed.
    #[error(
        "the driver is too old: it knows CUDA {found}, {what} needs {needed}; hint: install a driver of release {release} or newer"
    )]
    DriverTooOld {
        /// Newest version of CUDA that the driver knows.
        found: String,
        /// The oldest that would do.
        needed: String,
        /// Who needs it.
        what: String,
        /// The release of the driver that brings it.
        release: &'static str,
    },
    /// There is a driver, but no device that it can use.
    #[error(
        "no CUDA device: {problem}; hint: see what `nvidia-smi` says and whether `CUDA_VISIBLE_DEVICES` or the container hides \
         them, or use `--device cpu`"
    )]
    NoDevice {
        /// What the driver said.
        problem: String,
    },
    /// There are devices, but not this one.
    #[error("there is no `cuda:{index}`; hint: this machine has {found}")]
    NoSuchDevice {
        /// The one that was asked for.
        index: u32,
        /// Those that are there.
        found: String,
    },
    /// The device cannot run the kernels.
    #[error(
        "the device is too old: its compute capability is {found}, kernels need {needed} or newer; hint: choose another with \
         `--device cuda:N`, or use `--device cpu`"
    )]
    DeviceTooOld {
        /// Its compute capability.
        found: String,
        /// The least.
        needed: String,
    },
    /// A call of a communicator failed; the communicator was aborted.
    #[error("{call} failed: {problem}; the communicator was aborted")]
    Communicator {
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
            Self::Invalid { .. } | Self::NoSuchDevice { .. } => Kind::InvalidInput,
            Self::Compile { .. } | Self::Kernel { .. } => Kind::Internal,
            Self::OutOfMemory { .. } | Self::OutOfPages { .. } => Kind::Exhausted,
            Self::Device { .. } => Kind::Device,
            Self::Library { .. }
            | Self::DriverTooOld { .. }
            | Self::NoDevice { .. }
            | Self::DeviceTooOld { .. } => Kind::Unavailable,
            Self::Communicator { .. } => Kind::Communication,
        }
    }

    /// Whether the same call can succeed later.
    pub fn retryable(&self) -> bool {
        self.kind() == Kind::Exhausted
    }
}
