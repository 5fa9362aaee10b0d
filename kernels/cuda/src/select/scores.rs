//! Energies of blocks for query tiles, by mean keys.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use longshore_attention::{HeadShape, QUERY_TILE};

use crate::{Device, Error, Kernel, Launch, PageElement, PageShape, Source, Span};

const SOURCE: Source = Source {
    name: "score_blocks.cu",
    text: concat!(
        include_str!("../../source/score_blocks.cuh"),
        include_str!("../../source/score_blocks_f32.cuh"),
        include_str!("../../source/score_blocks_mma.cuh"),
        include_str!("../../source/score_blocks.cu"),
    ),
};
const WARPS: usize = 4;

/// Places and sizes of a launch. Query tiles are whole and follow each other.
#[derive(Debug, Clone, Copy)]
pub struct ScoreCall<'a> {
    /// `[rows][query_heads][head_dim]`, rotated.
    pub queries: Span<'a>,
    /// Table of u64 addresses of pages of means, whose keys are the mean keys of the blocks of a stripe, from block 0 on; in the layout
    /// of pages and the type of the queries.
    pub means: Span<'a>,
    /// f32 `[kv_heads][tiles][stride]`: what comes out, of the blocks that end before each tile; the rest stays as it is.
    pub energies: Span<'a>,
    /// Likewise, log2 of the largest share that any row of the tile gives to the block, where that is wanted.
    pub peaks: Option<Span<'a>>,
    /// Position of the first tile, a multiple of 32.
    pub first_position: u64,
    /// Its first row among the queries.
    pub first_row: usize,
    /// Tiles.
    pub tiles: usize,
    /// Pages of means.
    pub stripes: usize,
    /// Blocks of a stripe.
    pub stripe_blocks: usize,
    /// Keys that a page of means has room for.
    pub page_keys: usize,
    /// Elements from one tile's energies to the next's.
    pub stride: usize,
    /// Positions of a block.
    pub block_tokens: usize,
    /// Softmax scale.
    pub scale: f32,
    /// Whether each row counts by its share among the scored blocks (scorer `row-normalised`) or as it is (`pooled`).
    pub normalise: bool,
}

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    queries: u64,
    means: u64,
    energies: u64,
    peaks: u64,
    first_position: u64,
    first_row: u32,
    kv_heads: u32,
    group: u32,
    stripe_blocks: u32,
    page_keys: u32,
    stride: u32,
    tokens: u32,
    scale: f32,
    normalise: u32,
    unused: u32,
}

fn kernel(element: PageElement, head_dim: usize) -> Kernel {
    let constants = vec![
        ("BLOCK_TILES", if head_dim > 128 { 1 } else { 2 }),
        ("DTYPE", element.constant()),
        ("HEAD_DIM", head_dim as i64),
        ("WARPS", WARPS as i64),
    ];
    Kernel { source: SOURCE, entry: "score_blocks", constants }
}

/// Of every element and head size.
pub(super) fn all_kernels() -> Vec<Kernel> {
    let dims = |element| PageShape::HEAD_DIMS.map(|head_dim| kernel(element, head_dim));
    PageElement::FLOATS.into_iter().flat_map(dims).collect()
}

/// Scores blocks by their mean keys: the scorers `pooled` and `row-normalised`.
#[derive(Debug)]
pub struct BlockScorer {
    device: Arc<dyn Device>,
    heads: HeadShape,
    element: PageElement,
    kernel: Kernel,
    shared: usize,
}

impl BlockScorer {
    /// For queries and means of `element`, a float. Refuses groups and heads that the device has no shared memory for.
    pub fn new(device: &Arc<dyn Device>, heads: HeadShape, element: PageElement) -> Result<Self, Error> {
        let invalid = |field, problem: String| Err(Error::Invalid { field, problem });
        let HeadShape { kv_heads, group, head_dim } = heads;
        PageShape { tokens: 16, kv_heads, head_dim, element: PageElement::F32 }.validate()?;
        if element.is_scaled() {
            return invalid("element", format!("of means is {element:?}, must be a float"));
        }
        let rows = group * QUERY_TILE;
        // Queries, what each row takes off, and its sums by warp.
        let query = match element {
            PageElement::F32 => head_dim * size_of::<f32>(),
            _ => ((head_dim.div_ceil(32) * 4 + 3) / 8 * 8 + 4) * 16,
        };
        let shared = rows * (query + size_of::<f32>() * (1 + 2 * WARPS));
        let limit = device.shared_bytes_limit();
        if group == 0 || shared > limit {
            let problem = format!(
                "is {group}: its queries take {shared} bytes of shared memory, the device has {limit}"
            );
            return invalid("group", problem);
        }
        Ok(Self { device: Arc::clone(device), heads, element, kernel: kernel(element, head_dim), shared })
    }

    /// Queues a launch. Refuses tiles off the grid and energies that do not fit.
    pub fn launch(&self, call: &ScoreCall<'_>) -> Result<(), Error> {
        let invalid = |field, problem: String| Err(Error::Invalid { field, problem });
        if call.tiles == 0 {
            return Ok(());
        }
        if !call.first_position.is_multiple_of(QUERY_TILE as u64) {
            return invalid(
                "first_position",
                format!("is {}, must be a multiple of 32", call.first_position),
            );
        }
        if !call.scale.is_finite() {
            return invalid("scale", format!("is {}, must be finite", call.scale));
        }
        if !call.block_tokens.is_power_of_two() {
            return invalid("block_tokens", format!("is {}, must be a power of two", call.block_tokens));
        }
        let last = call.first_position + ((call.tiles - 1) * QUERY_TILE) as u64;
        let scored = last / call.block_tokens as u64;
        if !(1..=call.page_keys).contains(&call.stripe_blocks) || call.page_keys > 256 {
            let problem = format!("is {}, pages of means have {} keys", call.stripe_blocks, call.page_keys);
            return invalid("stripe_blocks", problem);
        }
        let room = call.stripes.saturating_mul(call.stripe_blocks).min(call.stride).min(u32::MAX as usize);
        if scored > room as u64 {
            return invalid("stripes", format!("have room for {room}, the last tile scores {scored}"));
        }
        let HeadShape { kv_heads, head_dim, .. } = self.heads;
        let (rows, bytes) = (call.first_row + call.tiles * QUERY_TILE, self.element.bytes());
        let room = [kv_heads, call.tiles, call.stride];
        let peaks = call.peaks.map(|peaks| peaks.for_kernel("peaks", &room, size_of::<f32>()));
        let params = Params {
            queries: call.queries.for_kernel(
                "queries",
                &[rows, self.heads.query_heads(), head_dim],
                bytes,
            )?,
            means: call.means.for_kernel("means", &[call.stripes], size_of::<u64>())?,
            energies: call.energies.for_kernel("energies", &room, size_of::<f32>())?,
            peaks: peaks.transpose()?.unwrap_or(0),
            first_position: call.first_position,
            first_row: call.first_row as u32,
            kv_heads: self.heads.kv_heads as u32,
            group: self.heads.group as u32,
            stripe_blocks: call.stripe_blocks as u32,
            page_keys: call.page_keys as u32,
            stride: call.stride as u32,
            tokens: call.block_tokens as u32,
            scale: call.scale * std::f32::consts::LOG2_E,
            normalise: call.normalise.into(),
            unused: 0,
        };
        let grid = [call.tiles as u32, self.heads.kv_heads as u32, 1];
        let launch = Launch::new(&self.kernel, grid, (WARPS * 32) as u32, &params);
        self.device.launch(&launch.shared(self.shared as u32))
    }
}
