//! A device with the kernels of the forward pass.

use std::sync::Arc;

use bytemuck::Pod;

use super::linear::Products;
use super::programs::{Precision, Programs};
use crate::{Device, Error, Kernel, Launch, Span};

/// What every part of a backend launches with.
#[derive(Debug)]
pub(super) struct Compute {
    pub(super) device: Arc<dyn Device>,
    pub(super) precision: Precision,
    pub(super) programs: Programs,
    /// Products of many rows by a library.
    pub(super) products: Option<Arc<dyn Products>>,
}

/// Rows in a part of a buffer, which ends behind them or later.
#[derive(Debug, Clone, Copy)]
pub(super) struct At<'a> {
    span: Span<'a>,
    /// Elements from one row to the next.
    pub(super) stride: usize,
    /// Bytes of an element.
    pub(super) element: usize,
}

impl<'a> At<'a> {
    /// Rows from the beginning of `span` on.
    pub(super) fn new(span: Span<'a>, stride: usize, element: usize) -> Self {
        Self { span, stride, element }
    }

    /// f32 rows.
    pub(super) fn f32(span: Span<'a>, stride: usize) -> Self {
        Self::new(span, stride, size_of::<f32>())
    }

    /// From row `rows` on.
    pub(super) fn skip(self, rows: usize) -> Self {
        Self { span: self.span.after(rows * self.stride * self.element), ..self }
    }

    /// From column `columns` on.
    pub(super) fn column(self, columns: usize) -> Self {
        Self { span: self.span.after(columns * self.element), ..self }
    }

    /// Where they lie, for a launch that uses `width` elements of each of `rows` rows. Refuses fewer, as the argument `field`.
    pub(super) fn rows(&self, field: &'static str, rows: usize, width: usize) -> Result<u64, Error> {
        // Nothing needs to follow the last row.
        let elements = if rows == 0 { 0 } else { (rows - 1) * self.stride + width };
        self.span.for_kernel(field, &[elements], self.element)
    }

    /// The same for rows that a table on the device names.
    pub(super) fn chosen(&self) -> u64 {
        self.span.address()
    }
}

impl Compute {
    /// Queues a kernel; nothing for an empty grid.
    pub(super) fn launch<T: Pod>(
        &self,
        kernel: &Kernel,
        grid: [usize; 3],
        threads: u32,
        shared_bytes: usize,
        argument: &T,
    ) -> Result<(), Error> {
        if grid.contains(&0) {
            return Ok(());
        }
        let grid = [number(grid[0], "grid")?, number(grid[1], "grid")?, number(grid[2], "grid")?];
        let shared_bytes = number(shared_bytes, "shared_bytes")?;
        self.device.launch(&Launch::new(kernel, grid, threads, argument).shared(shared_bytes))
    }
}

/// A size as kernels take it.
pub(super) fn number(size: usize, field: &'static str) -> Result<u32, Error> {
    u32::try_from(size)
        .map_err(|_| Error::Invalid { field, problem: format!("is {size}, kernels count up to 2^32 - 1") })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{Buffer, addresses::Addresses};

    #[test]
    fn rows_that_end_behind_their_buffer_are_refused() {
        let device: Arc<dyn Device> = Addresses::new(1 << 20);
        // Three rows of 10 elements, 16 apart; nothing follows the last.
        let buffer = Buffer::new(&device, (2 * 16 + 10) * 4).unwrap();
        let at = At::f32(buffer.whole(), 16);
        assert_eq!(at.rows("x", 3, 10).unwrap(), 4096);
        assert_eq!(at.rows("x", 0, 10).unwrap(), 4096);
        assert_eq!(at.skip(1).rows("x", 2, 10).unwrap(), 4096 + 64);
        assert_eq!(at.column(6).rows("x", 3, 4).unwrap(), 4096 + 24);
        for refused in [
            at.rows("x", 3, 11),
            at.rows("x", 4, 1),
            at.skip(1).rows("x", 3, 10),
            at.column(7).rows("x", 3, 4),
            at.skip(9).rows("x", 1, 1),
        ] {
            assert!(refused.unwrap_err().to_string().starts_with("`x`"));
        }
    }
}
