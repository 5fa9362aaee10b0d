//! Memory for numbers that live long and are read whole, such as tiles and weights: buffers of one size, cut from slabs of huge pages.
//!
//! A decode step reads hundreds of megabytes once. In pages of 4 KiB each of them costs a translation that no buffer of the
//! processor still has, and ends what the hardware fetches ahead. So buffers of one size lie side by side in slabs of a few
//! huge pages, for which the system is asked (where it has none to give, small pages serve). A slab goes back to the system
//! when none of its buffers is left; one empty slab of the process is kept, for whoever comes next.
#![allow(unsafe_code, reason = "buffers are disjoint parts of memory that the slabs of the process own")]

mod array;
mod sizes;

use std::{
    alloc::{Layout, handle_alloc_error},
    fmt,
    ops::{Deref, DerefMut},
    ptr::NonNull,
    sync::{Mutex, MutexGuard, PoisonError},
};

pub use array::SlabArray;
use sizes::{Place, Sizes};

/// Bytes that buffers are aligned to: a cache line, and the widest vector.
const ALIGNMENT: usize = 64;

static SIZES: Mutex<Sizes> = Mutex::new(Sizes::new());

fn sizes() -> MutexGuard<'static, Sizes> {
    SIZES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Zeroed bytes, aligned to 64, in huge pages where the system has them.
pub struct SlabBuffer {
    start: NonNull<u8>,
    len: usize,
    place: Place,
}

// SAFETY: the buffer owns its bytes, as a boxed slice does.
unsafe impl Send for SlabBuffer {}
// SAFETY: as above.
unsafe impl Sync for SlabBuffer {}

impl SlabBuffer {
    /// `len` zeros. Ends the process when the system has no memory left, as a vector does.
    pub fn zeroed(len: usize) -> Self {
        let (mut buffer, used_before) = Self::claim(len);
        if used_before {
            buffer.fill(0);
        }
        buffer
    }

    /// `len` bytes of which nobody may know: zeros, or what whoever had the memory before left there. For those who write all of it
    /// before anything reads it.
    pub fn unwritten(len: usize) -> Self {
        Self::claim(len).0
    }

    /// A copy of `bytes`.
    pub fn copied(bytes: &[u8]) -> Self {
        let (mut buffer, _) = Self::claim(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }

    /// A buffer, and whether it holds what somebody left there: else it is zero.
    fn claim(len: usize) -> (Self, bool) {
        let room = room(len);
        let claimed = sizes().claim(room);
        let Ok((start, place, used_before)) = claimed else {
            handle_alloc_error(Layout::from_size_align(room, ALIGNMENT).unwrap_or(Layout::new::<u8>()));
        };
        (Self { start, len, place }, used_before)
    }
}

/// Bytes that a buffer of `len` takes.
fn room(len: usize) -> usize {
    len.max(1).next_multiple_of(ALIGNMENT)
}

impl Drop for SlabBuffer {
    fn drop(&mut self) {
        let unneeded = sizes().give_back(room(self.len), self.place);
        // Unmapped after the lock is free again.
        drop(unneeded);
    }
}

impl Deref for SlabBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the buffer's place is `len` initialised bytes or more, nobody else's until it is given back.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for SlabBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and this borrow is the only one.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Clone for SlabBuffer {
    fn clone(&self) -> Self {
        Self::copied(self)
    }
}

impl fmt::Debug for SlabBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlabBuffer").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
