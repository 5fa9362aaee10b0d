//! Copies to the host that were begun, on a stream of their own, to pinned memory of bounded size.
#![allow(unsafe_code, reason = "calls the driver and reads pinned memory; see SAFETY")]

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use cudarc::driver::{
    result::{self, DriverError},
    sys::{CUdeviceptr, CUstream},
};

use super::staging::{CHUNK_BYTES, Chunk, release};
use super::{CudaDevice, locked};
use crate::{Error, Span};

/// Chunks that are made at most, when they are needed first: 128 MiB hold keys and values of two layers, of 8 heads of 128 and chunks of
/// 8,192 rows.
const CHUNKS_MAX: usize = 32;

/// Copies that were begun.
#[derive(Default)]
pub(super) struct Departures {
    copies: Mutex<Copies>,
    /// Those that were not, for want of room.
    refused: AtomicU64,
}

impl Departures {
    /// How many had no room.
    pub(super) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Gives everything back. The context must be current.
    pub(super) fn release(&mut self) {
        self.copies.get_mut().unwrap_or_else(PoisonError::into_inner).release();
    }
}

/// Copies that are under way, and the memory for them.
#[derive(Default)]
struct Copies {
    /// Made for the first of them.
    stream: Option<CUstream>,
    idle: Vec<Chunk>,
    /// Chunks that copies may still write to: nobody learned that they are done.
    lost: Vec<Chunk>,
    made: usize,
    under_way: HashMap<u64, UnderWay>,
    begun: u64,
}

/// A copy: its chunks, all full but the last, and its bytes. The event of the last chunk lies behind all of it.
struct UnderWay {
    chunks: Vec<Chunk>,
    bytes: usize,
}

impl Copies {
    fn stream(&mut self) -> Result<CUstream, DriverError> {
        if let Some(stream) = self.stream {
            return Ok(stream);
        }
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
        self.stream = Some(stream);
        Ok(stream)
    }

    /// So many chunks; `None`: there are fewer, or no pinned memory for them.
    fn take(&mut self, count: usize) -> Option<Vec<Chunk>> {
        if self.idle.len() + (CHUNKS_MAX - self.made) < count {
            return None;
        }
        while self.idle.len() < count {
            self.idle.push(Chunk::new().ok()?);
            self.made += 1;
        }
        Some(self.idle.split_off(self.idle.len() - count))
    }

    /// Queues the copy of `bytes` at `address` behind what its stream waits for.
    ///
    /// # Safety
    /// The memory must have as many bytes, in the context in which this was made.
    unsafe fn begin(
        &mut self,
        (stream, chunks): (CUstream, Vec<Chunk>),
        (address, bytes): (CUdeviceptr, usize),
    ) -> Result<u64, DriverError> {
        // SAFETY: the caller's promise.
        if let Err(error) = unsafe { queue(stream, &chunks, (address, bytes)) } {
            // Some may have been queued.
            self.lost.extend(chunks);
            return Err(error);
        }
        self.begun += 1;
        self.under_way.insert(self.begun, UnderWay { chunks, bytes });
        Ok(self.begun)
    }

    /// Gives everything back. The context must be current.
    fn release(&mut self) {
        if let Some(stream) = self.stream.take() {
            // SAFETY: made by `stream` and given back once. With a lost context the calls fail, and there is nothing to do.
            unsafe {
                let _ = result::stream::synchronize(stream);
                let _ = result::stream::destroy(stream);
            }
        }
        for (_, mut copy) in self.under_way.drain() {
            release(&mut copy.chunks);
        }
        release(&mut self.idle);
        release(&mut self.lost);
    }
}

/// # Safety
/// As for [`Copies::begin`].
unsafe fn queue(
    stream: CUstream,
    chunks: &[Chunk],
    (address, bytes): (CUdeviceptr, usize),
) -> Result<(), DriverError> {
    for (index, chunk) in chunks.iter().enumerate() {
        let done = index * CHUNK_BYTES;
        // SAFETY: nobody else has the chunk, and nothing looks at it before the event; the caller's promise for the device's side.
        unsafe {
            let pinned = std::slice::from_raw_parts_mut(chunk.memory, (bytes - done).min(CHUNK_BYTES));
            result::memcpy_dtoh_async(pinned, address + done as u64, stream)?;
        }
    }
    match chunks.last() {
        // SAFETY: both live.
        Some(last) => unsafe { result::event::record(last.copied, stream) },
        None => Ok(()),
    }
}

impl UnderWay {
    fn wait(&self) -> Result<(), DriverError> {
        match self.chunks.last() {
            // SAFETY: the event lives and was recorded behind the copy.
            Some(last) => unsafe { result::event::synchronize(last.copied) },
            None => Ok(()),
        }
    }

    /// Reads what has been waited for.
    fn read(&self, to: &mut [u8]) {
        for (chunk, to) in self.chunks.iter().zip(to.chunks_mut(CHUNK_BYTES)) {
            // SAFETY: the copy has written as many bytes, and is done.
            to.copy_from_slice(unsafe { std::slice::from_raw_parts(chunk.memory, to.len()) });
        }
    }
}

impl CudaDevice {
    /// See [`crate::Device::depart`].
    pub(super) fn begin_departure(&self, from: Span<'_>) -> Result<Option<u64>, Error> {
        self.enter()?;
        let mut departures = locked(&self.departures.copies);
        let stream = self.check("cuStreamCreate", departures.stream())?;
        let Some(chunks) = departures.take(from.bytes().div_ceil(CHUNK_BYTES)) else {
            self.departures.refused.fetch_add(1, Ordering::Relaxed);
            return Ok(None);
        };
        if let Err(error) = self.order_after_main(stream) {
            departures.idle.extend(chunks);
            return Err(error);
        }
        // SAFETY: the span lies in a buffer; that it stays there is the promise of who holds the departure.
        let begun = unsafe { departures.begin((stream, chunks), (from.address(), from.bytes())) };
        self.check("cuMemcpyDtoHAsync", begun).map(Some)
    }

    /// Ends a copy: waits for it and, where somebody wants them, takes its bytes.
    pub(super) fn end_departure(&self, departure: u64, to: Option<&mut [u8]>) -> Result<(), Error> {
        let copy = locked(&self.departures.copies).under_way.remove(&departure);
        let invalid = |problem| Err(Error::Invalid { field: "departure", problem });
        let Some(copy) = copy else { return invalid(format!("{departure} is none that is under way")) };
        // Others go on meanwhile.
        let waited = self.enter().and_then(|_| self.check("cuEventSynchronize", copy.wait()));
        let mut told = waited;
        if let (Ok(()), Some(to)) = (&told, to) {
            match to.len() == copy.bytes {
                true => copy.read(to),
                false => told = invalid(format!("has {} bytes, {} are taken", copy.bytes, to.len())),
            }
        }
        let mut departures = locked(&self.departures.copies);
        match &told {
            Ok(()) | Err(Error::Invalid { .. }) => departures.idle.extend(copy.chunks),
            Err(_) => departures.lost.extend(copy.chunks),
        }
        told
    }
}
