//! MInference's online index: which keys and which distances weigh most for the last rows of a span.
//!
//! The attention of a query head's last 64 rows of a span over all keys up to themselves is taken twice, block by block:
//! first for the sums of the rows, then for the sums over columns and over diagonals. So memory is linear in the keys.
//! Rows are added in order within a block of keys, blocks in order; a row's own sum runs lane by lane over the panels and
//! then over the lanes pairwise.

use std::cell::RefCell;

use half::{bf16, f16};
use longshore_compute::InstructionSet;

use crate::KvDtype;
use crate::shape::LANES;
use crate::simd::{Kernel, Lane, Simd, dispatch};
use crate::tile::Element;

use super::grid::Grid;
use super::log2::log2;
use super::pack::{Packed, head};
use super::scores::Score;
use super::select::heaviest;

/// Positions that share an index; spans lie on a grid.
pub(super) const SPAN: usize = 512;
/// Rows at the end of a span that the index is made from.
pub(super) const LAST: usize = 64;
/// First keys and newest distances that every index has.
const VERTICALS: usize = 30;
const SLASHES: usize = 100;
/// Panels of the largest block.
const PANELS: usize = 256 / LANES;

/// How much a head visits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budget {
    pub(super) vertical: usize,
    pub(super) slash: usize,
}

/// What the rows of a span visit.
#[derive(Debug, Clone)]
pub(super) struct Index {
    /// Positions of keys, ascending.
    pub(super) verticals: Vec<u64>,
    /// Distances from a row to a key, ascending.
    pub(super) slashes: Vec<u64>,
}

/// What a thread keeps between indices.
#[derive(Debug, Default)]
struct Scratch {
    packed: Packed,
    scores: Vec<Lane>,
    columns: Vec<f32>,
    /// Diagonal of key `j` and row `i` (of the last ones) is `j + LAST - 1 - i`.
    diagonals: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Index of a query head for the span of this number, of which the call has all rows.
pub(super) fn index(
    grid: &Grid<'_>,
    set: InstructionSet,
    span: u64,
    query_head: usize,
    budget: Budget,
) -> Index {
    estimate(grid, set, span, query_head, |columns, diagonals| {
        let end = columns.len();
        columns[..VERTICALS].fill(f32::INFINITY);
        diagonals[end - SLASHES..].fill(f32::INFINITY);
        let pick = |count: usize, sums: &[f32], place: &dyn Fn(u32) -> u64| {
            let mut picked: Vec<u64> = heaviest(count, sums).into_iter().map(place).collect();
            picked.sort_unstable();
            picked
        };
        Index {
            verticals: pick(budget.vertical.max(VERTICALS), columns, &u64::from),
            slashes: pick(budget.slash.max(SLASHES), diagonals, &|at| end as u64 - 1 - u64::from(at)),
        }
    })
}

/// Calls `with` with the attention of a query head's last rows of a span, summed over columns (by position) and over diagonals
/// (the largest distance first). The call must have all rows of the span.
pub(super) fn estimate<R>(
    grid: &Grid<'_>,
    set: InstructionSet,
    span: u64,
    query_head: usize,
    with: impl FnOnce(&mut [f32], &mut [f32]) -> R,
) -> R {
    let queries = &grid.input.queries;
    let end = (span as usize + 1) * SPAN;
    let row = end - queries.first_position as usize - LAST;
    SCRATCH.with_borrow_mut(|scratch| {
        let Scratch { packed, scores, columns, diagonals } = scratch;
        packed.fill(LAST, queries.shape.head_dim, |r| head(queries, row + r, query_head));
        scores.resize(grid.block as usize / LANES * LAST, [0.0; LANES]);
        for sums in [&mut *columns, &mut *diagonals] {
            sums.clear();
            sums.resize(end + LAST + LANES, 0.0);
        }
        let kv_head = query_head / queries.shape.group;
        dispatch(set, Estimate { grid, kv_head, end, packed, scores, columns, diagonals });
        with(&mut columns[..end], &mut diagonals[..end])
    })
}

/// Sums the attention of the packed rows, the last before `end`, over columns and diagonals.
struct Estimate<'a> {
    grid: &'a Grid<'a>,
    kv_head: usize,
    end: usize,
    packed: &'a Packed,
    /// Of one block, `[panels][LAST]`.
    scores: &'a mut [Lane],
    columns: &'a mut [f32],
    diagonals: &'a mut [f32],
}

impl Kernel for Estimate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.grid.input.kv.shape().dtype {
            KvDtype::F32 => self.run_as::<S, f32>(s),
            KvDtype::F16 => self.run_as::<S, f16>(s),
            KvDtype::Bf16 => self.run_as::<S, bf16>(s),
            KvDtype::Int8 => self.run_as::<S, i8>(s),
        }
    }
}

impl Estimate<'_> {
    #[inline(always)]
    fn run_as<S: Simd, E: Element>(mut self, s: S) {
        let blocks = self.end / self.grid.block as usize;
        let (mut tops, mut sums) = ([[f32::NEG_INFINITY; LANES]; LAST], [[0.0; LANES]; LAST]);
        for block in 0..blocks {
            self.score::<S, E>(s, block);
            self.soften(s, &mut tops, &mut sums);
        }
        let mut logs = [0.0; LAST];
        for ((log, top), sum) in logs.iter_mut().zip(&tops).zip(&sums) {
            let largest = s.top(s.load(top));
            let weights = s.exp2(s.sub(s.load(top), s.splat(largest)));
            *log = largest + log2(s.sum(s.mul(s.load(sum), weights)));
        }
        for block in 0..blocks {
            self.score::<S, E>(s, block);
            self.add(s, block, &logs);
        }
    }

    /// Scores of a block; of keys that a row does not see −∞.
    #[inline(always)]
    fn score<S: Simd, E: Element>(&mut self, s: S, block: usize) {
        let head = self.grid.input.kv.tile(block).head::<E>(self.kv_head);
        let (dim, count) = (self.packed.dim, self.grid.block as usize / LANES);
        let mut panels: [&[[E; LANES]]; PANELS] = [&[]; PANELS];
        for (panel, lanes) in panels.iter_mut().zip(head.k.chunks_exact(dim)) {
            *panel = lanes;
        }
        let scale = self.grid.input.queries.scale * std::f32::consts::LOG2_E;
        let scores = &mut *self.scores;
        let (panels, scales) = (&panels[..count], head.k_scales);
        Score::<E> { rows: self.packed, panels, scales, scale, onto: false, scores }.run(s);
        let first = block * self.grid.block as usize;
        let earliest = self.end - LAST;
        if first + self.grid.block as usize > earliest + 1 {
            for (panel, rows) in self.scores.chunks_exact_mut(LAST).enumerate() {
                for (row, lanes) in rows.iter_mut().enumerate() {
                    let seen = (earliest + row + 1).saturating_sub(first + panel * LANES);
                    lanes[seen.min(LANES)..].fill(f32::NEG_INFINITY);
                }
            }
        }
    }

    /// Takes a block into the sums of the rows, lane by lane. All rows see all keys of the first block.
    #[inline(always)]
    fn soften<S: Simd>(&self, s: S, tops: &mut [Lane; LAST], sums: &mut [Lane; LAST]) {
        for (row, (top, sum)) in tops.iter_mut().zip(sums).enumerate() {
            let before = s.load(top);
            let mut largest = before;
            for panel in self.scores.chunks_exact(LAST) {
                largest = s.max(s.load(&panel[row]), largest);
            }
            let mut total = s.mul(s.load(sum), s.exp2(s.sub(before, largest)));
            for panel in self.scores.chunks_exact(LAST) {
                total = s.add(total, s.exp2(s.sub(s.load(&panel[row]), largest)));
            }
            s.store(largest, top);
            s.store(total, sum);
        }
    }

    /// Adds a block's probabilities to the columns and diagonals.
    #[inline(always)]
    fn add<S: Simd>(&mut self, s: S, block: usize, logs: &[f32; LAST]) {
        for (panel, rows) in self.scores.chunks_exact(LAST).enumerate() {
            let key = block * self.grid.block as usize + panel * LANES;
            let mut column = s.splat(0.0);
            for (row, (lanes, &log)) in rows.iter().zip(logs).enumerate() {
                let weights = s.exp2(s.sub(s.load(lanes), s.splat(log)));
                column = s.add(column, weights);
                let at = key + LAST - 1 - row;
                if let Some(diagonal) = self.diagonals[at..].first_chunk_mut() {
                    s.store(s.add(s.load(diagonal), weights), diagonal);
                }
            }
            if let Some(sums) = self.columns[key..].first_chunk_mut() {
                s.store(column, sums);
            }
        }
    }
}
