//! Matrix products. Each output is one chain of fused multiply-adds over the inputs in order, whatever the number of rows, the
//! thread and the instruction set: fused multiply-adds round the same everywhere.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Outputs of a panel.
const PANEL: usize = 16;

/// Rows that share one pass over a panel.
const TILE_ROWS: usize = 8;

/// Rows of a call that are multiplied before the next ones, so that they stay in cache and the scratch stays small.
const BLOCK_ROWS: usize = 256;

/// Multiply-adds that are worth a task of their own.
const TASK_MACS: usize = 32 * 1024;

/// Weights f32 `[out, in]`, packed `[ceil(out / 16)][in][16]`; outputs past the end are zero.
#[derive(Clone)]
pub(crate) struct PackedMatrix {
    outputs: usize,
    inputs: usize,
    panels: Vec<f32>,
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix[{} x {}]", self.outputs, self.inputs)
    }
}

impl PackedMatrix {
    /// Packs `weights`, f32 `[rows_out, cols_in]`.
    pub(crate) fn pack(rows_out: usize, cols_in: usize, weights: &[f32]) -> Self {
        assert!(
            cols_in > 0 && weights.len() == rows_out * cols_in,
            "weights must be [{rows_out}, {cols_in}]"
        );
        let mut panels = vec![0.0; rows_out.next_multiple_of(PANEL) * cols_in];
        panels.par_chunks_mut(PANEL * cols_in).zip(weights.par_chunks(PANEL * cols_in)).for_each(
            |(panel, rows)| {
                for (j, row) in rows.chunks_exact(cols_in).enumerate() {
                    for (k, weight) in row.iter().enumerate() {
                        panel[k * PANEL + j] = *weight;
                    }
                }
            },
        );
        Self { outputs: rows_out, inputs: cols_in, panels }
    }

    /// Copies the weights of one output, f32 `[in]`.
    pub(crate) fn row(&self, output: usize, row: &mut [f32]) {
        assert!(
            output < self.outputs && row.len() == self.inputs,
            "row {output} must exist and have {} elements",
            self.inputs
        );
        let panel = &self.panels[output / PANEL * PANEL * self.inputs..][..PANEL * self.inputs];
        for (element, weights) in row.iter_mut().zip(panel.chunks_exact(PANEL)) {
            *element = weights[output % PANEL];
        }
    }

    /// `out = x · weightsᵀ`: `x` f32 `[rows, in]`, `out` f32 `[rows, out]`. Runs on the rayon pool of the caller.
    pub(crate) fn multiply(&self, x: &[f32], rows: usize, out: &mut [f32]) {
        assert!(x.len() == rows * self.inputs, "x must be [{rows}, {}]", self.inputs);
        assert!(out.len() == rows * self.outputs, "out must be [{rows}, {}]", self.outputs);
        if rows == 0 || self.outputs == 0 {
            return;
        }
        let x_blocks = x.chunks(BLOCK_ROWS * self.inputs);
        for (x, out) in x_blocks.zip(out.chunks_mut(BLOCK_ROWS * self.outputs)) {
            self.multiply_block(x, out);
        }
    }

    /// Every panel makes `[rows][16]` of its own, which are then dealt out to the rows of `out`.
    fn multiply_block(&self, x: &[f32], out: &mut [f32]) {
        let rows = x.len() / self.inputs;
        let panel_elements = PANEL * self.inputs;
        let panels_a_task = TASK_MACS.div_ceil(rows * panel_elements);
        let mut columns = vec![0.0; rows * self.outputs.next_multiple_of(PANEL)];
        let arch = Arch::new();
        columns
            .par_chunks_mut(rows * PANEL)
            .zip(self.panels.par_chunks(panel_elements))
            .with_min_len(panels_a_task)
            .for_each(|(out, panel)| arch.dispatch(MultiplyPanel { panel, inputs: self.inputs, x, out }));
        out.par_chunks_mut(self.outputs).enumerate().with_min_len(16).for_each(|(r, row)| {
            for (column, out) in columns.chunks_exact(rows * PANEL).zip(row.chunks_mut(PANEL)) {
                out.copy_from_slice(&column[r * PANEL..][..out.len()]);
            }
        });
    }
}

/// One panel over all rows of a block.
struct MultiplyPanel<'a> {
    /// `[in][16]`.
    panel: &'a [f32],
    inputs: usize,
    /// `[rows, in]`.
    x: &'a [f32],
    /// `[rows][16]`.
    out: &'a mut [f32],
}

impl WithSimd for MultiplyPanel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let Self { panel, inputs, x, out } = self;
        let tiles = x.chunks_exact(TILE_ROWS * inputs);
        let rest = tiles.remainder().chunks_exact(inputs);
        let (tiled, single) = out.split_at_mut(tiles.len() * TILE_ROWS * PANEL);
        for (x, out) in tiles.zip(tiled.chunks_exact_mut(TILE_ROWS * PANEL)) {
            multiply_tile::<TILE_ROWS>(panel, inputs, x, out);
        }
        for (x, out) in rest.zip(single.chunks_exact_mut(PANEL)) {
            multiply_tile::<1>(panel, inputs, x, out);
        }
    }
}

/// `R` rows: `x` `[R, in]`, `out` `[R][16]`. Accumulators stay in registers.
#[inline(always)]
fn multiply_tile<const R: usize>(panel: &[f32], inputs: usize, x: &[f32], out: &mut [f32]) {
    let rows: [&[f32]; R] = std::array::from_fn(|r| &x[r * inputs..][..inputs]);
    let mut sums = [[0.0_f32; PANEL]; R];
    for (k, weights) in panel.as_chunks::<PANEL>().0.iter().enumerate().take(inputs) {
        for (row, sums) in rows.iter().zip(&mut sums) {
            let element = row[k];
            for (sum, weight) in sums.iter_mut().zip(weights) {
                *sum = element.mul_add(*weight, *sum);
            }
        }
    }
    for (out, sums) in out.as_chunks_mut::<PANEL>().0.iter_mut().zip(sums) {
        *out = sums;
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;

    /// `[n]` numbers in [-1, 1).
    fn random(n: usize, rng: &mut rand_chacha::ChaCha8Rng) -> Vec<f32> {
        (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    #[test]
    fn products_agree_with_f64_and_do_not_depend_on_rows() {
        let seed = 7;
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        for (outputs, inputs, rows) in [(1, 1, 1), (16, 5, 3), (33, 64, 9), (48, 100, 300), (7, 31, 17)] {
            let (weights, x) = (random(outputs * inputs, &mut rng), random(rows * inputs, &mut rng));
            let matrix = PackedMatrix::pack(outputs, inputs, &weights);
            let mut out = vec![f32::NAN; rows * outputs];
            matrix.multiply(&x, rows, &mut out);
            for (r, (x, out)) in x.chunks(inputs).zip(out.chunks(outputs)).enumerate() {
                for (o, weights) in weights.chunks(inputs).enumerate() {
                    let want: f64 = x.iter().zip(weights).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    assert!(
                        (f64::from(out[o]) - want).abs() < 1e-5,
                        "seed {seed} [{r}, {o}]: {} != {want}",
                        out[o]
                    );
                }
                let mut alone = vec![f32::NAN; outputs];
                matrix.multiply(x, 1, &mut alone);
                assert_eq!(alone, out, "seed {seed} row {r} of {rows}");
            }
        }
    }

    #[test]
    fn rows_come_back_as_they_were_packed() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let weights = random(21 * 6, &mut rng);
        let matrix = PackedMatrix::pack(21, 6, &weights);
        for (o, want) in weights.chunks(6).enumerate() {
            let mut row = [0.0; 6];
            matrix.row(o, &mut row);
            assert_eq!(row, want);
        }
    }
}
