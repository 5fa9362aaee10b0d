//! Queries, keys and values of one layer, planted or taken from a model, and what exact attention makes of them.

use anyhow::Result;
use longshore_attention::{
    AttendItem, CpuExecutor, ExactBlock, Executor, HeadShape, Partials, PlanInput, Queries, Summaries, Tiles,
    WorkList,
};

use crate::eval::rows::{everything, share};

/// Blocks of a stripe.
const STRIPE_BLOCKS: u32 = 32;

/// The rows of one query tile: f32 `[rows, query_heads, head_dim]`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct QueryTile {
    pub(super) first_position: u64,
    pub(super) data: Vec<f32>,
}

/// One layer, or one kind of planted heads.
#[derive(Debug)]
pub(super) struct Layer {
    /// In tables.
    pub(super) name: String,
    pub(super) heads: HeadShape,
    pub(super) scale: f32,
    kv: Tiles,
    summaries: Summaries,
    pub(super) tiles: Vec<QueryTile>,
}

impl Layer {
    /// Summarises the full blocks.
    pub(super) fn new(
        name: String,
        (heads, scale): (HeadShape, f32),
        kv: Tiles,
        tokens: usize,
        tiles: Vec<QueryTile>,
    ) -> Result<Self> {
        let mut summaries = Summaries::new(kv.shape, STRIPE_BLOCKS, 0)?;
        for (block, tile) in kv.tiles.iter().enumerate().take(tokens / kv.shape.block_tokens) {
            summaries.push(block as u64, tile)?;
        }
        Ok(Self { name, heads, scale, kv, summaries, tiles })
    }

    /// Positions of a block.
    pub(super) fn block_tokens(&self) -> usize {
        self.kv.shape.block_tokens
    }

    /// Blocks that end before a tile begins.
    pub(super) fn before(&self, tile: &QueryTile) -> usize {
        tile.first_position as usize / self.block_tokens()
    }

    /// Blocks of a stripe.
    pub(super) fn stripe_blocks(&self) -> usize {
        STRIPE_BLOCKS as usize
    }

    /// Summaries of all full blocks.
    pub(super) fn summaries(&self) -> &Summaries {
        &self.summaries
    }

    /// Calls `f` with what a policy plans a tile from.
    pub(super) fn with_input<R>(&self, tile: &QueryTile, f: impl FnOnce(&PlanInput<'_>) -> R) -> R {
        let spreads = self.summaries.spreads();
        f(&PlanInput {
            queries: Queries {
                shape: self.heads,
                first_position: tile.first_position,
                scale: self.scale,
                data: &tile.data,
            },
            layer: 0,
            kv: &self.kv,
            first_block: 0,
            summaries: &self.summaries,
            stripe_blocks: STRIPE_BLOCKS,
            dense_from: u64::MAX,
            spreads: Some(&spreads),
            cosines: None,
        })
    }

    /// What exact attention makes of a tile.
    pub(super) fn truth(&self, executor: &CpuExecutor, tile: &QueryTile) -> Result<Truth> {
        let block_tokens = self.block_tokens() as u64;
        self.with_input(tile, |input| {
            let attend = |work: &WorkList| -> Result<Partials> {
                let item = AttendItem { queries: input.queries, kv: input.kv, work, initial: None };
                Ok(executor.attend(&[item])?.remove(0))
            };
            let rows = input.queries.rows();
            let exact = attend(&everything(tile.first_position + rows as u64, block_tokens))?;
            let mut masses = vec![Vec::with_capacity(self.before(tile)); self.heads.kv_heads];
            for block in 0..self.before(tile) as u64 {
                let visited = ExactBlock {
                    tile: block as u32,
                    first_position: block * block_tokens,
                    len: block_tokens as u32,
                };
                let part = attend(&WorkList { exact: vec![visited], ..WorkList::default() })?;
                for (kv_head, masses) in masses.iter_mut().enumerate() {
                    let group = kv_head * self.heads.group..(kv_head + 1) * self.heads.group;
                    let pairs = group.flat_map(|head| (0..rows).map(move |row| (row, head)));
                    masses.push(pairs.map(|(row, head)| share(&part, &exact, row, head)).sum());
                }
            }
            Ok(Truth { exact, masses })
        })
    }
}

/// Exact attention of one query tile.
#[derive(Debug)]
pub(super) struct Truth {
    pub(super) exact: Partials,
    /// `[kv_heads][blocks before the tile]`: the softmax that falls on a block, summed over the packed rows.
    pub(super) masses: Vec<Vec<f64>>,
}
