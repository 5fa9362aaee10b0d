//! Where the query tiles, blocks and stripes of a call lie; checks all that a plan is made from.

use std::ops::Range;

use crate::summaries::{STRIPE_MAX, stripe_keys};
use crate::{Error, KvDtype, PagedKv, QUERY_TILE, TileShape};

use super::vertical_slash::SPAN;
use super::{PlanInput, PrefillPolicy, invalid};

/// Rows of one query tile.
#[derive(Debug, Clone)]
pub(super) struct TileRows {
    /// Rows of the call.
    pub(super) rows: Range<usize>,
    /// Position of the first row.
    pub(super) first: u64,
    /// Position of the last row.
    pub(super) last: u64,
}

impl TileRows {
    /// Whether the call has all of the tile.
    pub(super) fn is_whole(&self) -> bool {
        self.rows.len() == QUERY_TILE && self.first.is_multiple_of(QUERY_TILE as u64)
    }
}

/// The geometry of a call, checked.
pub(super) struct Grid<'a> {
    pub(super) input: &'a PlanInput<'a>,
    /// Positions of a block.
    pub(super) block: u64,
    /// Blocks of a stripe.
    pub(super) stripe: u64,
    pub(super) tiles: Vec<TileRows>,
}

impl<'a> Grid<'a> {
    pub(super) fn new(input: &'a PlanInput<'a>) -> Result<Self, Error> {
        Self::of_rows(input, input.queries.rows())
    }

    /// The same of so many rows, whose queries may be elsewhere.
    pub(super) fn of_rows(input: &'a PlanInput<'a>, rows: usize) -> Result<Self, Error> {
        let (queries, kv) = (&input.queries, input.kv.shape());
        kv.validate()?;
        let shape = queries.shape;
        if shape.group == 0 || (shape.kv_heads, shape.head_dim) != (kv.kv_heads, kv.head_dim) {
            return invalid("queries", format!("have heads {shape:?}, the tiles have {kv:?}"));
        }
        let width = shape.query_heads() * shape.head_dim;
        if !queries.data.len().is_multiple_of(width) {
            let problem = format!("have {} elements, must be a multiple of {width}", queries.data.len());
            return invalid("queries", problem);
        }
        if !queries.scale.is_finite() {
            return invalid("scale", format!("is {}, must be finite", queries.scale));
        }
        if !(1..=STRIPE_MAX).contains(&input.stripe_blocks) {
            let problem = format!("is {}, must be from 1 to {STRIPE_MAX}", input.stripe_blocks);
            return invalid("stripe_blocks", problem);
        }
        let end = queries.first_position.checked_add(rows as u64);
        if end.is_none_or(|end| end > 1 << 40) {
            return invalid("first_position", format!("is {}, too large", queries.first_position));
        }
        let grid = Self {
            input,
            block: kv.block_tokens as u64,
            stripe: u64::from(input.stripe_blocks),
            tiles: tiles(queries.first_position, rows),
        };
        grid.check_blocks()?;
        Ok(grid)
    }

    fn check_blocks(&self) -> Result<(), Error> {
        let Some(last) = self.tiles.last() else { return Ok(()) };
        let (first, tiles) = (self.input.first_block, self.input.kv.len() as u64);
        if self.tiles[0].first / self.block < first {
            let problem = format!("is {first}, after the block of the first row");
            return invalid("first_block", problem);
        }
        if last.last / self.block - first >= tiles.min(u64::from(u32::MAX)) {
            let problem = format!(
                "has {tiles} tiles from block {first} on, the last row lies in block {}",
                last.last / self.block
            );
            return invalid("kv", problem);
        }
        Ok(())
    }

    /// Blocks that end before the tile begins.
    pub(super) fn before(&self, tile: &TileRows) -> usize {
        (tile.first / self.block) as usize
    }

    /// Blocks up to the tile's last row.
    pub(super) fn seen(&self, tile: &TileRows) -> usize {
        (tile.last / self.block) as usize + 1
    }

    /// Whether the guards make the tile's rows exact.
    pub(super) fn is_exact(&self, policy: &PrefillPolicy, tile: &TileRows) -> bool {
        let guards = &policy.guards;
        policy.is_exact()
            || !tile.is_whole()
            || self.input.layer < guards.dense_layers
            || tile.first < guards.min_positions
            || tile.last >= self.input.dense_from
    }

    /// Refuses what compares blocks without having all of them.
    pub(super) fn check_complete(&self) -> Result<(), Error> {
        match self.input.first_block {
            0 => Ok(()),
            first => invalid(
                "first_block",
                format!("is {first}, must be 0: the policy compares all blocks before a row"),
            ),
        }
    }

    /// Checks the tiles of the first blocks, which will be read.
    pub(super) fn check_tiles(&self, blocks: usize) -> Result<(), Error> {
        check_shapes("kv", self.input.kv, blocks, &self.input.kv.shape())
    }

    /// Checks the summaries of the first blocks.
    pub(super) fn check_summaries(&self, blocks: usize) -> Result<(), Error> {
        self.check_means("summaries", self.input.summaries, blocks)
    }

    /// Refuses spreads that are missing, of another shape, or too few.
    pub(super) fn check_spreads(&self, blocks: usize) -> Result<(), Error> {
        match self.input.spreads {
            Some(spreads) => self.check_means("spreads", spreads, blocks),
            None => invalid("spreads", "are missing: the scorer `second-order` needs them"),
        }
    }

    fn check_means(&self, field: &'static str, means: &dyn PagedKv, blocks: usize) -> Result<(), Error> {
        let kv = self.input.kv.shape();
        let keys = stripe_keys(self.input.stripe_blocks);
        let wanted = TileShape { block_tokens: keys, dtype: KvDtype::F32, ..kv };
        let (found, tiles) = (means.shape(), means.len());
        if found != wanted {
            return invalid(field, format!("are tiles of {found:?}, must be {wanted:?}"));
        }
        let needed = blocks.div_ceil(self.stripe as usize);
        if tiles < needed {
            return invalid(field, format!("are of {tiles} stripes, {blocks} blocks need {needed}"));
        }
        check_shapes(field, means, needed, &wanted)
    }
}

fn check_shapes(field: &'static str, kv: &dyn PagedKv, tiles: usize, shape: &TileShape) -> Result<(), Error> {
    match (0..tiles).find(|&tile| kv.tile(tile).shape() != *shape) {
        None => Ok(()),
        Some(tile) => {
            let found = kv.tile(tile).shape();
            invalid(field, format!("have tile {tile} of shape {found:?}, must be {shape:?}"))
        }
    }
}

/// Cuts rows at the grid of query tiles.
fn tiles(first_position: u64, rows: usize) -> Vec<TileRows> {
    let mut tiles = Vec::with_capacity(rows / QUERY_TILE + 2);
    let mut row = 0;
    while row < rows {
        let first = first_position + row as u64;
        let end = rows.min(row + QUERY_TILE - (first % QUERY_TILE as u64) as usize);
        tiles.push(TileRows { rows: row..end, first, last: first + (end - row) as u64 - 1 });
        row = end;
    }
    tiles
}

/// Spans of these tiles of which the call has all rows.
pub(super) fn spans(grid: &Grid<'_>, tiles: &[&TileRows]) -> Vec<u64> {
    let (queries, span) = (&grid.input.queries, SPAN as u64);
    let whole =
        queries.first_position.div_ceil(span)..(queries.first_position + queries.rows() as u64) / span;
    let mut spans: Vec<u64> =
        tiles.iter().map(|tile| tile.first / span).filter(|span| whole.contains(span)).collect();
    spans.dedup();
    spans
}
