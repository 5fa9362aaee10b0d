//! Pages of floats to pages of 8-bit elements on the device.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::{PageElement, PageShape};
use crate::{Device, Error, Kernel, Launch, Source, Span};

const SOURCE: Source =
    Source { name: "tile_quantise.cu", text: include_str!("../../source/tile_quantise.cu") };
const THREADS: u32 = 256;

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    from: u64,
    to: u64,
    kv_heads: u32,
    tokens: u32,
}

fn kernel(from: PageElement, head_dim: usize, to: PageElement) -> Kernel {
    let constants = vec![("DTYPE", from.constant()), ("HEAD_DIM", head_dim as i64), ("TO", to.constant())];
    Kernel { source: SOURCE, entry: "quantise_pages", constants }
}

/// Of every element, at the largest head size, which takes most registers.
pub(super) fn all_kernels() -> Vec<Kernel> {
    let pairs = PageElement::FLOATS
        .into_iter()
        .flat_map(|from| [PageElement::Int8, PageElement::E4m3].map(|to| (from, to)));
    pairs.map(|(from, to)| kernel(from, PageShape::HEAD_DIM_MAX, to)).collect()
}

/// Narrows pages: int8 by the rule of [`longshore_attention::Tile::write`], with its bits; E4M3 by the same rule with the scale
/// `max|x| / 448`, elements rounded to the nearest even E4M3.
#[derive(Debug)]
pub struct PageQuantiser {
    device: Arc<dyn Device>,
    from: PageShape,
    to: PageShape,
    kernel: Kernel,
}

impl PageQuantiser {
    /// From pages of `from`, of floats, to pages with elements `to`, of 8 bits. Refuses other types.
    pub fn new(device: &Arc<dyn Device>, from: PageShape, to: PageElement) -> Result<Self, Error> {
        from.validate()?;
        let invalid = |problem: String| Err(Error::Invalid { field: "element", problem });
        if from.element.is_scaled() {
            return invalid(format!("of the source is {:?}, must be a float", from.element));
        }
        if !to.is_scaled() {
            return invalid(format!("to store is {to:?}, must have 8 bits"));
        }
        let kernel = kernel(from.element, from.head_dim, to);
        Ok(Self { device: Arc::clone(device), from, to: PageShape { element: to, ..from }, kernel })
    }

    /// Shape of the pages that it writes.
    pub fn shape(&self) -> PageShape {
        self.to
    }

    /// Queues the work on `pages` pages; `from` and `to` are tables of u64 addresses.
    pub fn launch(&self, from: Span<'_>, to: Span<'_>, pages: usize) -> Result<(), Error> {
        if pages == 0 {
            return Ok(());
        }
        let kv_heads = self.from.kv_heads as u32;
        let from = from.for_kernel("from", &[pages], size_of::<u64>())?;
        let to = to.for_kernel("to", &[pages], size_of::<u64>())?;
        let params = Params { from, to, kv_heads, tokens: self.from.tokens as u32 };
        self.device.launch(&Launch::new(&self.kernel, [pages as u32, kv_heads, 1], THREADS, &params))
    }
}
