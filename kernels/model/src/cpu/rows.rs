//! Row operations between products.
//!
//! # Canonical arithmetic
//!
//! Sums of squares run over 16 lanes, which are added up in a fixed order of halves; no fused operations. The sigmoid's
//! exponential is a polynomial of fused multiply-adds. Every instruction set gives the same bits.

use super::versions::versions;
use crate::rope::{Rope, Rotation};

/// Partial sums of a reduction.
const LANES: usize = 16;

/// `a += b`.
pub(super) fn add(a: &mut [f32], b: &[f32]) {
    for (a, b) in a.iter_mut().zip(b) {
        *a += b;
    }
}

versions! {
    /// RMSNorm of a row into `out`: `x / sqrt(mean(x²) + eps) * weight`.
    pub(super) fn norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = norm_row;
}

#[inline(always)]
fn norm_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = norm_scale(x, eps);
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = *x * scale * weight;
    }
}

versions! {
    /// RMSNorm of each head of a row, in place; heads have `weight.len()` elements.
    pub(super) fn norm_heads(heads: &mut [f32], weight: &[f32], eps: f32) = norm_heads_row;
}

#[inline(always)]
fn norm_heads_row(heads: &mut [f32], weight: &[f32], eps: f32) {
    for head in heads.chunks_exact_mut(weight.len()) {
        let scale = norm_scale(head, eps);
        for (x, weight) in head.iter_mut().zip(weight) {
            *x = *x * scale * weight;
        }
    }
}

versions! {
    /// Rotates each head of a row, in place.
    pub(super) fn rotate_heads(rope: &Rope, heads: &mut [f32], head_dim: usize, rotation: &Rotation) = rotate_row;
}

#[inline(always)]
fn rotate_row(rope: &Rope, heads: &mut [f32], head_dim: usize, rotation: &Rotation) {
    heads.chunks_exact_mut(head_dim).for_each(|head| rope.rotate(head, rotation));
}

#[inline(always)]
fn norm_scale(row: &[f32], eps: f32) -> f32 {
    1.0 / (sum_of_squares(row) / row.len() as f32 + eps).sqrt()
}

/// Sum over 16 lanes that are added up pairwise.
#[inline(always)]
pub(super) fn sum_of_squares(row: &[f32]) -> f32 {
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

versions! {
    /// `gate = silu(gate) * up`, element by element.
    pub(super) fn swiglu(gates: &mut [f32], ups: &[f32]) = swiglu_elements;
}

#[inline(always)]
fn swiglu_elements(gates: &mut [f32], ups: &[f32]) {
    for (gate, up) in gates.iter_mut().zip(ups) {
        *gate = *gate / (1.0 + exp(-*gate)) * up;
    }
}

/// e^`x`, with a relative error below 1.5e-7 up to `x` = 88; infinite above 88, 0 below -87. NaN stays NaN.
///
/// `x / ln 2` is split into its nearest integer and a rest in [-½, ½], whose power of two is a polynomial of degree 6
/// (minimax of the relative error, 2e-9 before rounding).
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// 1.5 × 2^23: adding it leaves the nearest integer in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    /// What f32 leaves of 1 / ln 2.
    const LOG2_E_REST: f32 = 1.925_963e-8;
    use std::f32::consts::{LN_2, LOG2_E};
    let shifted = x.mul_add(LOG2_E, ROUND);
    let rest = x.mul_add(LOG2_E_REST, x.mul_add(LOG2_E, -(shifted - ROUND)));
    let mut power = 1.535_336_2e-4_f32;
    power = power.mul_add(rest, 1.339_887_5e-3);
    power = power.mul_add(rest, 9.618_437e-3);
    power = power.mul_add(rest, 5.550_332_4e-2);
    power = power.mul_add(rest, 2.402_264_8e-1);
    power = power.mul_add(rest, LN_2);
    power = power.mul_add(rest, 1.0);
    // The integer times 2^23 added to the bits of 1.0 is the power of that integer.
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    let result = if x > 88.0 { f32::INFINITY } else { power * scale };
    if x < -87.0 { 0.0 } else { result }
}

#[cfg(test)]
mod tests {
    use longshore_compute::InstructionSet;

    use super::*;

    #[test]
    fn norm_divides_by_the_root_mean_square() {
        for n in [1_usize, 15, 16, 33, 576] {
            let row: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
            let weight: Vec<f32> = (0..n).map(|i| 0.5 + i as f32 / n as f32).collect();
            let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n as f64;
            let mut portable = vec![f32::NAN; n];
            norm(InstructionSet::Portable, &row, &weight, 1e-5, &mut portable);
            for ((got, x), w) in portable.iter().zip(&row).zip(&weight) {
                let want = f64::from(*x) / (mean + 1e-5).sqrt() * f64::from(*w);
                assert!((f64::from(*got) - want).abs() < 1e-6 * (1.0 + want.abs()), "{n}: {got} != {want}");
            }
            for set in InstructionSet::available() {
                let mut normed = vec![f32::NAN; n];
                norm(set, &row, &weight, 1e-5, &mut normed);
                assert_eq!(normed, portable, "{set}");
                let mut heads = row.clone();
                norm_heads(set, &mut heads, &weight, 1e-5);
                assert_eq!(heads, portable, "{set}");
            }
        }
    }

    #[test]
    fn exponentials_are_as_exact_as_documented() {
        let (mut x, mut worst) = (-87.0_f32, 0.0_f64);
        while x <= 88.0 {
            worst = worst.max((f64::from(exp(x)) / f64::from(x).exp() - 1.0).abs());
            x += 0.000_37;
        }
        assert!(worst < 1.5e-7, "relative error {worst:e}");
        assert_eq!((exp(0.0), exp(-1e30), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert_eq!((exp(89.0), exp(1e30), exp(f32::INFINITY)), (f32::INFINITY, f32::INFINITY, f32::INFINITY));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn gates_saturate_and_agree_with_f64_on_every_instruction_set() {
        let mut gates: Vec<f32> = (-2000..2000).map(|i| i as f32 * 0.1).collect();
        gates.extend([0.0, -0.0, 1e-30, -1e30, 1e30]);
        let ups: Vec<f32> = (0..gates.len()).map(|i| (i as f32 * 0.37).cos() * 4.0).collect();
        let mut portable = gates.clone();
        swiglu(InstructionSet::Portable, &mut portable, &ups);
        for ((got, gate), up) in portable.iter().zip(&gates).zip(&ups) {
            let want = f64::from(*gate) / (1.0 + (-f64::from(*gate)).exp()) * f64::from(*up);
            assert!((f64::from(*got) - want).abs() <= 4e-7 * want.abs() + 1e-30, "{gate}: {got} != {want}");
        }
        for set in InstructionSet::available() {
            let mut gated = gates.clone();
            swiglu(set, &mut gated, &ups);
            assert!(gated.iter().zip(&portable).all(|(a, b)| a.to_bits() == b.to_bits()), "{set}");
        }
        let mut bad = [f32::NAN, 1.0];
        swiglu(InstructionSet::Portable, &mut bad, &[1.0, 1.0]);
        assert!(bad[0].is_nan() && bad[1].is_finite());
    }
}
