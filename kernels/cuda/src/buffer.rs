//! Device memory that somebody owns, and parts of it.
#![allow(unsafe_code, reason = "says whose memory an address is; see SAFETY")]

use std::fmt;
use std::sync::Arc;

use bytemuck::Pod;

use crate::{Departure, Device, Error};

/// Memory that a device gave out and gets back once.
#[derive(Debug, PartialEq, Eq)]
pub struct Memory {
    address: u64,
    bytes: usize,
}

impl Memory {
    /// What a [`Device`] gives out.
    ///
    /// # Safety
    /// The device that it is given back to must have allocated it, and nobody else may name it.
    pub unsafe fn new(address: u64, bytes: usize) -> Self {
        Self { address, bytes }
    }

    /// Where it lies on the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Device memory; given back when dropped, after what was launched before is done.
pub struct Buffer {
    device: Arc<dyn Device>,
    address: u64,
    bytes: usize,
}

impl Buffer {
    /// Memory without defined content.
    pub fn new(device: &Arc<dyn Device>, bytes: usize) -> Result<Self, Error> {
        let memory = device.allocate(bytes)?;
        Ok(Self { device: Arc::clone(device), address: memory.address, bytes: memory.bytes })
    }

    /// Memory with a copy of `elements`.
    pub fn from_slice<T: Pod>(device: &Arc<dyn Device>, elements: &[T]) -> Result<Self, Error> {
        let bytes: &[u8] = bytemuck::cast_slice(elements);
        let buffer = Self::new(device, bytes.len())?;
        buffer.span(0, bytes.len())?.write(bytes)?;
        Ok(buffer)
    }

    /// Waits for what was launched before and copies everything back.
    ///
    /// # Panics
    /// When the size is no multiple of an element's.
    pub fn to_vec<T: Pod>(&self) -> Result<Vec<T>, Error> {
        assert!(self.bytes.is_multiple_of(size_of::<T>()), "read as what it is");
        let mut elements = vec![T::zeroed(); self.bytes / size_of::<T>()];
        self.span(0, self.bytes)?.read(&mut elements)?;
        Ok(elements)
    }

    /// A part of it. Refuses what does not lie within.
    pub fn span(&self, offset: usize, bytes: usize) -> Result<Span<'_>, Error> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            let problem = format!("of {bytes} bytes at {offset} ends beyond {} bytes", self.bytes);
            return Err(Error::Invalid { field: "span", problem });
        }
        Ok(Span { buffer: self, offset, bytes })
    }

    /// All of it.
    pub fn whole(&self) -> Span<'_> {
        Span { buffer: self, offset: 0, bytes: self.bytes }
    }

    /// Begins to copy a part of it behind what was launched before, to be taken later; `None`: there is no room for the bytes on the way. Refuses
    /// what does not lie within. Until it is over nobody may write to that part.
    pub fn depart(self: &Arc<Self>, offset: usize, bytes: usize) -> Result<Option<Departure>, Error> {
        let departed = self.device.depart(self.span(offset, bytes)?)?;
        Ok(departed.map(|number| Departure::new(Arc::clone(self), number, bytes)))
    }

    /// Whose it is.
    pub(crate) fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Where it lies on the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated by the same device for this buffer, which is gone with this.
        self.device.free(unsafe { Memory::new(self.address, self.bytes) });
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer").field("address", &self.address).field("bytes", &self.bytes).finish()
    }
}

/// Some bytes of a buffer: what is copied to or from, and what launches are given.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    buffer: &'a Buffer,
    offset: usize,
    bytes: usize,
}

impl<'a> Span<'a> {
    /// The first so many of them.
    pub fn first(&self, bytes: usize) -> Result<Self, Error> {
        self.buffer.span(self.offset, bytes.min(self.bytes)).and_then(|span| span.check(bytes).map(|()| span))
    }

    /// The rest from a byte on; none where it has no such byte.
    pub fn after(&self, bytes: usize) -> Self {
        let bytes = bytes.min(self.bytes);
        Self { offset: self.offset + bytes, bytes: self.bytes - bytes, ..*self }
    }

    /// Where they lie on the device.
    pub fn address(&self) -> u64 {
        self.buffer.address + self.offset as u64
    }

    /// How many there are.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where it lies, for a kernel that uses so many elements of it, the product of `counts`. Refuses what is shorter, as the argument
    /// `field` of the launch.
    pub fn for_kernel(
        &self,
        field: &'static str,
        counts: &[usize],
        element_bytes: usize,
    ) -> Result<u64, Error> {
        let needed = counts.iter().fold(element_bytes, |bytes, &count| bytes.saturating_mul(count));
        if needed <= self.bytes {
            return Ok(self.address());
        }
        let problem = format!("has {} bytes, the launch uses {needed}: {counts:?}", self.bytes);
        Err(Error::Invalid { field, problem })
    }

    /// Copies elements there, as many as there is room for. What they lie in may be changed as soon as this returns.
    pub fn write<T: Pod>(&self, from: &[T]) -> Result<(), Error> {
        self.buffer.device.upload(*self, bytemuck::cast_slice(from))
    }

    /// The same for much at once, beside launches: who is to use it, and what must be done before, is told by marks
    /// ([`Device::upload_apart`]).
    pub fn write_apart<T: Pod>(&self, from: &[T]) -> Result<(), Error> {
        self.buffer.device.upload_apart(*self, bytemuck::cast_slice(from))
    }

    /// Waits for what was launched before, then copies them all.
    pub fn read<T: Pod>(&self, to: &mut [T]) -> Result<(), Error> {
        self.buffer.device.download(*self, bytemuck::cast_slice_mut(to))
    }

    /// Refuses copies of another length.
    pub fn check(&self, len: usize) -> Result<(), Error> {
        if len == self.bytes {
            return Ok(());
        }
        let problem = format!("has {} bytes of the device, {len} of the host", self.bytes);
        Err(Error::Invalid { field: "span", problem })
    }
}
