//! Memory of the lane's own for bodies whose receiver gave none: used again, so that no page of it is new to the process.

use std::sync::{Arc, Mutex, PoisonError, Weak};

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

/// One of them, for a body: as long as what came of that.
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    home: Weak<Mutex<Free>>,
}

impl Buffers {
    /// Room for `bytes`, none of which is there yet. What is not used again is asked of the system only, which gives it page by page as
    /// it is written: that somebody says how long a body is costs nothing.
    pub(super) fn take(&self, bytes: usize) -> Buffer {
        let kept = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            // Tiles of a deployment are of one size; what is of another one goes away by and by.
            let kept = free.buffers.pop();
            free.bytes -= kept.as_ref().map_or(0, Vec::capacity);
            kept.filter(|kept| kept.capacity() >= bytes && kept.capacity() / 2 <= bytes)
        };
        let mut buffer = kept.unwrap_or_default();
        buffer.clear();
        buffer.reserve_exact(bytes);
        Buffer { bytes: buffer, home: Arc::downgrade(&self.free) }
    }
}

impl Buffers {
    /// The same with zeros in it, for whoever writes anywhere in it.
    pub(crate) fn filled(&self, bytes: usize) -> Buffer {
        let mut buffer = self.take(bytes);
        buffer.bytes.resize(bytes, 0);
        buffer
    }
}

impl Buffer {
    /// What came; there is room for what was asked for.
    pub(super) fn bytes(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
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
        first.bytes().resize(1 << 20, 7);
        let place = first.as_ref().as_ptr();
        drop(first);
        let mut again = buffers.take(1 << 20);
        assert_eq!(
            (again.as_ref().as_ptr(), again.as_ref().len()),
            (place, 0),
            "the same memory, nothing in it"
        );
        again.bytes().resize(1 << 20, 8);
        assert_eq!(again.as_ref().as_ptr(), place, "there was room for all of it");
        let many: Vec<_> = (0..40).map(|_| buffers.take(1 << 20)).collect();
        drop((again, many));
        assert_eq!(kept(&buffers), (32, 32 << 20));
        assert!(buffers.take(10).bytes().capacity() < 1 << 20, "a small body does not keep a large buffer");
        assert_eq!(kept(&buffers).0, 32, "the one of 10 bytes took the place of a large one");
        let mut outliving = buffers.take(100);
        drop(buffers);
        outliving.bytes().resize(100, 1);
        assert_eq!(outliving.as_ref(), [1; 100]);
    }
}
