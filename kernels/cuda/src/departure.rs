//! Copies to the host that were begun and are taken later.

use std::fmt;
use std::sync::Arc;

use bytemuck::Pod;

use crate::{Buffer, Error};

/// Bytes of a device on their way to the host; abandoned when dropped, which waits for the copy. The memory is not given back
/// before it is over.
pub struct Departure {
    buffer: Arc<Buffer>,
    number: u64,
    bytes: usize,
    is_over: bool,
}

impl Departure {
    /// A copy of so many bytes of `buffer` that its device has begun.
    pub(crate) fn new(buffer: Arc<Buffer>, number: u64, bytes: usize) -> Self {
        Self { buffer, number, bytes, is_over: false }
    }

    /// Waits for the elements and takes them. Refuses another number of them than departed.
    pub fn collect<T: Pod>(mut self, to: &mut [T]) -> Result<(), Error> {
        let to: &mut [u8] = bytemuck::cast_slice_mut(to);
        if to.len() != self.bytes {
            let problem = format!("has {} bytes, {} departed", to.len(), self.bytes);
            return Err(Error::Invalid { field: "departure", problem });
        }
        self.is_over = true;
        self.buffer.device().collect(self.number, to)
    }
}

impl Drop for Departure {
    fn drop(&mut self) {
        if !self.is_over {
            self.buffer.device().abandon(self.number);
        }
    }
}

impl fmt::Debug for Departure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Departure")
            .field("number", &self.number)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}
