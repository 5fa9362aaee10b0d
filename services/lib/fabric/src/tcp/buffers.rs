//! Memory of the lane's own for bodies whose receiver gave none: used again, so that no page of it is new to the process.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use longshore_proto::types::{TileMemory, TileRoom};

/// Bytes that are kept for later.
const KEPT_BYTES_MAX: usize = 32 << 20;

/// Buffers that come back; clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Buffers {
    free: Arc<Mutex<Free>>,
}

/// Last in, first out: what was used just now is in the caches.
#[derive(Debug, Default)]
struct Free {
    buffers: Vec<Vec<u8>>,
    bytes: usize,
}

/// One of them, for a body.
struct Buffer {
    bytes: Vec<u8>,
    home: Weak<Mutex<Free>>,
}

impl Buffers {
    /// Room for `bytes`.
    pub(crate) fn take(&self, bytes: usize) -> Box<dyn TileRoom> {
        let kept = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            // Tiles of a deployment are of one size; what is of another one goes away by and by.
            let kept = free.buffers.pop();
            free.bytes -= kept.as_ref().map_or(0, Vec::capacity);
            kept.filter(|kept| kept.capacity() >= bytes && kept.capacity() / 2 <= bytes)
        };
        let mut buffer = kept.unwrap_or_default();
        buffer.resize(bytes, 0);
        Box::new(Buffer { bytes: buffer, home: Arc::downgrade(&self.free) })
    }
}

impl TileMemory for Buffers {
    fn room(&self, bytes: usize) -> Option<Box<dyn TileRoom>> {
        Some(self.take(bytes))
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(home) = self.home.upgrade() else { return };
        let mut free = home.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = self.bytes.capacity();
        if bytes > 0 && free.bytes + bytes <= KEPT_BYTES_MAX {
            free.bytes += bytes;
            free.buffers.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(buffers: &Buffers) -> (usize, usize) {
        let free = buffers.free.lock().unwrap();
        (free.buffers.len(), free.bytes)
    }

    #[test]
    fn buffers_come_back_and_are_bounded() {
        let buffers = Buffers::default();
        let mut first = buffers.take(1 << 20);
        (*first).as_mut().fill(7);
        let place = (*first).as_ref().as_ptr();
        drop(first);
        let again = buffers.take(1 << 20);
        assert_eq!(((*again).as_ref().as_ptr(), (*again).as_ref().len()), (place, 1 << 20));
        let many: Vec<_> = (0..40).map(|_| buffers.take(1 << 20)).collect();
        drop((again, many));
        assert_eq!(kept(&buffers), (32, 32 << 20));
        assert_eq!((*buffers.take(10)).as_ref().len(), 10, "a small body does not keep a large buffer");
        assert_eq!(kept(&buffers).0, 32, "the one of 10 bytes took the place of a large one");
        let outliving = buffers.take(100);
        drop(buffers);
        assert_eq!((*outliving).as_ref().len(), 100);
    }
}
