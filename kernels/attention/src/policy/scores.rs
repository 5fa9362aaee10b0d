//! Scores of cells (mean keys, keys or sums of keys) for some rows, and what cells and blocks weigh.
//!
//! Scores lie `[panel][row][16 cells]`, in base 2. The order of all arithmetic is fixed, whatever the instruction set: a
//! score is one chain of fused multiply-adds over the elements, times the scale; a cell's sum runs over the rows in order; a
//! row's sum runs over its panels in order, lane by lane, and then over the lanes pairwise.

use std::array;

use crate::executor::microkernel::{GROUP, panels_at_once, products};
use crate::exp2::exp2;
use crate::shape::LANES;
use crate::simd::{Kernel, Lane, Simd};
use crate::tile::Element;

use super::log2::log2;
use super::pack::{Packed, groups};

/// Panels that stay in the first cache while all rows are multiplied with them.
const PANELS: usize = 4;

/// Scores of packed rows against panels of keys.
pub(super) struct Score<'a, E> {
    pub(super) rows: &'a Packed,
    /// Panels, each `[head_dim]` lanes.
    pub(super) panels: &'a [&'a [[E; LANES]]],
    /// Scales of the keys, a lane per panel; empty where elements have none.
    pub(super) scales: &'a [Lane],
    /// Scale of the logits, base 2.
    pub(super) scale: f32,
    /// Whether scores are added to those that are there: `fma(sum, scale, score)`.
    pub(super) onto: bool,
    /// `[panels][rows]`.
    pub(super) scores: &'a mut [Lane],
}

impl<E: Element> Kernel for Score<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let rows = self.rows.rows;
        for (index, panels) in self.panels.chunks(PANELS).enumerate() {
            let first = index * PANELS;
            let scores = &mut self.scores[first * rows..][..panels.len() * rows];
            let scales = self.scales.get(first..first + panels.len()).unwrap_or(&[]);
            for group in groups(rows) {
                let q = &self.rows.q[group.start * self.rows.dim..group.end * self.rows.dim];
                let (scale, onto, first) = (self.scale, self.onto, group.start);
                let part = Part { q, panels, scales, scale, onto, scores, rows, first };
                match group.len() {
                    1 => s.call(Group::<E, 1>(part)),
                    2 => s.call(Group::<E, 2>(part)),
                    3 => s.call(Group::<E, 3>(part)),
                    4 => s.call(Group::<E, 4>(part)),
                    5 => s.call(Group::<E, 5>(part)),
                    _ => s.call(Group::<E, GROUP>(part)),
                }
            }
        }
    }
}

/// One group of rows against a few panels.
struct Part<'a, E> {
    q: &'a [f32],
    panels: &'a [&'a [[E; LANES]]],
    scales: &'a [Lane],
    scale: f32,
    onto: bool,
    scores: &'a mut [Lane],
    /// Rows of the scores, and the group's first.
    rows: usize,
    first: usize,
}

/// A kernel of its own, so that the compiler sees one size of group at a time.
struct Group<'a, E, const R: usize>(Part<'a, E>);

impl<E: Element, const R: usize> Kernel for Group<'_, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let most = const { panels_at_once::<S>(R) };
        let (mut panel, panels) = (0, self.0.panels.len());
        while panel < panels {
            panel += match panels - panel {
                4.. if most >= 4 => self.score::<S, 4>(s, panel),
                2.. if most >= 2 => self.score::<S, 2>(s, panel),
                _ => self.score::<S, 1>(s, panel),
            };
        }
    }
}

impl<E: Element, const R: usize> Group<'_, E, R> {
    #[inline(always)]
    fn score<S: Simd, const P: usize>(&mut self, s: S, panel: usize) -> usize {
        let part = &mut self.0;
        let q = part.q.as_chunks::<R>().0;
        let panels: [&[[E; LANES]]; P] = array::from_fn(|p| part.panels[panel + p]);
        let sums = products::<S, E, R, P>(s, panels, |i, r| q[i][r], None);
        let scale = s.splat(part.scale);
        for p in 0..P {
            let scores = &mut part.scores[(panel + p) * part.rows + part.first..][..R];
            for (sums, score) in sums.iter().zip(scores) {
                let mut dot = sums[p];
                if E::SCALED {
                    dot = s.mul(dot, s.load(&part.scales[panel + p]));
                }
                let found = if part.onto { s.fma(dot, scale, s.load(score)) } else { s.mul(dot, scale) };
                s.store(found, score);
            }
        }
        P
    }
}

/// log2 of each row's sum of 2^score over its cells.
pub(super) struct RowSums<'a> {
    /// `[panels][rows]`; cells that do not count are −∞.
    pub(super) scores: &'a [Lane],
    /// Room, `[rows]`.
    pub(super) tops: &'a mut [Lane],
    pub(super) sums: &'a mut [Lane],
    /// What comes out.
    pub(super) logs: &'a mut [f32],
}

impl Kernel for RowSums<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { scores, tops, sums, logs } = self;
        let rows = logs.len();
        tops.fill([f32::NEG_INFINITY; LANES]);
        sums.fill([0.0; LANES]);
        for panel in scores.chunks_exact(rows) {
            for (top, score) in tops.iter_mut().zip(panel) {
                s.store(s.max(s.load(score), s.load(top)), top);
            }
        }
        for top in tops.iter_mut() {
            *top = [s.top(s.load(top)); LANES];
        }
        for panel in scores.chunks_exact(rows) {
            for ((top, sum), score) in tops.iter().zip(sums.iter_mut()).zip(panel) {
                let weight = s.exp2(s.sub(s.load(score), s.load(top)));
                s.store(s.add(s.load(sum), weight), sum);
            }
        }
        for ((log, top), sum) in logs.iter_mut().zip(tops.iter()).zip(sums.iter()) {
            *log = top[0] + log2(s.sum(s.load(sum)));
        }
    }
}

/// Per cell: log2 of the sum of 2^(score − the row's offset) over some rows.
pub(super) struct CellSums<'a> {
    /// `[panels][stride]`.
    pub(super) scores: &'a [Lane],
    /// Rows of the scores.
    pub(super) stride: usize,
    /// The first of the rows that count.
    pub(super) first: usize,
    /// An offset for each row that counts.
    pub(super) offsets: &'a [f32],
    /// What comes out: (largest, sum relative to it), `[panels]`.
    pub(super) cells: &'a mut [[Lane; 2]],
}

impl Kernel for CellSums<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (panel, [top_of, sum_of]) in self.scores.chunks_exact(self.stride).zip(self.cells) {
            let rows = &panel[self.first..][..self.offsets.len()];
            let mut top = s.splat(f32::NEG_INFINITY);
            for (score, &offset) in rows.iter().zip(self.offsets) {
                top = s.max(s.sub(s.load(score), s.splat(offset)), top);
            }
            let mut sum = s.splat(0.0);
            for (score, &offset) in rows.iter().zip(self.offsets) {
                let score = s.sub(s.load(score), s.splat(offset));
                sum = s.add(sum, s.exp2(s.sub(score, top)));
            }
            s.store(top, top_of);
            s.store(sum, sum_of);
        }
    }
}

/// The largest score of each block, less its row's offset, log2; otherwise as [`energies`].
pub(super) fn peaks(sums: &[[Lane; 2]], cells: usize, per_run: usize, blocks: usize) -> Vec<f32> {
    let mut peaks = Vec::with_capacity(blocks);
    for run in sums.chunks((per_run * cells).div_ceil(LANES).max(1)) {
        let here = per_run.min(blocks - peaks.len());
        let cell = |index: usize| run[index / LANES][0][index % LANES];
        peaks.extend(
            (0..here).map(|block| {
                (block * cells..(block + 1) * cells).map(cell).fold(f32::NEG_INFINITY, f32::max)
            }),
        );
    }
    peaks
}

/// Energies of blocks of `cells` cells each, which lie `per_run` blocks to a run of whole panels.
pub(super) fn energies(sums: &[[Lane; 2]], cells: usize, per_run: usize, blocks: usize) -> Vec<f32> {
    let mut energies = Vec::with_capacity(blocks);
    for run in sums.chunks((per_run * cells).div_ceil(LANES).max(1)) {
        let here = per_run.min(blocks - energies.len());
        let cell = |index: usize| {
            let [tops, sums] = &run[index / LANES];
            (tops[index % LANES], sums[index % LANES])
        };
        if cells == 1 {
            // What follows, of one cell: its sum lies relative to its own largest.
            energies.extend((0..here).map(cell).map(|(top, sum)| top + log2(sum)));
            continue;
        }
        energies.extend((0..here).map(|block| {
            let own = block * cells..(block + 1) * cells;
            let top = own.clone().fold(f32::NEG_INFINITY, |top, index| top.max(cell(index).0));
            let sum: f32 = own.map(cell).map(|(m, sum)| sum * exp2(m - top)).sum();
            top + log2(sum)
        }));
    }
    energies
}
