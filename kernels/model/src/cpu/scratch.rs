//! Memory that calls use and leave for the next ones, so that no call clears or faults in megabytes.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use super::linear::Input;

/// What one call needs.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// Rows on their way into a product.
    pub(super) input: Input,
    /// Gated feed-forward rows.
    pub(super) gated: Vec<f32>,
}

/// As many scratches as calls ever ran at once.
#[derive(Debug, Default)]
pub(super) struct ScratchPool {
    free: Mutex<Vec<Scratch>>,
}

/// A scratch that goes back to its pool.
pub(super) struct Lent<'a> {
    scratch: Scratch,
    pool: &'a ScratchPool,
}

impl ScratchPool {
    pub(super) fn take(&self) -> Lent<'_> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Lent { scratch: free.unwrap_or_default(), pool: self }
    }
}

impl Deref for Lent<'_> {
    type Target = Scratch;

    fn deref(&self) -> &Scratch {
        &self.scratch
    }
}

impl DerefMut for Lent<'_> {
    fn deref_mut(&mut self) -> &mut Scratch {
        &mut self.scratch
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let scratch = std::mem::take(&mut self.scratch);
        self.pool.free.lock().unwrap_or_else(PoisonError::into_inner).push(scratch);
    }
}

/// The first `len` elements, whatever they hold; grows the buffer where it is too short.
pub(super) fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        *buffer = vec![0.0; len];
    }
    &mut buffer[..len]
}
