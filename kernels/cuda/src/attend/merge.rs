//! The merge of partials on the device.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use crate::{Device, Error, Kernel, Launch, PageElement, PageShape, Source, Span};

const SOURCE: Source =
    Source { name: "merge_partials.cu", text: include_str!("../../source/merge_partials.cu") };
const WARPS: usize = 4;
/// Thread blocks along the second axis of a grid, at most.
const ITEMS_MAX: usize = u16::MAX as usize;

/// Partials of the same rows and where their merge goes; an entry of the table that a launch reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct MergeItem {
    /// Device address of f32 `[records][2 + head_dim]`, or, divided, of `[records][head_dim]` of the output's type.
    pub output: u64,
    /// First of the item's sources in the table of sources.
    pub first_source: u32,
    /// How many sources there are, in the order in which they are folded.
    pub sources: u32,
    /// Records (row and query head) of each source.
    pub records: u32,
    /// Always 0.
    pub unused: u32,
}

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    items: u64,
    sources: u64,
    head_dim: u32,
    divide: u32,
}

fn kernel(output: PageElement) -> Kernel {
    Kernel { source: SOURCE, entry: "merge_partials", constants: vec![("OUTPUT", output.constant())] }
}

/// All that can be asked for.
pub(super) fn all_kernels() -> Vec<Kernel> {
    PageElement::FLOATS.map(kernel).into()
}

/// Merges partials with the bits of [`longshore_attention::Partials::merge`] and, where asked to, of
/// [`longshore_attention::Partials::finish`].
#[derive(Debug)]
pub struct PartialMerger {
    device: Arc<dyn Device>,
    head_dim: usize,
    kernel: Kernel,
}

impl PartialMerger {
    /// For heads of `head_dim` elements, up to 256; divided outputs have elements `output`, a float.
    pub fn new(device: &Arc<dyn Device>, head_dim: usize, output: PageElement) -> Result<Self, Error> {
        if !(1..=PageShape::HEAD_DIM_MAX).contains(&head_dim) {
            let problem = format!("is {head_dim}, must be from 1 to {}", PageShape::HEAD_DIM_MAX);
            return Err(Error::Invalid { field: "head_dim", problem });
        }
        if output.is_scaled() {
            let problem = format!("of the output is {output:?}, must be a float");
            return Err(Error::Invalid { field: "element", problem });
        }
        Ok(Self { device: Arc::clone(device), head_dim, kernel: kernel(output) })
    }

    /// Queues the merge of `count` [`MergeItem`]s at `items`, of at most `most_records` records each, whose sources are in a table of
    /// u64 addresses at `sources`. The output is one more partial.
    pub fn merge(
        &self,
        items: Span<'_>,
        sources: Span<'_>,
        count: usize,
        most_records: usize,
    ) -> Result<(), Error> {
        self.launch(items, sources, count, most_records, false)
    }

    /// The same, divided by the sums: attention, 0 where there was no key.
    pub fn merge_and_finish(
        &self,
        items: Span<'_>,
        sources: Span<'_>,
        count: usize,
        most_records: usize,
    ) -> Result<(), Error> {
        self.launch(items, sources, count, most_records, true)
    }

    fn launch(
        &self,
        items: Span<'_>,
        sources: Span<'_>,
        count: usize,
        most_records: usize,
        divide: bool,
    ) -> Result<(), Error> {
        if count > ITEMS_MAX {
            return Err(Error::Invalid {
                field: "items",
                problem: format!("are {count}, at most {ITEMS_MAX}"),
            });
        }
        if count == 0 || most_records == 0 {
            return Ok(());
        }
        let params = Params {
            items: items.for_kernel("items", &[count], size_of::<MergeItem>())?,
            sources: sources.address(),
            head_dim: self.head_dim as u32,
            divide: divide.into(),
        };
        let grid = [most_records.div_ceil(WARPS) as u32, count as u32, 1];
        self.device.launch(&Launch::new(&self.kernel, grid, (WARPS * 32) as u32, &params))
    }
}
