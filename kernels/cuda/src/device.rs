//! What kernels run on.

use crate::{Error, Launch};

/// Memory and a queue of launches: a CUDA device, or, in tests, the emulator that runs the same sources on the CPU. Calls
/// take effect in the order in which they are made.
pub trait Device: Send + Sync + std::fmt::Debug {
    /// What a person calls it.
    fn name(&self) -> String;
    /// Streaming multiprocessors.
    fn multiprocessors(&self) -> usize;
    /// Compute capability as 10 × major + minor: 80, 90, 100.
    fn capability(&self) -> u32;
    /// Most bytes of shared memory that a thread block may ask for.
    fn shared_bytes_limit(&self) -> usize;
    /// Address of new memory, aligned to 256 bytes; never 0, not even for no bytes.
    fn allocate(&self, bytes: usize) -> Result<u64, Error>;
    /// Gives memory back, once what was launched before is done.
    fn free(&self, address: u64, bytes: usize);
    /// Copies to the device; `from` may be changed as soon as this returns.
    fn upload(&self, address: u64, from: &[u8]) -> Result<(), Error>;
    /// Waits for what was launched before, then copies from the device.
    fn download(&self, address: u64, to: &mut [u8]) -> Result<(), Error>;
    /// Queues a kernel. Faults inside it may be told by a later call.
    fn launch(&self, launch: &Launch<'_>) -> Result<(), Error>;
    /// Waits for everything launched.
    fn synchronize(&self) -> Result<(), Error>;
}
