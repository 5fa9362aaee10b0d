//! Work on rows between linear layers.

use bytemuck::{Pod, Zeroable};

use super::compute::{At, Compute, number};
use crate::{Buffer, Error, Kernel};

const THREADS: u32 = 256;

/// `Rows` of `rows.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct RowsParams {
    x: u64,
    weight: u64,
    out: u64,
    chosen: u64,
    rows: u32,
    width: u32,
    x_stride: u32,
    out_stride: u32,
    eps: f32,
    reserved: u32,
}

/// `Memory` of `rows.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct MemoryParams {
    out: u64,
    words: u64,
}

/// Where rows come from: f32 `[…, width]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowsIn {
    pub(super) x: At,
    /// Elements that are read of a row.
    pub(super) width: usize,
    /// Address of u32 `[rows]`: which rows of `x`; 0 for all of them in order.
    pub(super) chosen: u64,
}

impl RowsIn {
    /// All rows in order.
    pub(super) fn all(x: At, width: usize) -> Self {
        Self { x, width, chosen: 0 }
    }
}

impl Compute {
    fn rows(
        &self,
        kernel: &Kernel,
        from: RowsIn,
        rows: usize,
        out: At,
        (weight, eps): (u64, f32),
    ) -> Result<(), Error> {
        let argument = RowsParams {
            x: from.x.address,
            weight,
            out: out.address,
            chosen: from.chosen,
            rows: number(rows, "rows")?,
            width: number(from.width, "width")?,
            x_stride: number(from.x.stride, "x_stride")?,
            out_stride: number(out.stride, "out_stride")?,
            eps,
            reserved: 0,
        };
        // Sums of eight warps.
        self.launch(kernel, [rows, 1, 1], THREADS, 32, &argument)
    }

    /// RMSNorm: `x / sqrt(mean(x²) + eps) * weight`, in the precision of linear layers.
    pub(super) fn norm(
        &self,
        from: RowsIn,
        rows: usize,
        weight: &Buffer,
        eps: f32,
        out: At,
    ) -> Result<(), Error> {
        self.rows(&self.programs.norm, from, rows, out, (weight.address(), eps))
    }

    /// Rows as linear layers take them.
    pub(super) fn narrow(&self, from: RowsIn, rows: usize, out: At) -> Result<(), Error> {
        self.rows(&self.programs.narrow, from, rows, out, (0, 0.0))
    }

    /// `silu(gate) * up` of rows in which eight gates and eight ups alternate; `width` gates.
    pub(super) fn swiglu(&self, from: RowsIn, rows: usize, out: At) -> Result<(), Error> {
        self.rows(&self.programs.swiglu, from, rows, out, (0, 0.0))
    }

    /// f32 rows as they are.
    pub(super) fn copy(&self, from: RowsIn, rows: usize, out: At) -> Result<(), Error> {
        self.rows(&self.programs.copy, from, rows, out, (0, 0.0))
    }

    /// Makes memory zero, a multiple of 4 bytes.
    pub(super) fn clear(&self, buffer: &Buffer) -> Result<(), Error> {
        let words = buffer.bytes() / 4;
        let blocks = words.div_ceil(THREADS as usize).min(self.device.multiprocessors() * 8);
        let argument = MemoryParams { out: buffer.address(), words: words as u64 };
        self.launch(&self.programs.clear, [blocks, 1, 1], THREADS, 0, &argument)
    }
}
