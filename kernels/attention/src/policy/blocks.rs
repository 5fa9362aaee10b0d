//! Scorer × selector: one query tile of one KV head at a time.

use std::cell::RefCell;
use std::ops::Range;

use longshore_compute::InstructionSet;

use crate::shape::LANES;
use crate::simd::{Lane, dispatch};
use crate::{Error, PagedKv};

use super::antidiagonal;
use super::grid::{Grid, TileRows};
use super::levels::{Bounds, Panels, spread};
use super::list::{Chosen, List};
use super::pack::{Packed, head, mean_queries};
use super::scores::{CellSums, RowSums, Score, energies, peaks};
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
    /// Taken from the scores of each row.
    offsets: Vec<f32>,
    cells: Vec<[Lane; 2]>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Scratch {
    /// Room for the scores of the packed rows in panels, not divided by anything.
    pub(super) fn clear(&mut self, panels: usize) {
        self.scores.resize(panels * self.packed.rows, [0.0; LANES]);
        self.offsets.clear();
        self.offsets.resize(self.packed.rows, 0.0);
    }
}

/// Calls `f` with the thread's buffers.
pub(super) fn with_scratch<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    SCRATCH.with_borrow_mut(f)
}

/// What the blocks before a tile weigh, log2.
#[derive(Debug, Default)]
struct BlockScores {
    energies: Vec<f32>,
    /// Largest share that any row gives to a cell of the block; empty when the rule does not ask.
    peaks: Vec<f32>,
}

/// Plans tiles by a scorer and a selector.
pub(super) struct BlockPlanner<'a> {
    grid: &'a Grid<'a>,
    /// Of each KV head; none is dense.
    rules: Vec<Option<Blocks>>,
    set: InstructionSet,
    /// `[kv_heads][blocks]`: visited because their keys are unlike their mean; empty when that does not count.
    escaped: Vec<bool>,
    /// Of each KV head, where its rule has two levels.
    bounds: Vec<Option<Bounds>>,
    scored: usize,
}

impl<'a> BlockPlanner<'a> {
    /// `rules`: one of each KV head; `scored`: the most blocks that a tile scores.
    pub(super) fn new(
        grid: &'a Grid<'a>,
        rules: Vec<Option<Blocks>>,
        set: InstructionSet,
        scored: usize,
    ) -> Result<Self, Error> {
        let any = |wanted: fn(&Blocks) -> bool| rules.iter().flatten().any(wanted);
        if any(|_| true) {
            grid.check_complete()?;
        }
        if any(|rule| rule.correction || !rule.is_antidiagonal()) {
            grid.check_summaries(scored)?;
        }
        if any(|rule| rule.scorer == Scorer::SecondOrder) {
            grid.check_spreads(scored)?;
        }
        if any(Blocks::is_antidiagonal) {
            grid.check_tiles(scored)?;
        }
        let escaped = escaped(grid, &rules, scored)?;
        let bounds = |(kv_head, rule): (usize, &Option<Blocks>)| {
            let panels = rule.filter(|rule| rule.two_levels).map(|_| {
                let at = Panels::of(grid.stripe as usize);
                (panels_of(grid, grid.input.summaries, kv_head, scored, None), at)
            });
            panels.map(|(panels, at)| Bounds::of(&panels, at, scored))
        };
        let bounds = rules.iter().enumerate().map(bounds).collect();
        Ok(Self { grid, rules, set, escaped, bounds, scored })
    }

    /// The call.
    pub(super) fn grid(&self) -> &'a Grid<'a> {
        self.grid
    }

    /// `[kv_heads][blocks]`: visited because their keys are unlike their mean; empty when that does not count.
    pub(super) fn escaped(&self) -> &[bool] {
        &self.escaped
    }

    /// How many tiles are best planned together: so that each key that is read serves more rows.
    pub(super) fn tiles_at_once(&self) -> usize {
        if self.rules.iter().flatten().any(Blocks::is_antidiagonal) { 4 } else { 1 }
    }

    /// The lists of some tiles, which ascend; what each is does not depend on the others.
    pub(super) fn plan(&self, tiles: &[&TileRows], kv_head: usize) -> Vec<List> {
        let Some(rule) = &self.rules[kv_head] else {
            return tiles.iter().map(|tile| Chosen::all(self.grid, tile).list(self.grid, tile)).collect();
        };
        with_scratch(|scratch| match rule.scorer {
            Scorer::Antidiagonal(stride) => self.antidiagonal(rule, tiles, kv_head, stride, scratch),
            Scorer::Pooled | Scorer::RowNormalised | Scorer::SecondOrder | Scorer::PooledQuery => {
                let list = |tile: &&TileRows| {
                    self.list(rule, tile, kv_head, self.energies(rule, tile, kv_head, scratch))
                };
                tiles.iter().map(list).collect()
            }
        })
    }

    /// The list of a tile, given the energies of the blocks before it.
    fn list(&self, rule: &Blocks, tile: &TileRows, kv_head: usize, scores: BlockScores) -> List {
        let grid = self.grid;
        let mut chosen = Chosen::diagonal(grid, tile);
        let scored = scores.energies.len();
        select(rule.selector, rule.most(), &scores.energies, &mut chosen.blocks);
        if let Some(share) = rule.peak {
            let least = share.log2();
            chosen.blocks.iter_mut().zip(&scores.peaks).for_each(|(block, &peak)| *block |= peak >= least);
        }
        let local = scored.saturating_sub(rule.local as usize);
        chosen.blocks[..scored.min(rule.sink as usize)].fill(true);
        chosen.blocks[local..scored].fill(true);
        if rule.escape.is_some() {
            let escaped = &self.escaped[kv_head * self.scored..][..scored];
            chosen.blocks.iter_mut().zip(escaped).for_each(|(block, &escaped)| *block |= escaped);
        }
        if rule.correction {
            chosen.means = scored;
        }
        chosen.list(grid, tile)
    }

    fn antidiagonal(
        &self,
        rule: &Blocks,
        tiles: &[&TileRows],
        kv_head: usize,
        stride: usize,
        scratch: &mut Scratch,
    ) -> Vec<List> {
        let grid = self.grid;
        antidiagonal::score(grid, self.set, tiles, kv_head, stride, scratch);
        row_sums(self.set, scratch);
        let rows = scratch.packed.rows / tiles.len();
        let cells = grid.block as usize / stride;
        let list = |(number, tile): (usize, &&TileRows)| {
            let scored = grid.before(tile);
            let (rows, panels) = (number * rows..(number + 1) * rows, (scored * cells).div_ceil(LANES));
            let sums = cell_sums(self.set, rows, panels, scratch);
            self.list(rule, tile, kv_head, scores(rule, sums, cells, scored, scored))
        };
        tiles.iter().enumerate().map(list).collect()
    }

    /// Energies of the blocks before a tile, by their means.
    fn energies(&self, rule: &Blocks, tile: &TileRows, kv_head: usize, scratch: &mut Scratch) -> BlockScores {
        let (queries, scored) = (&self.grid.input.queries, self.grid.before(tile));
        if scored == 0 {
            return BlockScores::default();
        }
        let group = queries.shape.group;
        let bounds = self.bounds[kv_head].as_ref();
        let open =
            bounds.and_then(|bounds| bounds.open(self.grid, self.set, (tile, kv_head), scored, scratch));
        let open = open.as_deref();
        if rule.scorer == Scorer::PooledQuery {
            score_mean_queries(self.grid, self.set, tile, kv_head, true, scratch);
        } else {
            let row = |packed: usize| {
                head(queries, tile.rows.start + packed / group, kv_head * group + packed % group)
            };
            scratch.packed.fill(tile.rows.len() * group, queries.shape.head_dim, row);
            score_means(self.grid, self.set, kv_head, (scored, open), scratch);
            if rule.scorer == Scorer::SecondOrder {
                add_spreads(self.grid, self.set, kv_head, (scored, open), scratch);
            }
            hide_tail(self.grid, (scored, open), scratch);
        }
        if matches!(rule.scorer, Scorer::RowNormalised | Scorer::SecondOrder) {
            row_sums(self.set, scratch);
        }
        let (rows, panels) = (scratch.packed.rows, scratch.scores.len() / scratch.packed.rows);
        let sums = cell_sums(self.set, 0..rows, panels, scratch);
        let Some(open) = open else { return scores(rule, sums, 1, self.grid.stripe as usize, scored) };
        let cells = scores(rule, sums, 1, LANES, open.len() * LANES);
        let at = Panels::of(self.grid.stripe as usize);
        let peaks = rule.peak.map(|_| spread(&cells.peaks, open, at, scored)).unwrap_or_default();
        BlockScores { energies: spread(&cells.energies, open, at, scored), peaks }
    }
}

/// The first so many blocks, and which panels of them count; `None`: all.
type Scored<'a> = (usize, Option<&'a [usize]>);

fn scores(rule: &Blocks, sums: &[[Lane; 2]], cells: usize, per_run: usize, blocks: usize) -> BlockScores {
    let peaks = rule.peak.map(|_| peaks(sums, cells, per_run, blocks)).unwrap_or_default();
    BlockScores { energies: energies(sums, cells, per_run, blocks), peaks }
}

/// `[kv_heads][blocks]`: what the guard `escape` of each head lets through; empty when no head has it.
fn escaped(grid: &Grid<'_>, rules: &[Option<Blocks>], scored: usize) -> Result<Vec<bool>, Error> {
    let limits: Vec<Option<f32>> = rules.iter().map(|rule| rule.and_then(|rule| rule.escape)).collect();
    if limits.iter().all(Option::is_none) {
        return Ok(Vec::new());
    }
    let Some(cosines) = grid.input.cosines else {
        return invalid("cosines", "are missing: the guard `escape` needs them");
    };
    let mut escaped = Vec::with_capacity(limits.len() * scored);
    for (kv_head, limit) in limits.iter().enumerate() {
        // What cannot be compared is visited.
        let escapes = |cosine: f32| limit.is_some_and(|limit| cosine < limit || cosine.is_nan());
        escaped.extend((0..scored).map(|block| limit.is_some() && escapes(cosines(block as u64, kv_head))));
    }
    Ok(escaped)
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
    let group = grid.input.queries.shape.group;
    let heads = kv_head * group..(kv_head + 1) * group;
    mean_queries(&grid.input.queries, tile.rows.clone(), heads, together, &mut scratch.means);
    score_packed_means(grid, set, kv_head, grid.before(tile), scratch);
}

/// Scores of the mean query of some rows of the call, of each of some heads of a KV head, against the mean keys of the first
/// blocks.
pub(super) fn score_mean_rows(
    grid: &Grid<'_>,
    set: InstructionSet,
    (rows, heads): (Range<usize>, Range<usize>),
    kv_head: usize,
    blocks: usize,
    scratch: &mut Scratch,
) {
    mean_queries(&grid.input.queries, rows, heads, false, &mut scratch.means);
    score_packed_means(grid, set, kv_head, blocks, scratch);
}

fn score_packed_means(
    grid: &Grid<'_>,
    set: InstructionSet,
    kv_head: usize,
    blocks: usize,
    scratch: &mut Scratch,
) {
    let (dim, means) = (grid.input.queries.shape.head_dim, &scratch.means);
    scratch.packed.fill(means.len() / dim, dim, |row| &means[row * dim..][..dim]);
    score_means(grid, set, kv_head, (blocks, None), scratch);
    hide_tail(grid, (blocks, None), scratch);
}

/// Scores of the packed rows against the mean keys of the first `blocks` blocks; those of the last panels' other cells mean
/// nothing.
fn score_means(
    grid: &Grid<'_>,
    set: InstructionSet,
    kv_head: usize,
    (blocks, open): Scored<'_>,
    scratch: &mut Scratch,
) {
    let panels = panels_of(grid, grid.input.summaries, kv_head, blocks, open);
    scratch.clear(panels.len());
    let scale = grid.input.queries.scale * std::f32::consts::LOG2_E;
    let (rows, scores) = (&scratch.packed, &mut scratch.scores[..]);
    dispatch(set, Score::<f32> { rows, panels: &panels, scales: &[], scale, onto: false, scores });
}

/// Adds half the variance of the scores within each block, elements taken as independent: log of the mean of 2^score, as far
/// as two moments tell. Packed queries are squared for it.
fn add_spreads(
    grid: &Grid<'_>,
    set: InstructionSet,
    kv_head: usize,
    (blocks, open): Scored<'_>,
    scratch: &mut Scratch,
) {
    let spreads = grid.input.spreads.expect("checked when the planner was made");
    let panels = panels_of(grid, spreads, kv_head, blocks, open);
    let scale = grid.input.queries.scale;
    let scale = 0.5 * scale * scale * std::f32::consts::LOG2_E;
    scratch.packed.square();
    let (rows, scores) = (&scratch.packed, &mut scratch.scores[..]);
    dispatch(set, Score::<f32> { rows, panels: &panels, scales: &[], scale, onto: true, scores });
}

/// The panels of keys of the first `blocks` blocks in summaries or spreads; of those that are open, where some are not.
fn panels_of<'a>(
    grid: &Grid<'_>,
    means: &'a dyn PagedKv,
    kv_head: usize,
    blocks: usize,
    open: Option<&[usize]>,
) -> Vec<&'a [[f32; LANES]]> {
    let (stripe, dim) = (grid.stripe as usize, grid.input.queries.shape.head_dim);
    if let Some(open) = open {
        let per_stripe = stripe.div_ceil(LANES);
        let panel = |&panel: &usize| {
            let head = means.tile(panel / per_stripe).head::<f32>(kv_head);
            &head.k[panel % per_stripe * dim..][..dim]
        };
        return open.iter().map(panel).collect();
    }
    let mut panels = Vec::with_capacity(blocks.div_ceil(LANES));
    for tile in 0..blocks.div_ceil(stripe) {
        let head = means.tile(tile).head::<f32>(kv_head);
        let here = stripe.min(blocks - tile * stripe).div_ceil(LANES);
        panels.extend(head.k.chunks_exact(dim).take(here));
    }
    panels
}

/// Makes the scores of cells that are no blocks −∞.
fn hide_tail(grid: &Grid<'_>, (blocks, open): Scored<'_>, scratch: &mut Scratch) {
    let (rows, at) = (scratch.packed.rows, Panels::of(grid.stripe as usize));
    for (index, scores) in scratch.scores.chunks_exact_mut(rows).enumerate() {
        let panel = open.map_or(index, |open| open[index]);
        hide(scores, at.cells(panel, blocks));
    }
}

/// Makes the scores from cell `cells` of a panel on −∞.
pub(super) fn hide(scores: &mut [Lane], cells: usize) {
    if cells < LANES {
        scores.iter_mut().for_each(|lane| lane[cells..].fill(f32::NEG_INFINITY));
    }
}

/// Divides each row by its sum: later sums are of its shares.
pub(super) fn row_sums(set: InstructionSet, scratch: &mut Scratch) {
    let Scratch { scores, tops, sums, offsets, packed, .. } = scratch;
    tops.resize(packed.rows, [0.0; LANES]);
    sums.resize(packed.rows, [0.0; LANES]);
    dispatch(set, RowSums { scores, tops, sums, logs: offsets });
}

/// Sums of the cells of the first panels over some rows.
pub(super) fn cell_sums(
    set: InstructionSet,
    rows: Range<usize>,
    panels: usize,
    scratch: &mut Scratch,
) -> &[[Lane; 2]] {
    let Scratch { scores, offsets, cells, packed, .. } = scratch;
    let stride = packed.rows;
    cells.resize(panels, [[0.0; LANES]; 2]);
    let (scores, first) = (&scores[..panels * stride], rows.start);
    dispatch(set, CellSums { scores, stride, first, offsets: &offsets[rows], cells });
    cells
}
