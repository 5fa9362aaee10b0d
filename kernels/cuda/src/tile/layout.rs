//! Panels to rows and back on the device: tiles travel as they are.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::PageShape;
use crate::{Device, Error, Kernel, Launch, Source, Span};

const SOURCE: Source = Source { name: "tile_layout.cu", text: include_str!("../../source/tile_layout.cu") };
const THREADS: u32 = 128;
const STRIP: usize = 16;

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    from: u64,
    to: u64,
    kv_heads: u32,
    tokens: u32,
    head_dim: u32,
    scaled: u32,
}

/// To rows and to panels.
fn kernels(element_bytes: usize) -> [Kernel; 2] {
    let constants = vec![("ELEMENT_BYTES", element_bytes as i64)];
    ["panels_to_rows", "rows_to_panels"].map(|entry| Kernel {
        source: SOURCE,
        entry,
        constants: constants.clone(),
    })
}

/// All that can be asked for.
pub(super) fn all_kernels() -> Vec<Kernel> {
    [1, 2, 4].into_iter().flat_map(kernels).collect()
}

/// Turns tiles in the layout of the CPU into pages and back, on the device.
#[derive(Debug)]
pub struct PageTranscoder {
    device: Arc<dyn Device>,
    shape: PageShape,
    to_rows: Kernel,
    to_panels: Kernel,
}

impl PageTranscoder {
    /// For pages of `shape`, which must be valid.
    pub fn new(device: &Arc<dyn Device>, shape: PageShape) -> Result<Self, Error> {
        shape.validate()?;
        let [to_rows, to_panels] = kernels(shape.element.bytes());
        Ok(Self { device: Arc::clone(device), shape, to_rows, to_panels })
    }

    /// Queues the copy of `tiles` tiles to pages. `from` and `to` are tables of u64 addresses, each of [`PageShape::bytes`], 16-byte
    /// aligned, none of which overlap.
    pub fn to_rows(&self, from: Span<'_>, to: Span<'_>, tiles: usize) -> Result<(), Error> {
        self.launch(&self.to_rows, from, to, tiles)
    }

    /// Queues the copy of `tiles` pages to tiles; otherwise as [`Self::to_rows`].
    pub fn to_panels(&self, from: Span<'_>, to: Span<'_>, tiles: usize) -> Result<(), Error> {
        self.launch(&self.to_panels, from, to, tiles)
    }

    fn launch(&self, kernel: &Kernel, from: Span<'_>, to: Span<'_>, tiles: usize) -> Result<(), Error> {
        if tiles == 0 {
            return Ok(());
        }
        let PageShape { tokens, kv_heads, head_dim, element } = self.shape;
        let params = Params {
            from: from.for_kernel("from", &[tiles], size_of::<u64>())?,
            to: to.for_kernel("to", &[tiles], size_of::<u64>())?,
            kv_heads: kv_heads as u32,
            tokens: tokens as u32,
            head_dim: head_dim as u32,
            scaled: element.is_scaled().into(),
        };
        let grid = [(tiles * (tokens / STRIP)) as u32, kv_heads as u32, 1];
        // 16 tokens of each element, and a word so that elements lie in different banks.
        let shared = head_dim * (STRIP * element.bytes() + 4);
        self.device.launch(&Launch::new(kernel, grid, THREADS, &params).shared(shared as u32))
    }
}
