//! A device with the kernels of the forward pass.

use std::sync::Arc;

use bytemuck::Pod;

use super::linear::Products;
use super::programs::{Precision, Programs};
use crate::{Device, Error, Kernel, Launch};

/// What every part of a backend launches with.
#[derive(Debug)]
pub(super) struct Compute {
    pub(super) device: Arc<dyn Device>,
    pub(super) precision: Precision,
    pub(super) programs: Programs,
    /// Products of many rows by a library.
    pub(super) products: Option<Arc<dyn Products>>,
}

/// Rows on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct At {
    pub(super) address: u64,
    /// Elements from one row to the next.
    pub(super) stride: usize,
    /// Bytes of an element.
    pub(super) element: usize,
}

impl At {
    /// f32 rows.
    pub(super) fn f32(address: u64, stride: usize) -> Self {
        Self { address, stride, element: 4 }
    }

    /// From row `rows` on.
    pub(super) fn skip(self, rows: usize) -> Self {
        Self { address: self.address + (rows * self.stride * self.element) as u64, ..self }
    }

    /// From column `columns` on.
    pub(super) fn column(self, columns: usize) -> Self {
        Self { address: self.address + (columns * self.element) as u64, ..self }
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
