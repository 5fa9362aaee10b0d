//! What kernels run on.

use crate::{Error, Launch, Memory, Span};

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
    /// New memory, aligned to 256 bytes; never at 0, not even for no bytes.
    fn allocate(&self, bytes: usize) -> Result<Memory, Error>;
    /// Gives memory back, once what was launched before is done.
    fn free(&self, memory: Memory);
    /// Copies to the device, as many bytes as there are in both; `from` may be changed as soon as this returns.
    fn upload(&self, to: Span<'_>, from: &[u8]) -> Result<(), Error>;
    /// The same by a way of its own, for much: where it is full the caller waits, and small copies of others do not.
    fn upload_apart(&self, to: Span<'_>, from: &[u8]) -> Result<(), Error> {
        self.upload(to, from)
    }
    /// Waits for what was launched before, then copies from the device, as many bytes as there are in both. Other threads may go on meanwhile.
    fn download(&self, from: Span<'_>, to: &mut [u8]) -> Result<(), Error>;
    /// Queues a kernel. Faults inside it may be told by a later call.
    fn launch(&self, launch: &Launch<'_>) -> Result<(), Error>;
    /// Waits for everything launched.
    fn synchronize(&self) -> Result<(), Error>;
}
