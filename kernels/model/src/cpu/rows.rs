//! Row operations between products. Sums run over 16 lanes that are added up in a fixed order; no fused operations, so that
//! every instruction set rounds alike.

use rayon::prelude::*;

/// Partial sums of a reduction.
const LANES: usize = 16;

/// Rows worth a task of their own.
const TASK_ROWS: usize = 8;

/// `a += b`.
pub(super) fn add(a: &mut [f32], b: &[f32]) {
    for (a, b) in a.iter_mut().zip(b) {
        *a += b;
    }
}

/// `a += b`, rows of `width` in parallel.
pub(super) fn add_rows(a: &mut [f32], b: &[f32], width: usize) {
    a.par_chunks_mut(TASK_ROWS * width).zip(b.par_chunks(TASK_ROWS * width)).for_each(|(a, b)| add(a, b));
}

/// RMSNorm of each row of `weight.len()` elements: `x / sqrt(mean(x²) + eps) * weight`.
pub(super) fn norm_rows(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut normed = x.to_vec();
    normed
        .par_chunks_exact_mut(weight.len())
        .with_min_len(TASK_ROWS)
        .for_each(|row| norm_in_place(row, weight, eps));
    normed
}

/// RMSNorm of one row or head.
pub(super) fn norm_in_place(row: &mut [f32], weight: &[f32], eps: f32) {
    let scale = 1.0 / (sum_of_squares(row) / row.len() as f32 + eps).sqrt();
    for (x, weight) in row.iter_mut().zip(weight) {
        *x = *x * scale * weight;
    }
}

/// `silu(gate) * up`: each row of `gate_up` is gate `[ffn]`, then up `[ffn]`; the result has rows of `ffn`.
pub(super) fn swiglu_rows(gate_up: &[f32], ffn: usize) -> Vec<f32> {
    let mut gated = vec![0.0; gate_up.len() / 2];
    gated.par_chunks_exact_mut(ffn).zip(gate_up.par_chunks_exact(2 * ffn)).for_each(|(out, row)| {
        let (gate, up) = row.split_at(ffn);
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate / (1.0 + (-gate).exp()) * up;
        }
    });
    gated
}

fn sum_of_squares(row: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x * x;
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += x * x;
    }
    let mut width = LANES / 2;
    while width > 0 {
        let (low, high) = lanes.split_at_mut(width);
        add(low, &high[..width]);
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norm_divides_by_the_root_mean_square() {
        for n in [1_usize, 15, 16, 33, 576] {
            let row: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
            let weight: Vec<f32> = (0..n).map(|i| 0.5 + i as f32 / n as f32).collect();
            let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n as f64;
            let normed = norm_rows(&row, &weight, 1e-5);
            for ((got, x), w) in normed.iter().zip(&row).zip(&weight) {
                let want = f64::from(*x) / (mean + 1e-5).sqrt() * f64::from(*w);
                assert!((f64::from(*got) - want).abs() < 1e-6 * (1.0 + want.abs()), "{n}: {got} != {want}");
            }
        }
    }

    #[test]
    fn gate_saturates_without_nan() {
        let gated = swiglu_rows(&[-200.0, 0.0, 200.0, 1.0, 5.0, 5.0, 2.0, 3.0], 4);
        assert_eq!(gated[..3], [-0.0, 0.0, 400.0]);
        assert!((gated[3] - 3.0 / (1.0 + (-1.0_f32).exp())).abs() < 1e-6);
    }
}
