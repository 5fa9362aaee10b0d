//! Matrix products. Each output is one chain of fused multiply-adds over the inputs in order, whatever the number of rows, the
//! thread and the instruction set: fused multiply-adds round the same everywhere.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Outputs of a panel.
const PANEL: usize = 16;

/// Rows whose sums lie in registers together: 6 × 16 of them, two vectors of weights and one element fill AVX2's 16.
const GROUP: usize = 6;

/// Inputs of a panel that all rows go through before the next ones: 64 KiB of weights, which a second-level cache keeps
/// beside the rows.
const BLOCK_INPUTS: usize = 1024;

/// Rows of a call that are multiplied before the next ones, so that they stay in cache and the scratch stays small.
const BLOCK_ROWS: usize = 256;

/// Multiply-adds that are worth a task of their own.
const TASK_MACS: usize = 64 * 1024;

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
        let x = interleave(x, self.inputs);
        let mut columns = vec![0.0; rows * self.outputs.next_multiple_of(PANEL)];
        let arch = Arch::new();
        columns
            .par_chunks_mut(rows * PANEL)
            .zip(self.panels.par_chunks(panel_elements))
            .with_min_len(panels_a_task)
            .for_each(|(sums, panel)| {
                arch.dispatch(MultiplyPanel {
                    panel: panel.as_chunks().0,
                    inputs: self.inputs,
                    x: &x,
                    sums: sums.as_chunks_mut().0,
                });
            });
        out.par_chunks_mut(self.outputs).enumerate().with_min_len(16).for_each(|(r, row)| {
            for (column, out) in columns.chunks_exact(rows * PANEL).zip(row.chunks_mut(PANEL)) {
                out.copy_from_slice(&column[r * PANEL..][..out.len()]);
            }
        });
    }
}

/// Rows `[rows, in]` in groups of [`GROUP`], the last one perhaps smaller: `[in][rows of the group]` each.
fn interleave(x: &[f32], inputs: usize) -> Vec<f32> {
    let mut groups = vec![0.0; x.len()];
    let chunk = GROUP * inputs;
    groups.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).with_min_len(8).for_each(|(group, rows)| {
        let count = rows.len() / inputs;
        for (r, row) in rows.chunks_exact(inputs).enumerate() {
            for (elements, x) in group.chunks_exact_mut(count).zip(row) {
                elements[r] = *x;
            }
        }
    });
    groups
}

/// 16 outputs of one row, or one input's weights for them.
type Lane = [f32; PANEL];

/// One panel over all rows of a block.
struct MultiplyPanel<'a> {
    /// `[in]` lanes.
    panel: &'a [Lane],
    inputs: usize,
    /// Rows as [`interleave`] leaves them.
    x: &'a [f32],
    /// `[rows]` lanes, 0 at first.
    sums: &'a mut [Lane],
}

impl WithSimd for MultiplyPanel<'_> {
    type Output = ();

    /// Goes through the inputs in blocks, so that the panel's part stays close while all rows pass over it. The sums wait in
    /// memory meanwhile, which rounds nothing.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        let Self { panel, inputs, x, sums } = self;
        for (block, weights) in panel.chunks(BLOCK_INPUTS).enumerate() {
            let first = block * BLOCK_INPUTS;
            for (x, sums) in x.chunks(GROUP * inputs).zip(sums.chunks_mut(GROUP)) {
                let x = &x[first * sums.len()..][..weights.len() * sums.len()];
                match sums.len() {
                    1 => multiply_group::<1>(weights, x, sums),
                    2 => multiply_group::<2>(weights, x, sums),
                    3 => multiply_group::<3>(weights, x, sums),
                    4 => multiply_group::<4>(weights, x, sums),
                    5 => multiply_group::<5>(weights, x, sums),
                    _ => multiply_group::<GROUP>(weights, x, sums),
                }
            }
        }
    }
}

/// Adds the products of some inputs of `R` rows (`x` `[inputs][R]`) to their sums, which stay in registers meanwhile.
#[inline(always)]
fn multiply_group<const R: usize>(weights: &[Lane], x: &[f32], sums: &mut [Lane]) {
    let mut held = [[0.0_f32; PANEL]; R];
    held.copy_from_slice(sums);
    for (x, weights) in x.as_chunks::<R>().0.iter().zip(weights) {
        for r in 0..R {
            for i in 0..PANEL {
                held[r][i] = x[r].mul_add(weights[i], held[r][i]);
            }
        }
    }
    sums.copy_from_slice(&held);
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
        for (outputs, inputs, rows) in
            [(1, 1, 1), (16, 5, 3), (33, 64, 9), (48, 100, 300), (7, 31, 17), (40, 2100, 11)]
        {
            let (weights, x) = (random(outputs * inputs, &mut rng), random(rows * inputs, &mut rng));
            let matrix = PackedMatrix::pack(outputs, inputs, &weights);
            let mut out = vec![f32::NAN; rows * outputs];
            matrix.multiply(&x, rows, &mut out);
            for (r, (x, out)) in x.chunks(inputs).zip(out.chunks(outputs)).enumerate() {
                for (o, weights) in weights.chunks(inputs).enumerate() {
                    let products = || x.iter().zip(weights).map(|(a, b)| f64::from(*a) * f64::from(*b));
                    let (want, size): (f64, f64) = (products().sum(), products().map(f64::abs).sum());
                    // Every step rounds once, by at most half a unit in the last place.
                    let bound = inputs as f64 * f64::from(f32::EPSILON) / 2.0 * size;
                    let error = (f64::from(out[o]) - want).abs();
                    assert!(error <= bound, "seed {seed} [{r}, {o}]: {} != {want}", out[o]);
                }
                let mut alone = vec![f32::NAN; outputs];
                matrix.multiply(x, 1, &mut alone);
                assert_eq!(alone, out, "seed {seed} row {r} of {rows}");
            }
        }
    }

    /// Run by hand: `cargo test -p longshore-model linear -- --ignored --nocapture`.
    #[test]
    #[ignore = "a measurement"]
    fn measures_speed() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(9);
        // The matrices of a layer of SmolLM2-135M: fused qkv, attention output, fused gate and up, down.
        let shapes = [(960, 576), (576, 576), (3072, 576), (576, 1536)];
        let layers: Vec<PackedMatrix> = (0..30)
            .flat_map(|_| shapes)
            .map(|(outputs, inputs)| PackedMatrix::pack(outputs, inputs, &random(outputs * inputs, &mut rng)))
            .collect();
        let macs: usize = layers.iter().map(|matrix| matrix.outputs * matrix.inputs).sum();
        for rows in [1, 2, 3, 5, 8, 16, 48, 100, 512] {
            let (x, mut out) = (random(rows * 1536, &mut rng), vec![0.0; rows * 3072]);
            let pass = |_| {
                let start = std::time::Instant::now();
                for matrix in &layers {
                    matrix.multiply(&x[..rows * matrix.inputs], rows, &mut out[..rows * matrix.outputs]);
                }
                start.elapsed().as_secs_f64()
            };
            let best = (0..5).map(pass).fold(f64::INFINITY, f64::min);
            let gflops = 2.0 * (rows * macs) as f64 / best / 1e9;
            println!("{rows} rows: {:.1} tokens/s, {gflops:.1} GFLOP/s", rows as f64 / best);
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
