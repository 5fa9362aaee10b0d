//! XAttention's scores: keys and queries cut into cells of `stride` positions, and each pair of cells judged by the sum of
//! its antidiagonal.
//!
//! The score of a cell of queries (of one head) and a cell of keys is Σ q[stride − 1 − t] · k[t] / stride, times the scale.
//! A panel of keys is multiplied with lanes of queries, so that each lane is one product; a cell's lanes are added
//! pairwise, at distance 8 (when the cell has 16), 4, 2, 1.

use half::{bf16, f16};
use longshore_compute::InstructionSet;

use crate::executor::microkernel::GROUP;
use crate::shape::LANES;
use crate::simd::{Kernel, Lane, Simd, dispatch};
use crate::tile::Element;
use crate::{KvDtype, QUERY_TILE};

use super::blocks::{Scratch, hide};
use super::grid::{Grid, TileRows};
use super::pack::{groups, head};

/// Scores of the cells of queries of some tiles, which ascend: `[panel of 16 cells of keys][row]`, row = (tile × cells + cell) ×
/// group + head. Cells that do not end before the row's tile are −∞.
pub(super) fn score(
    grid: &Grid<'_>,
    set: InstructionSet,
    tiles: &[&TileRows],
    kv_head: usize,
    stride: usize,
    scratch: &mut Scratch,
) {
    let queries = &grid.input.queries;
    let (group, dim) = (queries.shape.group, queries.shape.head_dim);
    let of_tile = QUERY_TILE / stride * group;
    let rows = tiles.len() * of_tile;
    let mut lanes: Vec<Lane> = vec![[0.0; LANES]; rows * dim];
    for (row, lanes) in lanes.chunks_exact_mut(dim).enumerate() {
        let first = tiles[row / of_tile].rows.start + row % of_tile / group * stride;
        for key in 0..LANES {
            let q = head(queries, first + stride - 1 - key % stride, kv_head * group + row % group);
            lanes.iter_mut().zip(q).for_each(|(lane, &q)| lane[key] = q);
        }
    }
    let cells = |tile: &TileRows| grid.before(tile) * grid.block as usize / stride;
    let blocks = tiles.last().map_or(0, |tile| grid.before(tile));
    let panels = (blocks * grid.block as usize / stride).div_ceil(LANES);
    (scratch.packed.rows, scratch.packed.dim) = (rows, dim);
    scratch.clear(panels);
    let scores = &mut scratch.scores[..];
    let scale = queries.scale * std::f32::consts::LOG2_E / stride as f32;
    dispatch(set, Antidiagonal { grid, kv_head, blocks, stride, lanes: &lanes, rows, scale, scores });
    for (panel, scores) in scratch.scores.chunks_exact_mut(rows).enumerate() {
        for (tile, scores) in tiles.iter().zip(scores.chunks_exact_mut(of_tile)) {
            hide(scores, cells(tile).saturating_sub(panel * LANES));
        }
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
    fn run_as<S: Simd, E: Element>(self, s: S) {
        let Self { grid, kv_head, blocks, stride, lanes, rows, scale, scores } = self;
        let (panels, dim) = (grid.block as usize / LANES, lanes.len() / rows);
        // As many panels as there are registers for their sums.
        let step = if S::WIDE && panels > 1 { 2 } else { 1 };
        for block in 0..blocks {
            let head = grid.input.kv.tile(block).head::<E>(kv_head);
            for panel in (0..panels).step_by(step) {
                for group in groups(rows) {
                    let part = Part {
                        k: &head.k[panel * dim..][..step * dim],
                        k_scales: head.k_scales.get(panel..panel + step).unwrap_or(&[]),
                        q: &lanes[group.start * dim..group.end * dim],
                        stride,
                        scale,
                        scores: &mut *scores,
                        rows,
                        row: group.start,
                        panel: block * panels + panel,
                    };
                    match (group.len(), step) {
                        (1, 2) => s.call(Cells::<E, 1, 2>(part)),
                        (2, 2) => s.call(Cells::<E, 2, 2>(part)),
                        (3, 2) => s.call(Cells::<E, 3, 2>(part)),
                        (4, 2) => s.call(Cells::<E, 4, 2>(part)),
                        (5, 2) => s.call(Cells::<E, 5, 2>(part)),
                        (_, 2) => s.call(Cells::<E, GROUP, 2>(part)),
                        (1, _) => s.call(Cells::<E, 1, 1>(part)),
                        (2, _) => s.call(Cells::<E, 2, 1>(part)),
                        (3, _) => s.call(Cells::<E, 3, 1>(part)),
                        (4, _) => s.call(Cells::<E, 4, 1>(part)),
                        (5, _) => s.call(Cells::<E, 5, 1>(part)),
                        _ => s.call(Cells::<E, GROUP, 1>(part)),
                    }
                }
            }
        }
    }
}

/// A group of rows against a few panels.
struct Part<'a, E> {
    /// `[panels][head_dim]`.
    k: &'a [[E; LANES]],
    /// A lane per panel; empty where elements have none.
    k_scales: &'a [Lane],
    /// `[rows of the group][head_dim]`.
    q: &'a [Lane],
    stride: usize,
    scale: f32,
    scores: &'a mut [Lane],
    /// Rows of the scores, and the group's first.
    rows: usize,
    row: usize,
    /// The first panel of keys of the sequence.
    panel: usize,
}

/// `R` rows and `P` panels; a kernel of its own, so that the compiler sees one size of group at a time.
struct Cells<'a, E, const R: usize, const P: usize>(Part<'a, E>);

impl<E: Element, const R: usize, const P: usize> Kernel for Cells<'_, E, R, P> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let part = self.0;
        let dim = part.k.len() / P;
        let keys: [&[[E; LANES]]; P] = std::array::from_fn(|p| &part.k[p * dim..][..dim]);
        let q: [&[Lane]; R] = std::array::from_fn(|r| &part.q[r * dim..][..dim]);
        let mut sums = [[s.splat(0.0); P]; R];
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
        let (places, half) = (s.load(&PLACES), s.splat(HALF));
        for (r, sums) in sums.iter().enumerate() {
            for (p, &sum) in sums.iter().enumerate() {
                let sum = if E::SCALED { s.mul(sum, s.load(&part.k_scales[p])) } else { sum };
                let mut store = |cell: usize, sum: f32| {
                    part.scores[cell / LANES * part.rows + part.row + r][cell % LANES] = sum * part.scale;
                };
                let panel = part.panel + p;
                if part.stride == LANES {
                    store(panel, s.sum(sum));
                } else {
                    let later = s.zero_below(places, half, sum);
                    let earlier = s.zero_below(s.sub(s.splat(0.0), places), s.splat(1.0 - HALF), sum);
                    store(2 * panel, s.sum(earlier));
                    store(2 * panel + 1, s.sum(later));
                }
            }
        }
    }
}

/// Places of the lanes, and the first of the later half.
const PLACES: Lane = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];
const HALF: f32 = 8.0;
