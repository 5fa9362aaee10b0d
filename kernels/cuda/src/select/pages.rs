//! Scores of pages for decode steps.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use longshore_attention::HeadShape;

use crate::{Device, Error, Kernel, Launch, PageElement, PageShape, Source, Span};

const SOURCE: Source = Source { name: "score_pages.cu", text: include_str!("../../source/score_pages.cu") };
const THREADS: u32 = 128;
/// Pages of a thread block.
const PAGES: usize = 128;
/// Most query heads of a KV head.
const GROUP_MAX: usize = 8;

/// One sequence: summaries of its pages and the query row; an entry of the table that a launch reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct PageScoreItem {
    /// Device address of mean keys, or of the least of each element, `[kv_heads][capacity][head_dim]`.
    pub first: u64,
    /// Of the largest of each element, likewise (Quest); 0 with means.
    pub second: u64,
    /// Pages.
    pub pages: u32,
    /// Row among the queries.
    pub query: u32,
    /// Pages that the summaries have room for.
    pub capacity: u32,
    /// Always 0.
    pub unused: u32,
}

/// Places and sizes of a launch.
#[derive(Debug, Clone, Copy)]
pub struct PageScoreCall<'a> {
    /// f32 `[rows][query_heads][head_dim]`, rotated.
    pub queries: Span<'a>,
    /// Table of [`PageScoreItem`]s.
    pub items: Span<'a>,
    /// f32 `[kv_heads][items][stride]`: what comes out. Scores are not scaled, which changes no order.
    pub scores: Span<'a>,
    /// Items.
    pub count: usize,
    /// Most pages of any item.
    pub most_pages: usize,
    /// Elements from one item's scores to the next's.
    pub stride: usize,
    /// Whether scores of a group are added up; otherwise the largest counts.
    pub sum: bool,
    /// First pages, whose score is +∞.
    pub sink: u32,
    /// Last pages, whose score is +∞.
    pub local: u32,
}

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    queries: u64,
    items: u64,
    scores: u64,
    kv_heads: u32,
    group: u32,
    stride: u32,
    sum: u32,
    sink: u32,
    local: u32,
}

fn kernel(element: PageElement, head_dim: usize) -> Kernel {
    let constants = vec![("HEAD_DIM", head_dim as i64), ("SUMMARY", element.constant())];
    Kernel { source: SOURCE, entry: "score_pages", constants }
}

/// Of every element, at the largest head size.
pub(super) fn all_kernels() -> Vec<Kernel> {
    PageElement::FLOATS.map(|element| kernel(element, PageShape::HEAD_DIM_MAX)).into()
}

/// Scores pages by mean keys, or by the bounds of their elements: `Σ max(q · least, q · most)`.
#[derive(Debug)]
pub struct PageScorer {
    device: Arc<dyn Device>,
    heads: HeadShape,
    kernel: Kernel,
}

impl PageScorer {
    /// For summaries of `element`, a float; up to 8 query heads of a KV head.
    pub fn new(device: &Arc<dyn Device>, heads: HeadShape, element: PageElement) -> Result<Self, Error> {
        let invalid = |field, problem: String| Err(Error::Invalid { field, problem });
        let HeadShape { kv_heads, group, head_dim } = heads;
        PageShape { tokens: 16, kv_heads, head_dim, element: PageElement::F32 }.validate()?;
        if !(1..=GROUP_MAX).contains(&group) {
            return invalid("group", format!("is {group}, must be from 1 to {GROUP_MAX}"));
        }
        if element.is_scaled() {
            return invalid("element", format!("of summaries is {element:?}, must be a float"));
        }
        Ok(Self { device: Arc::clone(device), heads, kernel: kernel(element, head_dim) })
    }

    /// Queues a launch.
    pub fn launch(&self, call: &PageScoreCall<'_>) -> Result<(), Error> {
        if call.count > u16::MAX as usize {
            let problem = format!("are {}, at most {}", call.count, u16::MAX);
            return Err(Error::Invalid { field: "items", problem });
        }
        if call.count == 0 || call.most_pages == 0 {
            return Ok(());
        }
        let HeadShape { kv_heads, group, head_dim } = self.heads;
        let most = 1 << 30;
        let params = Params {
            queries: call.queries.address(),
            items: call.items.for_kernel("items", &[call.count], size_of::<PageScoreItem>())?,
            scores: call.scores.for_kernel(
                "scores",
                &[kv_heads, call.count, call.stride],
                size_of::<f32>(),
            )?,
            kv_heads: kv_heads as u32,
            group: group as u32,
            stride: call.stride as u32,
            sum: call.sum.into(),
            sink: call.sink.min(most),
            local: call.local.min(most),
        };
        let grid = [call.most_pages.div_ceil(PAGES) as u32, kv_heads as u32, call.count as u32];
        let launch = Launch::new(&self.kernel, grid, THREADS, &params);
        self.device.launch(&launch.shared((group * head_dim * size_of::<f32>()) as u32))
    }
}
