//! Two levels of scores: before blocks are scored by their means, panels of blocks are, by bounds. Far out most panels can hold
//! nothing that any row looks at, and scoring their blocks costs more than visiting those that are kept.
//!
//! A panel is up to 16 blocks of one stripe, as their means lie side by side. A row's score of none of them exceeds its bound, the
//! sum over the elements of the larger product with the least and the greatest of the means (the rule of Quest, of means in place
//! of keys). Panels that take the largest share of any row, by bounds, are opened: a quarter of them, and never fewer than 32.

use longshore_compute::InstructionSet;

use crate::shape::LANES;
use crate::simd::{Lane, dispatch};

use super::blocks::{Scratch, cell_sums, hide, row_sums};
use super::grid::{Grid, TileRows};
use super::pack::head;
use super::scores::{Score, peaks};
use super::select::heaviest;

/// One of so many panels is opened.
const OPEN_SHARE: usize = 4;
/// Panels that are opened at least: 32,768 positions, with blocks of 64 in stripes of 32.
const OPEN_LEAST: usize = 32;

/// Where the panels of mean keys lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Panels {
    /// Blocks of a stripe.
    stripe: usize,
    /// Panels of a stripe.
    per_stripe: usize,
}

impl Panels {
    pub(super) fn of(stripe: usize) -> Self {
        Self { stripe, per_stripe: stripe.div_ceil(LANES) }
    }

    /// First block of a panel.
    pub(super) fn first(self, panel: usize) -> usize {
        panel / self.per_stripe * self.stripe + panel % self.per_stripe * LANES
    }

    /// Blocks of a panel, of the first `blocks` of the sequence.
    pub(super) fn cells(self, panel: usize, blocks: usize) -> usize {
        let end = (panel / self.per_stripe + 1) * self.stripe;
        end.min(blocks).saturating_sub(self.first(panel)).min(LANES)
    }

    /// Panels of the first `blocks` blocks.
    pub(super) fn count(self, blocks: usize) -> usize {
        blocks / self.stripe * self.per_stripe + (blocks % self.stripe).div_ceil(LANES)
    }

    /// Panels, the first ones, all of whose blocks are among the first `blocks`.
    fn whole(self, blocks: usize) -> usize {
        let all = self.count(blocks);
        match all.checked_sub(1) {
            Some(last) if self.cells(last, blocks) < self.cells(last, usize::MAX) => last,
            _ => all,
        }
    }
}

/// The greatest and the least of the mean keys of each panel of one KV head.
#[derive(Debug)]
pub(super) struct Bounds {
    dim: usize,
    /// `[panels / 16][2 * dim]`, a lane per panel: the greatest, then the least.
    lanes: Vec<Lane>,
}

impl Bounds {
    /// Of the panels of mean keys, each `[dim]`, of the first `blocks` blocks. Those that are not whole mean nothing.
    pub(super) fn of(panels: &[&[Lane]], at: Panels, blocks: usize) -> Self {
        let dim = panels.first().map_or(0, |panel| panel.len());
        let mut lanes = vec![[0.0; LANES]; panels.len().div_ceil(LANES) * 2 * dim];
        for (index, panel) in panels.iter().enumerate() {
            let (cells, lane) = (at.cells(index, blocks), index % LANES);
            let bounds = &mut lanes[index / LANES * 2 * dim..][..2 * dim];
            for (element, means) in panel.iter().enumerate() {
                let means = &means[..cells];
                bounds[element][lane] = means.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                bounds[dim + element][lane] = means.iter().copied().fold(f32::INFINITY, f32::min);
            }
        }
        Self { dim, lanes }
    }

    /// Panels whose blocks a tile scores, ascending; `None`: all of them, because they are few. `blocks` end before the tile.
    pub(super) fn open(
        &self,
        grid: &Grid<'_>,
        set: InstructionSet,
        (tile, kv_head): (&TileRows, usize),
        blocks: usize,
        scratch: &mut Scratch,
    ) -> Option<Vec<usize>> {
        let at = Panels::of(grid.stripe as usize);
        let whole = at.whole(blocks);
        let most = whole.div_ceil(OPEN_SHARE).max(OPEN_LEAST);
        if whole <= most {
            return None;
        }
        self.score(grid, set, (tile, kv_head), whole, scratch);
        row_sums(set, scratch);
        let rows = 0..scratch.packed.rows;
        let sums = cell_sums(set, rows, whole.div_ceil(LANES), scratch);
        let shares = peaks(sums, 1, whole, whole);
        let mut open: Vec<usize> = heaviest(most, &shares).into_iter().map(|panel| panel as usize).collect();
        // Blocks that a tile has just before it are never hidden by their panel's end.
        open.extend(whole..at.count(blocks));
        open.sort_unstable();
        Some(open)
    }

    /// Bounds of the scores of a tile's rows in the first `panels` panels.
    fn score(
        &self,
        grid: &Grid<'_>,
        set: InstructionSet,
        (tile, kv_head): (&TileRows, usize),
        panels: usize,
        scratch: &mut Scratch,
    ) {
        let (queries, dim) = (&grid.input.queries, self.dim);
        let (group, rows) = (queries.shape.group, tile.rows.len() * queries.shape.group);
        // Of a negative scale the greatest score is that of the opposite query.
        let sign = 1.0_f32.copysign(queries.scale);
        scratch.means.clear();
        for packed in 0..rows {
            let q = head(queries, tile.rows.start + packed / group, kv_head * group + packed % group);
            scratch.means.extend(q.iter().map(|&x| (sign * x).max(0.0)));
            scratch.means.extend(q.iter().map(|&x| (sign * x).min(0.0)));
        }
        let split = &scratch.means;
        scratch.packed.fill(rows, 2 * dim, |row| &split[row * 2 * dim..][..2 * dim]);
        let bounds: Vec<&[Lane]> = self.lanes.chunks_exact(2 * dim).take(panels.div_ceil(LANES)).collect();
        scratch.clear(bounds.len());
        let scale = queries.scale.abs() * std::f32::consts::LOG2_E;
        let (rows, scores) = (&scratch.packed, &mut scratch.scores[..]);
        dispatch(set, Score::<f32> { rows, panels: &bounds, scales: &[], scale, onto: false, scores });
        let last = bounds.len() - 1;
        hide(&mut scratch.scores[last * scratch.packed.rows..], panels - last * LANES);
    }
}

/// Values of the cells of open panels as values of blocks; those of closed panels weigh nothing.
pub(super) fn spread(values: &[f32], open: &[usize], at: Panels, blocks: usize) -> Vec<f32> {
    let mut all = vec![f32::NEG_INFINITY; blocks];
    for (values, &panel) in values.chunks(LANES).zip(open) {
        let cells = at.cells(panel, blocks);
        all[at.first(panel)..][..cells].copy_from_slice(&values[..cells]);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_lie_within_stripes() {
        // 40 blocks a stripe: panels of 16, 16 and 8.
        let at = Panels::of(40);
        assert_eq!([0, 1, 2, 3, 5].map(|panel| at.first(panel)), [0, 16, 32, 40, 72]);
        assert_eq!(
            [(0, 100), (2, 100), (4, 60), (5, 60), (5, 75)].map(|(panel, blocks)| at.cells(panel, blocks)),
            [16, 8, 4, 0, 3]
        );
        assert_eq!([0, 1, 16, 17, 40, 41, 80].map(|blocks| at.count(blocks)), [0, 1, 1, 2, 3, 4, 6]);
        assert_eq!([0, 1, 16, 39, 40, 41, 56].map(|blocks| at.whole(blocks)), [0, 0, 1, 2, 3, 3, 4]);
        let small = Panels::of(3);
        assert_eq!((small.count(7), small.whole(7), small.first(2), small.cells(2, 7)), (3, 2, 6, 1));
    }

    #[test]
    fn closed_blocks_weigh_nothing() {
        let at = Panels::of(20);
        let values: Vec<f32> = (0..48).map(|value| value as f32).collect();
        // Panels 1 (blocks 16 to 19), 2 (20 to 35) and 3 (36 to 39, of which two count).
        let all = spread(&values, &[1, 2, 3], at, 38);
        assert!(all[..16].iter().all(|&value| value == f32::NEG_INFINITY));
        assert_eq!(
            (all[16], all[19], all[20], all[35], all[36], all[37]),
            (0.0, 3.0, 16.0, 31.0, 32.0, 33.0)
        );
    }
}
