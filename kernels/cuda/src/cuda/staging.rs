//! Pinned memory between the host and the device, of bounded size. Copies from pageable memory would block the calling thread for
//! as long as everything that was queued before.
#![allow(unsafe_code, reason = "calls the driver and copies through pinned memory; see SAFETY")]

use cudarc::driver::{
    result::{self, DriverError},
    sys::{self, CUdeviceptr, CUstream},
};

/// Bytes of a chunk: enough to hide the start of a copy, which takes some microseconds.
pub(super) const CHUNK_BYTES: usize = 4 << 20;
/// Chunks for uploads: the next ones are filled while earlier ones are copied.
const UPLOAD_CHUNKS: usize = 4;
/// Chunks for downloads: one is filled while the other is read.
const DOWNLOAD_CHUNKS: usize = 2;
/// Small uploads share a chunk, each at a multiple of this.
const ALIGNMENT: usize = 256;

/// Pinned memory with an event that tells when the last copy from or to it is done.
pub(super) struct Chunk {
    pub(super) memory: *mut u8,
    pub(super) copied: sys::CUevent,
}

/// The way to the device.
pub(super) struct Uploads {
    chunks: Vec<Chunk>,
    /// Chunk that is written to, and how much of it is written.
    current: usize,
    used: usize,
}

/// The way from the device, on a stream of its own, so that copies do not queue up behind what others queue meanwhile.
pub(super) struct Downloads {
    chunks: Vec<Chunk>,
    stream: CUstream,
}

/// Two ways to the device and one from it, all or nothing. The context must be current.
pub(super) fn all() -> Result<([Uploads; 2], Downloads), DriverError> {
    let mut first = Uploads::new()?;
    let mut second = match Uploads::new() {
        Ok(second) => second,
        Err(error) => {
            first.release();
            return Err(error);
        }
    };
    match Downloads::new() {
        Ok(downloads) => Ok(([first, second], downloads)),
        Err(error) => {
            first.release();
            second.release();
            Err(error)
        }
    }
}

/// Takes pinned memory, all or nothing. The context must be current.
fn chunks(count: usize) -> Result<Vec<Chunk>, DriverError> {
    let mut chunks = Vec::with_capacity(count);
    for _ in 0..count {
        match Chunk::new() {
            Ok(chunk) => chunks.push(chunk),
            Err(error) => {
                release(&mut chunks);
                return Err(error);
            }
        }
    }
    Ok(chunks)
}

/// Gives chunks back. The context must be current, and no copy under way.
pub(super) fn release(chunks: &mut Vec<Chunk>) {
    for chunk in chunks.drain(..) {
        // SAFETY: made by `Chunk::new`, given back once. With a lost context both calls fail, and there is nothing to do.
        unsafe {
            let _ = result::event::destroy(chunk.copied);
            let _ = result::free_host(chunk.memory.cast());
        }
    }
}

impl Uploads {
    /// Takes the memory. The context must be current.
    pub(super) fn new() -> Result<Self, DriverError> {
        Ok(Self { chunks: chunks(UPLOAD_CHUNKS)?, current: 0, used: 0 })
    }

    /// Gives everything back. The context must be current, and no copy under way.
    pub(super) fn release(&mut self) {
        release(&mut self.chunks);
    }

    /// Queues a copy of `from` to the device; what is in `from` has been read when this returns.
    ///
    /// # Safety
    /// `address` must have room for it, and `stream` be one of the context in which this was made.
    pub(super) unsafe fn upload(
        &mut self,
        stream: CUstream,
        address: CUdeviceptr,
        from: &[u8],
    ) -> Result<(), DriverError> {
        let mut to = address;
        for piece in from.chunks(CHUNK_BYTES) {
            let at = self.room(stream, piece.len())?;
            // SAFETY: `room` gave as many bytes of pinned memory, which no copy that is under way reads.
            let pinned = unsafe { std::slice::from_raw_parts_mut(at, piece.len()) };
            pinned.copy_from_slice(piece);
            // SAFETY: the caller's promise for the device's side. The pinned bytes stay as they are until the event of their
            // chunk tells that the copy is done.
            unsafe { result::memcpy_htod_async(to, pinned, stream) }?;
            to += piece.len() as u64;
        }
        Ok(())
    }

    /// Pinned memory for `bytes`, at most a chunk, that no copy reads.
    fn room(&mut self, stream: CUstream, bytes: usize) -> Result<*mut u8, DriverError> {
        if self.used + bytes > CHUNK_BYTES {
            // SAFETY: events and stream live; an event that was never recorded counts as done.
            unsafe {
                result::event::record(self.chunks[self.current].copied, stream)?;
                self.current = (self.current + 1) % self.chunks.len();
                // Whatever becomes of the wait, the chunk is not written to before it succeeded.
                self.used = CHUNK_BYTES;
                result::event::synchronize(self.chunks[self.current].copied)?;
            }
            self.used = 0;
        }
        // SAFETY: within the chunk, by the test above.
        let at = unsafe { self.chunks[self.current].memory.add(self.used) };
        self.used = (self.used + bytes).next_multiple_of(ALIGNMENT).min(CHUNK_BYTES);
        Ok(at)
    }
}

impl Downloads {
    /// Takes the memory and a stream. The context must be current.
    pub(super) fn new() -> Result<Self, DriverError> {
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
        match chunks(DOWNLOAD_CHUNKS) {
            Ok(chunks) => Ok(Self { chunks, stream }),
            Err(error) => {
                // SAFETY: made above and used by nothing. The first error tells more.
                let _ = unsafe { result::stream::destroy(stream) };
                Err(error)
            }
        }
    }

    /// Copies from the device what the caller has waited for.
    ///
    /// # Safety
    /// `address` must have as many bytes, which nothing that is queued changes, in the context in which this was made.
    pub(super) unsafe fn download(&mut self, address: CUdeviceptr, to: &mut [u8]) -> Result<(), DriverError> {
        // SAFETY: the caller's promise.
        let outcome = unsafe { self.copy_down(address, to) };
        if outcome.is_err() {
            // Copies that were queued before the fault may still write to the chunks. The first error tells more.
            // SAFETY: the stream lives.
            let _ = unsafe { result::stream::synchronize(self.stream) };
        }
        outcome
    }

    /// # Safety
    /// As for [`Self::download`]; after an error copies may be under way.
    unsafe fn copy_down(&mut self, address: CUdeviceptr, to: &mut [u8]) -> Result<(), DriverError> {
        let mut from = address;
        let mut arriving: Option<(&Chunk, &mut [u8])> = None;
        for (index, piece) in to.chunks_mut(CHUNK_BYTES).enumerate() {
            let chunk = &self.chunks[index % self.chunks.len()];
            // SAFETY: the last copy to this chunk was waited for and read, two pieces ago or by an earlier call.
            let pinned = unsafe { std::slice::from_raw_parts_mut(chunk.memory, piece.len()) };
            // SAFETY: the caller's promise for the device's side; nobody looks at the pinned bytes before the event.
            unsafe {
                result::memcpy_dtoh_async(pinned, from, self.stream)?;
                result::event::record(chunk.copied, self.stream)?;
            }
            from += piece.len() as u64;
            if let Some((chunk, piece)) = arriving.replace((chunk, piece)) {
                chunk.take(piece)?;
            }
        }
        arriving.map_or(Ok(()), |(chunk, piece)| chunk.take(piece))
    }

    /// Gives everything back. The context must be current, and no copy under way.
    pub(super) fn release(&mut self) {
        // SAFETY: made by `new` and given back once. With a lost context the call fails, and there is nothing to do.
        let _ = unsafe { result::stream::destroy(self.stream) };
        release(&mut self.chunks);
    }
}

impl Chunk {
    pub(super) fn new() -> Result<Self, DriverError> {
        // SAFETY: a context is current; the memory is written before it is read.
        let memory = unsafe { result::malloc_host(CHUNK_BYTES, 0) }?.cast::<u8>();
        match result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING) {
            Ok(copied) => Ok(Self { memory, copied }),
            Err(error) => {
                // SAFETY: taken above. The first error tells more.
                let _ = unsafe { result::free_host(memory.cast()) };
                Err(error)
            }
        }
    }

    /// Waits for the copy to this chunk, and reads it.
    fn take(&self, to: &mut [u8]) -> Result<(), DriverError> {
        // SAFETY: the event lives and was recorded behind the copy.
        unsafe { result::event::synchronize(self.copied) }?;
        // SAFETY: the copy has written as many bytes, and none is under way.
        to.copy_from_slice(unsafe { std::slice::from_raw_parts(self.memory, to.len()) });
        Ok(())
    }
}
