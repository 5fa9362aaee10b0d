//! The specification of the kernels, in plain Rust: what every instruction set must compute, rounding for rounding.

use super::Sums;
use crate::cpu::linear::floats::Stored;
use crate::cpu::linear::format::{Format, ScaleElement as _, Second};
use crate::cpu::linear::input::{NEGATED_LOWER_SUM, NEGATED_SUM, Planes, SCALE, SCALED_SUM, WORDS};
use crate::cpu::linear::panels::{Lane, PANEL, Panel};

/// A panel of quantised weights.
pub(super) fn quantised<F: Format>(panel: &Panel<'_, F>, x: Planes<'_>, size: usize, sums: &mut Sums) {
    let groups = panel.quants.chunks_exact(F::LANES).zip(panel.scales.chunks_exact(F::NUMBERS));
    sums[..size].fill([0.0; PANEL]);
    for ((lanes, numbers), (coarse, finer)) in groups.zip(x.groups(WORDS * size)) {
        for x in [Some(coarse), finer].into_iter().flatten() {
            for (row, sums) in sums[..size].iter_mut().enumerate() {
                add_group::<F>(lanes, numbers, |index| x[index * size + row], sums);
            }
        }
    }
}

/// What one group of one plane of a row, given by its words, adds to its outputs.
fn add_group<F: Format>(
    lanes: &[Lane],
    numbers: &[[F::Element; PANEL]],
    word: impl Fn(usize) -> i32,
    sums: &mut [f32; PANEL],
) {
    let number = |index: usize| f32::from_bits(word(index) as u32);
    let first = numbers[0].map(|scale| scale.to_f32() * number(SCALE));
    if F::SECOND == Second::UpperScale {
        let second = numbers[1].map(|scale| scale.to_f32() * number(SCALE));
        let (lower, whole) = (word(NEGATED_LOWER_SUM), word(NEGATED_SUM));
        add(sums, &first, &dots::<F>(lanes, 0..4, lower, &word));
        add(sums, &second, &dots::<F>(lanes, 4..8, whole - lower, &word));
    } else {
        add(sums, &first, &dots::<F>(lanes, 0..8, word(NEGATED_SUM), &word));
    }
    if F::SECOND == Second::Minimum {
        for (sum, minimum) in sums.iter_mut().zip(&numbers[1]) {
            *sum = minimum.to_f32().mul_add(number(SCALED_SUM), *sum);
        }
    }
}

/// `sums += scales * dots`, each fused.
fn add(sums: &mut [f32; PANEL], scales: &[f32; PANEL], dots: &[i32; PANEL]) {
    for ((sum, scale), dot) in sums.iter_mut().zip(scales).zip(dots) {
        *sum = scale.mul_add(*dot as f32, *sum);
    }
}

/// Exact integer products of 16 outputs over some quads of a group, the zero point taken off.
fn dots<F: Format>(
    lanes: &[Lane],
    quads: std::ops::Range<usize>,
    negated_sum: i32,
    word: impl Fn(usize) -> i32,
) -> [i32; PANEL] {
    let mut dots = [F::ZERO_SHIFT.map_or(0, |shift| negated_sum << shift); PANEL];
    for quad in quads {
        let x = word(quad).to_le_bytes().map(|x| i32::from(x as i8));
        let (lane, shift) = if F::NIBBLES { (&lanes[quad % 4].0, quad / 4 * 4) } else { (&lanes[quad].0, 0) };
        let mask = if F::NIBBLES { 0xf } else { 0xff };
        for (dot, weights) in dots.iter_mut().zip(lane.as_chunks::<4>().0) {
            for (weight, x) in weights.iter().zip(x) {
                *dot += i32::from(weight >> shift & mask) * x;
            }
        }
    }
    dots
}

/// A panel of floating-point weights `[inputs][16]`; `x` is `[inputs][size]`.
pub(super) fn float_panel<E: Stored>(panel: &[[E; PANEL]], x: &[f32], size: usize, sums: &mut Sums) {
    sums[..size].fill([0.0; PANEL]);
    for (weights, x) in panel.iter().zip(x.chunks_exact(size)) {
        let weights = weights.map(E::to_f32);
        for (sums, x) in sums.iter_mut().zip(x) {
            for (sum, weight) in sums.iter_mut().zip(&weights) {
                *sum = x.mul_add(*weight, *sum);
            }
        }
    }
}
