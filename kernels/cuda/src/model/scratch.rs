//! Device memory that calls use and leave for the next ones.

use std::ops::Deref;
use std::sync::{Mutex, PoisonError};

use super::compute::{At, Compute};
use crate::{Buffer, Error};

/// Scratches that are kept.
const KEPT: usize = 4;

/// What a row needs, in elements.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Widths {
    /// Of the widest row on its way into a linear layer that is not a gated one.
    pub(super) input: usize,
    /// Of a gated row on its way into a linear layer.
    pub(super) gated: usize,
    /// Of the widest row of products that something follows.
    pub(super) product: usize,
}

/// What one call needs.
#[derive(Debug)]
pub(super) struct Scratch {
    rows: usize,
    /// Rows on their way into a product.
    pub(super) input: Buffer,
    /// Gated rows; elements past their width are zero and are never written.
    pub(super) gated: Buffer,
    /// f32 products.
    pub(super) product: Buffer,
    /// Quantised weights that were made plain.
    pub(super) expanded: Buffer,
}

/// Scratches that nobody uses. Calls are queued in order, so that the next call may take what the last one's kernels still use.
#[derive(Debug)]
pub(super) struct ScratchPool {
    /// Rows that go through a layer together; bounds every scratch.
    pub(super) pass_rows: usize,
    widths: Widths,
    /// Bytes of [`Scratch::expanded`] for few rows and for many.
    expanded_bytes: [usize; 2],
    free: Mutex<Vec<Scratch>>,
}

/// A scratch that goes back to its pool.
pub(super) struct Lent<'a> {
    scratch: Option<Scratch>,
    pool: &'a ScratchPool,
}

impl ScratchPool {
    /// `expanded_bytes(rows)` is what products of so many rows need.
    pub(super) fn new(pass_rows: usize, widths: Widths, expanded_bytes: impl Fn(usize) -> usize) -> Self {
        let expanded_bytes = [expanded_bytes(SMALL_ROWS), expanded_bytes(pass_rows)];
        Self { pass_rows, widths, expanded_bytes, free: Mutex::default() }
    }

    /// A scratch for so many rows, at most [`Self::pass_rows`].
    pub(super) fn take(&self, compute: &Compute, rows: usize) -> Result<Lent<'_>, Error> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = free.iter().enumerate().filter(|(_, scratch)| scratch.rows >= rows);
        let smallest = fits.min_by_key(|(_, scratch)| scratch.rows).map(|(index, _)| index);
        let found = smallest.map(|index| free.swap_remove(index));
        drop(free);
        let scratch = match found {
            Some(scratch) => scratch,
            None => self.make(compute, rows)?,
        };
        Ok(Lent { scratch: Some(scratch), pool: self })
    }

    fn make(&self, compute: &Compute, rows: usize) -> Result<Scratch, Error> {
        let rows = rows.next_power_of_two().min(self.pass_rows).max(SMALL_ROWS);
        let buffer = |width: usize, element| Buffer::new(&compute.device, rows * width * element);
        let element = compute.precision.bytes();
        let gated = buffer(self.widths.gated.next_multiple_of(2), element)?;
        compute.clear(&gated)?;
        Ok(Scratch {
            rows,
            input: buffer(self.widths.input, element)?,
            gated,
            product: buffer(self.widths.product, 4)?,
            expanded: Buffer::new(&compute.device, self.expanded_bytes[usize::from(rows > SMALL_ROWS)])?,
        })
    }
}

/// Rows of the smallest scratch: a decode step's.
const SMALL_ROWS: usize = 32;

impl Scratch {
    /// Rows of `width` elements on their way into a linear layer.
    pub(super) fn input(&self, compute: &Compute, width: usize) -> At<'_> {
        At::new(self.input.whole(), compute.precision.stride(width), compute.precision.bytes())
    }

    /// Gated rows.
    pub(super) fn gated(&self, compute: &Compute, width: usize) -> At<'_> {
        At::new(self.gated.whole(), compute.precision.stride(width), compute.precision.bytes())
    }
}

impl Deref for Lent<'_> {
    type Target = Scratch;

    fn deref(&self) -> &Scratch {
        self.scratch.as_ref().expect("it is there until it is dropped")
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut free = self.pool.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.extend(self.scratch.take());
        if free.len() > KEPT {
            let smallest = free.iter().enumerate().min_by_key(|(_, scratch)| scratch.rows);
            let index = smallest.map_or(0, |(index, _)| index);
            free.swap_remove(index);
        }
    }
}
