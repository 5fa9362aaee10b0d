//! Scorer × selector: one query tile of one KV head at a time.

use std::cell::RefCell;

use longshore_compute::InstructionSet;

use crate::Error;
use crate::shape::LANES;
use crate::simd::{Lane, dispatch};

use super::antidiagonal;
use super::grid::{Grid, TileRows};
use super::list::{Chosen, List};
use super::pack::{Packed, head, mean_queries};
use super::scores::{CellSums, RowSums, Score, energies};
use super::select::select;
use super::{Blocks, Scorer, invalid};

/// What a thread keeps between tiles.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) packed: Packed,
    pub(super) means: Vec<f32>,
    pub(super) scores: Vec<Lane>,
    tops: Vec<Lane>,
    sums: Vec<Lane>,
    offsets: Vec<f32>,
    cells: Vec<[Lane; 2]>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Calls `f` with the thread's buffers.
pub(super) fn with_scratch<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    SCRATCH.with_borrow_mut(f)
}

/// Plans tiles by a scorer and a selector.
pub(super) struct BlockPlanner<'a> {
    grid: &'a Grid<'a>,
    rule: Blocks,
    set: InstructionSet,
    /// `[kv_heads][blocks]`: visited because their keys are unlike their mean; empty when that does not count.
    escaped: Vec<bool>,
    scored: usize,
}

impl<'a> BlockPlanner<'a> {
    /// `scored`: the most blocks that a tile scores.
    pub(super) fn new(
        grid: &'a Grid<'a>,
        rule: Blocks,
        set: InstructionSet,
        scored: usize,
    ) -> Result<Self, Error> {
        grid.check_complete()?;
        if rule.correction || !matches!(rule.scorer, Scorer::Antidiagonal(_)) {
            grid.check_summaries(scored)?;
        }
        if matches!(rule.scorer, Scorer::Antidiagonal(_)) {
            grid.check_tiles(scored)?;
        }
        let mut escaped = Vec::new();
        if let Some(limit) = rule.escape {
            let Some(cosines) = grid.input.cosines else {
                return invalid("cosines", "are missing: the guard `escape` needs them");
            };
            for kv_head in 0..grid.input.queries.shape.kv_heads {
                let cosines = (0..scored).map(|block| cosines(block as u64, kv_head));
                // What cannot be compared is visited.
                escaped.extend(cosines.map(|cosine| cosine < limit || cosine.is_nan()));
            }
        }
        Ok(Self { grid, rule, set, escaped, scored })
    }

    /// The list of a tile.
    pub(super) fn plan(&self, tile: &TileRows, kv_head: usize) -> List {
        let (grid, rule) = (self.grid, &self.rule);
        let mut chosen = Chosen::diagonal(grid, tile);
        let scored = grid.before(tile);
        if scored > 0 {
            let energies = with_scratch(|scratch| self.energies(tile, kv_head, scratch));
            select(rule.selector, &energies, &mut chosen.blocks);
            let local = scored.saturating_sub(rule.local as usize);
            chosen.blocks[..scored.min(rule.sink as usize)].fill(true);
            chosen.blocks[local..scored].fill(true);
            if !self.escaped.is_empty() {
                let escaped = &self.escaped[kv_head * self.scored..][..scored];
                chosen.blocks.iter_mut().zip(escaped).for_each(|(block, &escaped)| *block |= escaped);
            }
        }
        if rule.correction {
            chosen.means = scored;
        }
        chosen.list(grid, tile)
    }

    fn energies(&self, tile: &TileRows, kv_head: usize, scratch: &mut Scratch) -> Vec<f32> {
        let (queries, scored) = (&self.grid.input.queries, self.grid.before(tile));
        let group = queries.shape.group;
        let heads = kv_head * group..(kv_head + 1) * group;
        match self.rule.scorer {
            Scorer::Pooled | Scorer::RowNormalised => {
                let row = |packed: usize| {
                    head(queries, tile.rows.start + packed / group, heads.start + packed % group)
                };
                scratch.packed.fill(tile.rows.len() * group, queries.shape.head_dim, row);
                score_means(self.grid, self.set, kv_head, scored, scratch);
                let normalised = self.rule.scorer == Scorer::RowNormalised;
                let sums = cell_sums(self.set, 0..scratch.packed.rows, normalised, scratch);
                energies(sums, 1, self.grid.stripe as usize, scored)
            }
            Scorer::PooledQuery => {
                score_mean_queries(self.grid, self.set, tile, kv_head, true, scratch);
                energies(cell_sums(self.set, 0..1, false, scratch), 1, self.grid.stripe as usize, scored)
            }
            Scorer::Antidiagonal(stride) => {
                antidiagonal::score(self.grid, self.set, tile, kv_head, stride, scratch);
                let sums = cell_sums(self.set, 0..scratch.packed.rows, true, scratch);
                energies(sums, self.grid.block as usize / stride, scored, scored)
            }
        }
    }
}

/// Scores of the mean queries of a tile, one of all heads of the KV head together or one of each, against mean keys.
pub(super) fn score_mean_queries(
    grid: &Grid<'_>,
    set: InstructionSet,
    tile: &TileRows,
    kv_head: usize,
    together: bool,
    scratch: &mut Scratch,
) {
    let queries = &grid.input.queries;
    let (group, dim) = (queries.shape.group, queries.shape.head_dim);
    let heads = kv_head * group..(kv_head + 1) * group;
    mean_queries(queries, tile.rows.clone(), heads, together, &mut scratch.means);
    let means = &scratch.means;
    scratch.packed.fill(means.len() / dim, dim, |row| &means[row * dim..][..dim]);
    score_means(grid, set, kv_head, grid.before(tile), scratch);
}

/// Scores of the packed rows against the mean keys of the first `blocks` blocks.
fn score_means(grid: &Grid<'_>, set: InstructionSet, kv_head: usize, blocks: usize, scratch: &mut Scratch) {
    let (summaries, stripe) = (grid.input.summaries, grid.stripe as usize);
    let dim = scratch.packed.dim;
    let mut panels = Vec::with_capacity(blocks.div_ceil(LANES));
    for tile in 0..blocks.div_ceil(stripe) {
        let head = summaries.tile(tile).head::<f32>(kv_head);
        let here = stripe.min(blocks - tile * stripe).div_ceil(LANES);
        panels.extend(head.k.chunks_exact(dim).take(here));
    }
    let rows = scratch.packed.rows;
    scratch.scores.resize(panels.len() * rows, [0.0; LANES]);
    let scale = grid.input.queries.scale * std::f32::consts::LOG2_E;
    let (packed, scores) = (&scratch.packed, &mut scratch.scores[..]);
    dispatch(set, Score::<f32> { rows: packed, panels: &panels, scales: &[], scale, scores });
    let per_stripe = stripe.div_ceil(LANES);
    for (panel, scores) in scratch.scores.chunks_exact_mut(rows).enumerate() {
        let first = panel / per_stripe * stripe + panel % per_stripe * LANES;
        let end = blocks.min((panel / per_stripe + 1) * stripe);
        hide(scores, end - first);
    }
}

/// Makes the scores from cell `cells` of a panel on −∞.
pub(super) fn hide(scores: &mut [Lane], cells: usize) {
    if cells < LANES {
        scores.iter_mut().for_each(|lane| lane[cells..].fill(f32::NEG_INFINITY));
    }
}

/// Sums of the scores over some rows, each row divided by its own sum first when that is `normalised`.
pub(super) fn cell_sums(
    set: InstructionSet,
    rows: std::ops::Range<usize>,
    normalised: bool,
    scratch: &mut Scratch,
) -> &[[Lane; 2]] {
    let Scratch { scores, tops, sums, offsets, cells, packed, .. } = scratch;
    let stride = packed.rows;
    offsets.clear();
    offsets.resize(if normalised { stride } else { rows.len() }, 0.0);
    if normalised {
        tops.resize(stride, [0.0; LANES]);
        sums.resize(stride, [0.0; LANES]);
        dispatch(set, RowSums { scores, tops, sums, logs: offsets });
    }
    cells.resize(scores.len() / stride, [[0.0; LANES]; 2]);
    dispatch(set, CellSums { scores, stride, first: rows.start, offsets, cells });
    cells
}
