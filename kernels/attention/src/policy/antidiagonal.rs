//! XAttention's scores: keys and queries cut into cells of `stride` positions, and each pair of cells judged by the sum of
//! its antidiagonal.
//!
//! The score of a cell of queries (of one head) and a cell of keys is Σ q[stride − 1 − t] · k[t] / stride, times the scale.
//! A panel of keys is multiplied with lanes of queries, so that each lane is one product; a cell's lanes are added
//! pairwise, at distance 8 (when the cell has 16), 4, 2, 1.

use half::{bf16, f16};
use longshore_compute::InstructionSet;

use crate::shape::LANES;
use crate::simd::{Kernel, Lane, Simd, dispatch};
use crate::tile::Element;
use crate::{KvDtype, QUERY_TILE};

use super::blocks::{Scratch, hide};
use super::grid::{Grid, TileRows};
use super::pack::head;

/// Rows (cells of queries) that are worked on together; each KV head has a multiple of them.
const ROWS: usize = 2;

/// Scores of a tile's cells of queries, `[panel of 16 cells of keys][row]`, row = cell × group + head.
pub(super) fn score(
    grid: &Grid<'_>,
    set: InstructionSet,
    tile: &TileRows,
    kv_head: usize,
    stride: usize,
    scratch: &mut Scratch,
) {
    let (queries, blocks) = (&grid.input.queries, grid.before(tile));
    let (group, dim) = (queries.shape.group, queries.shape.head_dim);
    let rows = QUERY_TILE / stride * group;
    let mut lanes: Vec<Lane> = vec![[0.0; LANES]; rows * dim];
    for (row, lanes) in lanes.chunks_exact_mut(dim).enumerate() {
        let first = tile.rows.start + row / group * stride;
        for key in 0..LANES {
            let q = head(queries, first + stride - 1 - key % stride, kv_head * group + row % group);
            lanes.iter_mut().zip(q).for_each(|(lane, &q)| lane[key] = q);
        }
    }
    let cells = blocks * grid.block as usize / stride;
    (scratch.packed.rows, scratch.packed.dim) = (rows, dim);
    scratch.scores.resize(cells.div_ceil(LANES) * rows, [0.0; LANES]);
    let scores = &mut scratch.scores[..];
    let scale = queries.scale * std::f32::consts::LOG2_E / stride as f32;
    dispatch(set, Antidiagonal { grid, kv_head, blocks, stride, lanes: &lanes, rows, scale, scores });
    if !cells.is_multiple_of(LANES) {
        let last = scratch.scores.len() - rows;
        hide(&mut scratch.scores[last..], cells % LANES);
    }
}

struct Antidiagonal<'a> {
    grid: &'a Grid<'a>,
    kv_head: usize,
    blocks: usize,
    stride: usize,
    /// `[rows][head_dim]`.
    lanes: &'a [Lane],
    rows: usize,
    scale: f32,
    scores: &'a mut [Lane],
}

impl Kernel for Antidiagonal<'_> {
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

impl Antidiagonal<'_> {
    #[inline(always)]
    fn run_as<S: Simd, E: Element>(mut self, s: S) {
        for block in 0..self.blocks {
            let head = self.grid.input.kv.tile(block).head::<E>(self.kv_head);
            let panels = self.grid.block as usize / LANES;
            let first = block * panels;
            let mut panel = 0;
            while panel < panels {
                // As many sums as fit in registers.
                panel += if S::WIDE && panels - panel >= 4 {
                    self.panels::<S, E, 4>(s, head.k, head.k_scales, panel, first)
                } else if panels - panel >= 2 {
                    self.panels::<S, E, 2>(s, head.k, head.k_scales, panel, first)
                } else {
                    self.panels::<S, E, 1>(s, head.k, head.k_scales, panel, first)
                };
            }
        }
    }

    /// Multiplies `P` panels of a block with all rows; gives `P`.
    #[inline(always)]
    fn panels<S: Simd, E: Element, const P: usize>(
        &mut self,
        s: S,
        k: &[[E; LANES]],
        scales: &[Lane],
        panel: usize,
        first: usize,
    ) -> usize {
        let dim = self.lanes.len() / self.rows;
        let keys: [&[[E; LANES]]; P] = std::array::from_fn(|p| &k[(panel + p) * dim..][..dim]);
        for row in (0..self.rows).step_by(ROWS) {
            let q: [&[Lane]; ROWS] = std::array::from_fn(|r| &self.lanes[(row + r) * dim..][..dim]);
            let mut sums = [[s.splat(0.0); P]; ROWS];
            for i in 0..dim {
                let mut lanes = [s.splat(0.0); P];
                for (lane, keys) in lanes.iter_mut().zip(&keys) {
                    *lane = E::load(s, &keys[i]);
                }
                for (sums, q) in sums.iter_mut().zip(&q) {
                    let q = s.load(&q[i]);
                    for (sum, &lane) in sums.iter_mut().zip(&lanes) {
                        *sum = s.fma(q, lane, *sum);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (p, &sum) in sums.iter().enumerate() {
                    let sum = if E::SCALED { s.mul(sum, s.load(&scales[panel + p])) } else { sum };
                    self.store(s, sum, first + panel + p, row + r);
                }
            }
        }
        P
    }

    /// Adds up the cells of a panel.
    #[inline(always)]
    fn store<S: Simd>(&mut self, s: S, products: S::F32s, panel: usize, row: usize) {
        let mut lane = [0.0; LANES];
        s.store(products, &mut lane);
        let per_panel = LANES / self.stride;
        for (within, cell) in lane.chunks_exact_mut(self.stride).enumerate() {
            let mut width = cell.len() / 2;
            while width > 0 {
                for i in 0..width {
                    cell[i] += cell[i + width];
                }
                width /= 2;
            }
            let index = panel * per_panel + within;
            self.scores[index / LANES * self.rows + row][index % LANES] = cell[0] * self.scale;
        }
    }
}
