//! Summaries of full blocks on the device.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::{PageElement, PageShape};
use crate::{Device, Error, Kernel, Launch, Source};

const SOURCE: Source = Source { name: "block_means.cu", text: include_str!("../../source/block_means.cu") };
const THREADS: u32 = 256;

/// Where summaries are written: device addresses, 0 where one is not wanted. `capacity` is the number of blocks that each has room for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MeanOutputs {
    /// Mean keys, f32 `[kv_heads][capacity][head_dim]`, with the bits of [`longshore_attention::Mean::key`].
    pub key: u64,
    /// Mean values, likewise.
    pub value: u64,
    /// Variances of the elements of keys, likewise.
    pub spread: u64,
    /// Mean cosines of the keys with their mean, f32 `[kv_heads][capacity]`, with the bits of the CPU's too.
    pub cosines: u64,
    /// Mean keys, rounded, `[kv_heads][capacity][head_dim]`.
    pub key_rounded: u64,
    /// Mean values, rounded.
    pub value_rounded: u64,
    /// Least of each element of the keys, rounded.
    pub key_least: u64,
    /// Largest of each element of the keys, rounded.
    pub key_most: u64,
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
    unused: u32,
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
        Ok(Self { device: Arc::clone(device), shape, kernel: kernel(shape.element, shape.head_dim, rounded) })
    }

    /// Queues the summaries of `blocks` full blocks, whose page addresses are in a table at `pages`, to the places from `first` on.
    /// Refuses what ends beyond `capacity`.
    pub fn launch(
        &self,
        pages: u64,
        blocks: usize,
        first: usize,
        capacity: usize,
        outputs: &MeanOutputs,
    ) -> Result<(), Error> {
        if blocks == 0 {
            return Ok(());
        }
        if first.checked_add(blocks).is_none_or(|end| end > capacity.min(u32::MAX as usize)) {
            let problem = format!("has room for {capacity} blocks, {blocks} come from {first} on");
            return Err(Error::Invalid { field: "capacity", problem });
        }
        let &MeanOutputs { key, value, spread, cosines, key_rounded, value_rounded, key_least, key_most } =
            outputs;
        let params = Params {
            pages,
            key,
            value,
            spread,
            cosines,
            key_rounded,
            value_rounded,
            key_least,
            key_most,
            first: first as u32,
            capacity: capacity as u32,
            tokens: self.shape.tokens as u32,
            unused: 0,
        };
        let shared = (self.shape.head_dim + self.shape.tokens + 1) * size_of::<f32>();
        let grid = [blocks as u32, self.shape.kv_heads as u32, 1];
        self.device.launch(&Launch::new(&self.kernel, grid, THREADS, &params).shared(shared as u32))
    }
}
