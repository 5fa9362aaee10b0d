//! Copies to the host that were begun and are taken later.

use std::fmt;
use std::sync::Arc;

use bytemuck::Pod;

use crate::{Device, Error, Span};

/// Bytes of a device on their way to the host; abandoned when dropped, which waits for the copy. Whoever holds it keeps the memory as it is.
pub struct Departure {
    device: Arc<dyn Device>,
    number: u64,
    bytes: usize,
    is_over: bool,
}

impl Departure {
    /// Begins to copy `from`, memory of `device`; `None`: there is no room for it on the way.
    pub(crate) fn begin(device: &Arc<dyn Device>, from: Span<'_>) -> Result<Option<Self>, Error> {
        let departed = device.depart(from)?;
        let bytes = from.bytes();
        Ok(departed.map(|number| Self { device: Arc::clone(device), number, bytes, is_over: false }))
    }

    /// Waits for the elements and takes them. Refuses another number of them than departed.
    pub fn collect<T: Pod>(mut self, to: &mut [T]) -> Result<(), Error> {
        let to: &mut [u8] = bytemuck::cast_slice_mut(to);
        if to.len() != self.bytes {
            let problem = format!("has {} bytes, {} departed", to.len(), self.bytes);
            return Err(Error::Invalid { field: "departure", problem });
        }
        self.is_over = true;
        self.device.collect(self.number, to)
    }
}

impl Drop for Departure {
    fn drop(&mut self) {
        if !self.is_over {
            self.device.abandon(self.number);
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
