//! Rows of keys and values to pages on the device.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::{PageElement, PageShape};
use crate::{Device, Error, Kernel, Launch, Source, Span};

const SOURCE: Source = Source { name: "heads.cu", text: include_str!("../../source/heads.cu") };
/// Heads of a block.
const WARPS: usize = 4;

/// `Rows` of `heads.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    k: u64,
    v: u64,
    pages: u64,
    places: u64,
    rows: u32,
    blanks: u32,
    kv_heads: u32,
    head_dim: u32,
    block_tokens: u32,
    reserved: u32,
}

fn kernel(element: PageElement) -> Kernel {
    Kernel { source: SOURCE, entry: "append_rows", constants: vec![("DTYPE", element.constant())] }
}

/// All that can be asked for.
pub(super) fn all_kernels() -> Vec<Kernel> {
    PageElement::FLOATS.into_iter().map(kernel).collect()
}

/// Rows that become tokens of pages.
#[derive(Debug, Clone, Copy)]
pub struct AppendCall<'a> {
    /// f32 `[rows, kv_heads, head_dim]`.
    pub keys: Span<'a>,
    /// f32 `[rows, kv_heads, head_dim]`.
    pub values: Span<'a>,
    /// How many there are.
    pub rows: usize,
    /// u64 addresses of pages.
    pub pages: Span<'a>,
    /// u64 `[rows + blanks]`: the token that each row becomes, then those that become zeros, counted from the first of `pages`. Each must lie in a
    /// page that is there, and no two may be equal.
    pub places: Span<'a>,
    /// Tokens that become zeros.
    pub blanks: usize,
}

/// Writes rows into pages, rounded as tiles of the CPU are, bit for bit.
#[derive(Debug)]
pub struct RowAppender {
    device: Arc<dyn Device>,
    shape: PageShape,
    kernel: Kernel,
}

impl RowAppender {
    /// For pages of `shape`; refuses those with scales.
    pub fn new(device: &Arc<dyn Device>, shape: PageShape) -> Result<Self, Error> {
        shape.validate()?;
        if shape.element.is_scaled() {
            let problem = format!("is {:?}, rows are appended to pages of floats", shape.element);
            return Err(Error::Invalid { field: "element", problem });
        }
        Ok(Self { device: Arc::clone(device), shape, kernel: kernel(shape.element) })
    }

    /// Queues it; nothing for no rows and no blanks.
    pub fn launch(&self, call: &AppendCall<'_>) -> Result<(), Error> {
        let PageShape { tokens, kv_heads, head_dim, .. } = self.shape;
        let places = call.rows + call.blanks;
        if places == 0 {
            return Ok(());
        }
        let number = |size: usize| {
            let problem = format!("is {size}, kernels count up to 2^32 - 1");
            u32::try_from(size).map_err(|_| Error::Invalid { field: "rows", problem })
        };
        let rows = [call.rows, kv_heads, head_dim];
        let params = Params {
            k: call.keys.for_kernel("keys", &rows, size_of::<f32>())?,
            v: call.values.for_kernel("values", &rows, size_of::<f32>())?,
            // Which pages there are is read on the device.
            pages: call.pages.address(),
            places: call.places.for_kernel("places", &[places], size_of::<u64>())?,
            rows: number(call.rows)?,
            blanks: number(call.blanks)?,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
            block_tokens: tokens as u32,
            reserved: 0,
        };
        let blocks = number((places * 2 * kv_heads).div_ceil(WARPS))?;
        let shared = (WARPS * head_dim * size_of::<f32>()) as u32;
        self.device
            .launch(&Launch::new(&self.kernel, [blocks, 1, 1], 32 * WARPS as u32, &params).shared(shared))
    }
}
