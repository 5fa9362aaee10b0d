//! What kernels run on.

use crate::{Error, Launch, Memory, Span};

/// What is done in order, one after the other; two of them at once, where neither was told to wait for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Queue {
    /// Launches, and all copies but those below.
    Compute,
    /// Copies of much to the device, beside launches.
    Arrivals,
}

/// Memory and two queues: a CUDA device, or, in tests, the emulator that runs the same sources on the CPU. Calls take effect in the order
/// in which they are made, but for [`Self::upload_apart`].
pub trait Device: Send + Sync + std::fmt::Debug {
    /// What a person calls it.
    fn name(&self) -> String;
    /// Streaming multiprocessors.
    fn multiprocessors(&self) -> usize;
    /// Compute capability as 10 × major + minor: 80, 90, 100.
    fn capability(&self) -> u32;
    /// Most bytes of shared memory that a thread block may ask for.
    fn shared_bytes_limit(&self) -> usize;
    /// New memory, aligned to 256 bytes; never at 0, not even for no bytes. For [`Queue::Compute`], from now on.
    fn allocate(&self, bytes: usize) -> Result<Memory, Error>;
    /// Gives memory back, once what was queued before on [`Queue::Compute`] is done.
    fn free(&self, memory: Memory);
    /// Copies to the device, as many bytes as there are in both; `from` may be changed as soon as this returns.
    fn upload(&self, to: Span<'_>, from: &[u8]) -> Result<(), Error>;
    /// The same on [`Queue::Arrivals`], by staging memory of its own: where that is full the caller waits, and small copies of others do not.
    /// Nobody may use what is copied before [`Queue::Compute`] was told to wait for it, and the copy may begin before launches that were
    /// queued earlier are done, unless this queue was told to wait for them: they may still use the memory, or what lay there before.
    fn upload_apart(&self, to: Span<'_>, from: &[u8]) -> Result<(), Error>;
    /// A mark behind what is queued by now; given back by [`Self::forget`]. [`crate::Mark`] holds one.
    fn mark(&self, queue: Queue) -> Result<u64, Error>;
    /// What is queued on `queue` from now on begins when what lies before the mark is done. Nobody waits in this call.
    fn hold_up(&self, queue: Queue, mark: u64) -> Result<(), Error>;
    /// Gives a mark back; waits that were queued stay.
    fn forget(&self, mark: u64);
    /// Waits for what was launched before, then copies from the device, as many bytes as there are in both. Other threads may go on meanwhile.
    fn download(&self, from: Span<'_>, to: &mut [u8]) -> Result<(), Error>;
    /// Begins such a copy: it waits for what was launched before, and neither for what comes later nor that for it. Until it is over nobody may
    /// write to the memory or give it back. `None`: staging memory, which is bounded, has no room for the bytes, and nothing was begun.
    /// [`crate::Departure`] holds one.
    fn depart(&self, from: Span<'_>) -> Result<Option<u64>, Error>;
    /// Times that [`Self::depart`] had no room so far; 0 where nobody counts. Waits for nothing.
    fn refused_departures(&self) -> u64 {
        0
    }
    /// Waits for a copy that was begun, and so for those that were begun before it, and takes its bytes, as many as departed. It is over,
    /// whatever is said. Other threads may go on meanwhile.
    fn collect(&self, departure: u64, to: &mut [u8]) -> Result<(), Error>;
    /// Waits for a copy that was begun and that nobody wants any more.
    fn abandon(&self, departure: u64);
    /// Queues a kernel on [`Queue::Compute`]. Faults inside it may be told by a later call.
    fn launch(&self, launch: &Launch<'_>) -> Result<(), Error>;
    /// Waits for everything queued.
    fn synchronize(&self) -> Result<(), Error>;
}
