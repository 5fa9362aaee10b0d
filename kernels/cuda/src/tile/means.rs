//! Summaries of full blocks on the device.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::{PageElement, PageShape};
use crate::{Device, Error, Kernel, Launch, Source, Span};

const SOURCE: Source = Source { name: "block_means.cu", text: include_str!("../../source/block_means.cu") };
const THREADS: u32 = 256;

/// Where summaries are written, those that are wanted. Each has room for as many blocks as the call says (`capacity`).
#[derive(Debug, Clone, Copy, Default)]
pub struct MeanOutputs<'a> {
    /// Mean keys, f32 `[kv_heads][capacity][head_dim]`, with the bits of [`longshore_attention::Mean::key`].
    pub key: Option<Span<'a>>,
    /// Mean values, likewise.
    pub value: Option<Span<'a>>,
    /// Variances of the elements of keys, likewise.
    pub spread: Option<Span<'a>>,
    /// Mean cosines of the keys with their mean, f32 `[kv_heads][capacity]`, with the bits of the CPU's too.
    pub cosines: Option<Span<'a>>,
    /// Mean keys, rounded, `[kv_heads][capacity][head_dim]`.
    pub key_rounded: Option<Span<'a>>,
    /// Mean values, rounded.
    pub value_rounded: Option<Span<'a>>,
    /// Least of each element of the keys, rounded.
    pub key_least: Option<Span<'a>>,
    /// Largest of each element of the keys, rounded.
    pub key_most: Option<Span<'a>>,
}

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    pages: u64,
    key: u64,
    value: u64,
    spread: u64,
    cosines: u64,
    key_rounded: u64,
    value_rounded: u64,
    key_least: u64,
    key_most: u64,
    first: u32,
    capacity: u32,
    tokens: u32,
    stride: u32,
}

fn kernel(element: PageElement, head_dim: usize, rounded: PageElement) -> Kernel {
    let constants =
        vec![("DTYPE", element.constant()), ("HEAD_DIM", head_dim as i64), ("SUMMARY", rounded.constant())];
    Kernel { source: SOURCE, entry: "block_means", constants }
}

/// Of every element, at the largest head size.
pub(super) fn all_kernels() -> Vec<Kernel> {
    PageElement::ALL.map(|element| kernel(element, PageShape::HEAD_DIM_MAX, PageElement::Bf16)).into()
}

/// Makes summaries of pages of one shape.
#[derive(Debug)]
pub struct MeanBuilder {
    device: Arc<dyn Device>,
    shape: PageShape,
    rounded: PageElement,
    kernel: Kernel,
}

impl MeanBuilder {
    /// For pages of `shape`; rounded summaries have elements `rounded`, which is a float.
    pub fn new(device: &Arc<dyn Device>, shape: PageShape, rounded: PageElement) -> Result<Self, Error> {
        shape.validate()?;
        if rounded.is_scaled() {
            let problem = format!("of summaries is {rounded:?}, must be a float");
            return Err(Error::Invalid { field: "element", problem });
        }
        let kernel = kernel(shape.element, shape.head_dim, rounded);
        Ok(Self { device: Arc::clone(device), shape, rounded, kernel })
    }

    /// Queues the summaries of `blocks` full blocks, whose page addresses are in the table `pages`, to the places from `first` on.
    /// Refuses what ends beyond `capacity`.
    pub fn launch(
        &self,
        pages: Span<'_>,
        blocks: usize,
        first: usize,
        capacity: usize,
        outputs: &MeanOutputs<'_>,
    ) -> Result<(), Error> {
        if blocks == 0 {
            return Ok(());
        }
        if first.checked_add(blocks).is_none_or(|end| end > capacity.min(u32::MAX as usize)) {
            let problem = format!("has room for {capacity} blocks, {blocks} come from {first} on");
            return Err(Error::Invalid { field: "capacity", problem });
        }
        let PageShape { kv_heads, head_dim, tokens, .. } = self.shape;
        let place = |output: Option<Span<'_>>, field, counts: &[usize], bytes| {
            output.map_or(Ok(0), |output| output.for_kernel(field, counts, bytes))
        };
        let all = [kv_heads, capacity, head_dim];
        let float = |output, field| place(output, field, &all, size_of::<f32>());
        let rounded = |output, field| place(output, field, &all, self.rounded.bytes());
        let params = Params {
            pages: pages.for_kernel("pages", &[blocks], size_of::<u64>())?,
            key: float(outputs.key, "key")?,
            value: float(outputs.value, "value")?,
            spread: float(outputs.spread, "spread")?,
            cosines: place(outputs.cosines, "cosines", &all[..2], size_of::<f32>())?,
            key_rounded: rounded(outputs.key_rounded, "key_rounded")?,
            value_rounded: rounded(outputs.value_rounded, "value_rounded")?,
            key_least: rounded(outputs.key_least, "key_least")?,
            key_most: rounded(outputs.key_most, "key_most")?,
            first: first as u32,
            capacity: capacity as u32,
            tokens: tokens as u32,
            stride: 1,
        };
        self.start(blocks, params)
    }

    /// Queues mean keys and values of `blocks` full blocks, f32 `[blocks][kv_heads][head_dim]`: rows, as [`super::RowAppender`] takes them.
    pub fn rows(
        &self,
        pages: Span<'_>,
        blocks: usize,
        (key, value): (Span<'_>, Span<'_>),
    ) -> Result<(), Error> {
        if blocks == 0 {
            return Ok(());
        }
        let PageShape { kv_heads, head_dim, tokens, .. } = self.shape;
        let all = [blocks, kv_heads, head_dim];
        let params = Params {
            pages: pages.for_kernel("pages", &[blocks], size_of::<u64>())?,
            key: key.for_kernel("key", &all, size_of::<f32>())?,
            value: value.for_kernel("value", &all, size_of::<f32>())?,
            capacity: 1,
            tokens: tokens as u32,
            stride: kv_heads as u32,
            ..Params::zeroed()
        };
        self.start(blocks, params)
    }

    fn start(&self, blocks: usize, params: Params) -> Result<(), Error> {
        let PageShape { kv_heads, head_dim, tokens, .. } = self.shape;
        let shared = (head_dim + tokens + 1) * size_of::<f32>();
        let grid = [blocks as u32, kv_heads as u32, 1];
        self.device.launch(&Launch::new(&self.kernel, grid, THREADS, &params).shared(shared as u32))
    }
}
