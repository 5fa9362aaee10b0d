//! Device memory that somebody owns.

use std::fmt;
use std::sync::Arc;

use bytemuck::Pod;

use crate::{Device, Error};

/// Device memory; given back when dropped, after what was launched before is done.
pub struct Buffer {
    device: Arc<dyn Device>,
    address: u64,
    bytes: usize,
}

impl Buffer {
    /// Memory without defined content.
    pub fn new(device: &Arc<dyn Device>, bytes: usize) -> Result<Self, Error> {
        let address = device.allocate(bytes)?;
        Ok(Self { device: Arc::clone(device), address, bytes })
    }

    /// Memory with a copy of `elements`.
    pub fn from_slice<T: Pod>(device: &Arc<dyn Device>, elements: &[T]) -> Result<Self, Error> {
        let bytes: &[u8] = bytemuck::cast_slice(elements);
        let buffer = Self::new(device, bytes.len())?;
        device.upload(buffer.address, bytes)?;
        Ok(buffer)
    }

    /// Waits for what was launched before and copies everything back.
    ///
    /// # Panics
    /// When the size is no multiple of an element's.
    pub fn to_vec<T: Pod>(&self) -> Result<Vec<T>, Error> {
        assert!(self.bytes.is_multiple_of(size_of::<T>()), "read as what it is");
        let mut elements = vec![T::zeroed(); self.bytes / size_of::<T>()];
        self.device.download(self.address, bytemuck::cast_slice_mut(&mut elements))?;
        Ok(elements)
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
        self.device.free(self.address, self.bytes);
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer").field("address", &self.address).field("bytes", &self.bytes).finish()
    }
}
