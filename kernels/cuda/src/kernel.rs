//! Kernels as data: source, constants, entry; and a launch of one.

use bytemuck::Pod;

/// A file of `kernels/cuda/source`, which is in the binary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source {
    /// File name.
    pub name: &'static str,
    /// Text.
    pub text: &'static str,
}

/// An entry of a source, compiled with constants.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Where it is written.
    pub source: Source,
    /// Name of the `extern "C"` function.
    pub entry: &'static str,
    /// Preprocessor constants, by which one source makes many kernels (head size, element type, …); sorted by name.
    pub constants: Vec<(&'static str, i64)>,
}

/// A kernel with its grid and its one argument: a `#[repr(C)]` structure without padding, the same as in the source.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// What runs.
    pub kernel: &'a Kernel,
    /// Thread blocks.
    pub grid: [u32; 3],
    /// Threads of a block: a multiple of 32, up to 1,024.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Bytes of the argument.
    pub argument: &'a [u8],
}

impl<'a> Launch<'a> {
    /// A launch with `argument`, without shared memory.
    pub fn new<T: Pod>(kernel: &'a Kernel, grid: [u32; 3], threads: u32, argument: &'a T) -> Self {
        Self { kernel, grid, threads, shared_bytes: 0, argument: bytemuck::bytes_of(argument) }
    }

    /// The same with shared memory.
    #[must_use]
    pub fn shared(self, shared_bytes: u32) -> Self {
        Self { shared_bytes, ..self }
    }
}
