//! Work on rows between linear layers.

use bytemuck::{Pod, Zeroable};

use super::compute::{At, Compute, number};
use crate::{Buffer, Error, Kernel, Span};

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
pub(super) struct RowsIn<'a> {
    pub(super) x: At<'a>,
    /// Elements that are read of a row.
    pub(super) width: usize,
    /// u32 `[rows]`: which rows of `x`, read on the device; `None`: all of them in order.
    pub(super) chosen: Option<Span<'a>>,
}

impl<'a> RowsIn<'a> {
    /// All rows in order.
    pub(super) fn all(x: At<'a>, width: usize) -> Self {
        Self { x, width, chosen: None }
    }

    /// Addresses of rows and of their numbers, for a launch that reads `read` elements of each.
    fn addresses(&self, rows: usize, read: usize) -> Result<(u64, u64), Error> {
        match self.chosen {
            Some(chosen) => Ok((self.x.chosen(), chosen.for_kernel("chosen", &[rows], size_of::<u32>())?)),
            None => Ok((self.x.rows("x", rows, read)?, 0)),
        }
    }
}

impl Compute {
    fn rows(
        &self,
        kernel: &Kernel,
        (from, read): (RowsIn<'_>, usize),
        rows: usize,
        (out, written): (At<'_>, usize),
        (weight, eps): (u64, f32),
    ) -> Result<(), Error> {
        let (x, chosen) = from.addresses(rows, read)?;
        let argument = RowsParams {
            x,
            weight,
            out: out.rows("out", rows, written)?,
            chosen,
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
        from: RowsIn<'_>,
        rows: usize,
        weight: &Buffer,
        eps: f32,
        out: At<'_>,
    ) -> Result<(), Error> {
        let weight = weight.whole().for_kernel("weight", &[from.width], size_of::<f32>())?;
        let kernel = &self.programs.norm;
        self.rows(kernel, (from, from.width), rows, (out, out.stride), (weight, eps))
    }

    /// Rows as linear layers take them.
    pub(super) fn narrow(&self, from: RowsIn<'_>, rows: usize, out: At<'_>) -> Result<(), Error> {
        self.rows(&self.programs.narrow, (from, from.width), rows, (out, out.stride), (0, 0.0))
    }

    /// `silu(gate) * up` of rows in which eight gates and eight ups alternate; `width` gates.
    pub(super) fn swiglu(&self, from: RowsIn<'_>, rows: usize, out: At<'_>) -> Result<(), Error> {
        // Up to the last up.
        let read = from.width.checked_sub(1).map_or(0, |last| last / 8 * 16 + last % 8 + 8 + 1);
        self.rows(&self.programs.swiglu, (from, read), rows, (out, out.stride), (0, 0.0))
    }

    /// f32 rows as they are.
    pub(super) fn copy(&self, from: RowsIn<'_>, rows: usize, out: At<'_>) -> Result<(), Error> {
        self.rows(&self.programs.copy, (from, from.width), rows, (out, from.width), (0, 0.0))
    }

    /// Makes memory zero, a multiple of 4 bytes.
    pub(super) fn clear(&self, buffer: &Buffer) -> Result<(), Error> {
        let words = buffer.bytes() / 4;
        let blocks = words.div_ceil(THREADS as usize).min(self.device.multiprocessors() * 8);
        let argument = MemoryParams { out: buffer.address(), words: words as u64 };
        self.launch(&self.programs.clear, [blocks, 1, 1], THREADS, 0, &argument)
    }
}
