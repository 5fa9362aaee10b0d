//! AVX2: eight outputs in a vector, up to four rows in registers. `vpmaddubsw` adds two products in 16 bits, which must not
//! saturate: 16 products with four-bit weights (16 · 15 · 127 = 30,480, eight instructions' sums added up) fit just below
//! 32,768, two with weights under 64 do, and weights of eight bits
//! are made signed, so that two fit (2 · 128 · 127) with the sign moved to the activations.
#![allow(unsafe_code, reason = "vector loads and stores go through pointers")]

use std::arch::x86_64::*;

use super::{Loads, Sums, sized};
use crate::cpu::linear::floats::Stored;
use crate::cpu::linear::format::{Format, Second};
use crate::cpu::linear::input::{NEGATED_LOWER_SUM, NEGATED_SUM, Planes, SCALE, SCALED_SUM, WORDS};
use crate::cpu::linear::panels::{Lane, PANEL, Panel};

/// Where the rows of a part of a block lie.
#[derive(Clone, Copy)]
struct Part {
    /// Rows of the block.
    size: usize,
    /// First row of the part.
    first: usize,
}

/// Cuts a block into parts of equal size that the registers hold.
fn parts(size: usize, most: usize) -> (usize, impl Iterator<Item = Part>) {
    let rows = (1..=most).rev().find(|rows| size.is_multiple_of(*rows)).expect("1 divides all sizes");
    (rows, (0..size).step_by(rows).map(move |first| Part { size, first }))
}

/// A panel of quantised weights; see the portable kernel.
pub(super) fn quantised<F: Format>(panel: Panel<'_, F>, x: Planes<'_>, size: usize, sums: &mut Sums) {
    let (rows, parts) = parts(size, 4);
    for part in parts {
        for half in 0..2 {
            // SAFETY: this function is called for `InstructionSet::Avx2` only, which machines with these features have.
            unsafe { sized!(rows, [1, 2, 3, 4], half_panel::<F>, (&panel, half, x, part, sums)) }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn half_panel<F: Format, const R: usize>(
    panel: &Panel<'_, F>,
    half: usize,
    x: Planes<'_>,
    part: Part,
    sums: &mut Sums,
) {
    let mut totals = [_mm256_setzero_ps(); R];
    let groups = panel.quants.chunks_exact(F::LANES).zip(panel.scales.chunks_exact(F::NUMBERS));
    for ((lanes, numbers), (coarse, mut finer)) in groups.zip(x.groups(WORDS * part.size)) {
        let mut plane = Some(coarse);
        while let Some(x) = plane {
            let words = |index: usize| -> &[i32; R] {
                x[index * part.size + part.first..].first_chunk().expect("a part lies within its block")
            };
            add_group::<F, R>(lanes, numbers, half, words, &mut totals);
            plane = finer.take();
        }
    }
    for (sums, total) in sums[part.first..].iter_mut().zip(totals) {
        store(sums, half, total);
    }
}

/// What one group of one plane adds.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_group<'a, F: Format, const R: usize>(
    lanes: &[Lane],
    numbers: &[[F::Element; PANEL]],
    half: usize,
    words: impl Fn(usize) -> &'a [i32; R],
    totals: &mut [__m256; R],
) {
    let first = number::<F>(&numbers[0], half);
    if F::SECOND == Second::UpperScale {
        let second = number::<F>(&numbers[1], half);
        let dots = byte_dots::<F, R>(&lanes[..4], half, words(NEGATED_LOWER_SUM), &words);
        add(totals, first, &dots, words(SCALE));
        let (lower, whole) = (words(NEGATED_LOWER_SUM), words(NEGATED_SUM));
        let upper: [i32; R] = std::array::from_fn(|r| whole[r] - lower[r]);
        let dots = byte_dots::<F, R>(&lanes[4..], half, &upper, |quad| words(quad + 4));
        add(totals, second, &dots, words(SCALE));
        return;
    }
    let dots = if F::NIBBLES {
        nibble_dots::<F, R>(lanes, half, words(NEGATED_SUM), &words)
    } else {
        byte_dots::<F, R>(lanes, half, words(NEGATED_SUM), &words)
    };
    add(totals, first, &dots, words(SCALE));
    if F::SECOND == Second::Minimum {
        let minimum = number::<F>(&numbers[1], half);
        for (total, scaled) in totals.iter_mut().zip(words(SCALED_SUM)) {
            *total = _mm256_fmadd_ps(minimum, broadcast(*scaled), *total);
        }
    }
}

/// Dot products of nibbles: the low ones with quads 0 to 3, the high ones with quads 4 to 7.
#[inline]
#[target_feature(enable = "avx2")]
fn nibble_dots<'a, F: Format, const R: usize>(
    lanes: &[Lane],
    half: usize,
    negated: &[i32; R],
    quad: impl Fn(usize) -> &'a [i32; R],
) -> [__m256i; R] {
    let mask = _mm256_set1_epi8(0xf);
    let mut pairs = [_mm256_setzero_si256(); R];
    for (index, lane) in lanes.iter().enumerate() {
        let both = load(lane, half);
        let low = _mm256_and_si256(both, mask);
        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(both), mask);
        for (pairs, x) in pairs.iter_mut().zip(quad(index)) {
            *pairs = _mm256_add_epi16(*pairs, _mm256_maddubs_epi16(low, _mm256_set1_epi32(*x)));
        }
        for (pairs, x) in pairs.iter_mut().zip(quad(index + 4)) {
            *pairs = _mm256_add_epi16(*pairs, _mm256_maddubs_epi16(high, _mm256_set1_epi32(*x)));
        }
    }
    let mut dots = start::<F, R>(negated);
    for (dot, pairs) in dots.iter_mut().zip(pairs) {
        *dot = _mm256_add_epi32(*dot, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    dots
}

/// Dot products of bytes with as many quads.
#[inline]
#[target_feature(enable = "avx2")]
fn byte_dots<'a, F: Format, const R: usize>(
    lanes: &[Lane],
    half: usize,
    negated: &[i32; R],
    quad: impl Fn(usize) -> &'a [i32; R],
) -> [__m256i; R] {
    let ones = _mm256_set1_epi16(1);
    let mut dots = if F::WIDE { [_mm256_setzero_si256(); R] } else { start::<F, R>(negated) };
    for (index, lane) in lanes.iter().enumerate() {
        let unsigned = load(lane, half);
        let signed = _mm256_xor_si256(unsigned, _mm256_set1_epi8(-128));
        let magnitudes = _mm256_abs_epi8(signed);
        for (dot, x) in dots.iter_mut().zip(quad(index)) {
            let x = _mm256_set1_epi32(*x);
            let pairs = if F::WIDE {
                // The zero point of these formats is 128, so the signed weight is the weight.
                _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(x, signed))
            } else {
                _mm256_maddubs_epi16(unsigned, x)
            };
            *dot = _mm256_add_epi32(*dot, _mm256_madd_epi16(pairs, ones));
        }
    }
    dots
}

/// Sums before the first product: the zero point times the negated sum of the activations.
#[inline]
#[target_feature(enable = "avx2")]
fn start<F: Format, const R: usize>(negated: &[i32; R]) -> [__m256i; R] {
    let mut dots = [_mm256_setzero_si256(); R];
    if let Some(shift) = F::ZERO_SHIFT {
        for (dot, negated) in dots.iter_mut().zip(negated) {
            *dot = _mm256_set1_epi32(negated << shift);
        }
    }
    dots
}

/// `totals += scales * activation scale * dots`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add<const R: usize>(totals: &mut [__m256; R], scales: __m256, dots: &[__m256i; R], x: &[i32; R]) {
    for ((total, dot), x) in totals.iter_mut().zip(dots).zip(x) {
        let scales = _mm256_mul_ps(scales, broadcast(*x));
        *total = _mm256_fmadd_ps(scales, _mm256_cvtepi32_ps(*dot), *total);
    }
}

/// One panel of floating-point weights; see the portable kernel.
pub(super) fn float_panel<E: Stored>(panel: &[[E; PANEL]], x: &[f32], size: usize, sums: &mut Sums) {
    let (rows, parts) = parts(size, 6);
    for part in parts {
        // SAFETY: this function is called for `InstructionSet::Avx2` only, which machines with these features have.
        unsafe { sized!(rows, [1, 2, 3, 4, 6], float_rows::<E>, (panel, x, part, sums)) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn float_rows<E: Stored, const R: usize>(panel: &[[E; PANEL]], x: &[f32], part: Part, sums: &mut Sums) {
    let mut totals = [[_mm256_setzero_ps(); 2]; R];
    for (weights, x) in panel.iter().zip(x.chunks_exact(part.size)) {
        let (low, high) = (stored(weights, 0), stored(weights, 1));
        let x: &[f32; R] = x[part.first..].first_chunk().expect("a part lies within its block");
        for (total, x) in totals.iter_mut().zip(x) {
            let x = _mm256_set1_ps(*x);
            total[0] = _mm256_fmadd_ps(x, low, total[0]);
            total[1] = _mm256_fmadd_ps(x, high, total[1]);
        }
    }
    for (sums, total) in sums[part.first..].iter_mut().zip(totals) {
        store(sums, 0, total[0]);
        store(sums, 1, total[1]);
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn number<F: Format>(numbers: &[F::Element; PANEL], half: usize) -> __m256 {
    // SAFETY: callers have AVX2 and F16C, and there are two halves.
    unsafe { F::Element::load256(numbers, half) }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn stored<E: Stored>(weights: &[E; PANEL], half: usize) -> __m256 {
    // SAFETY: callers have AVX2 and F16C, and there are two halves.
    unsafe { E::load256(weights, half) }
}

/// The bits of a number, as a number, in every element.
#[inline]
#[target_feature(enable = "avx2")]
fn broadcast(bits: i32) -> __m256 {
    _mm256_castsi256_ps(_mm256_set1_epi32(bits))
}

/// Eight outputs of a lane.
#[inline]
#[target_feature(enable = "avx2")]
fn load(lane: &Lane, half: usize) -> __m256i {
    debug_assert!(half < 2);
    // SAFETY: a lane is 64 bytes, aligned to 64, and `half` is 0 or 1.
    unsafe { _mm256_load_si256(lane.0.as_ptr().add(32 * half).cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(to: &mut [f32; PANEL], half: usize, from: __m256) {
    // SAFETY: each half of the array is 32 bytes; indexing checks that there is one.
    unsafe { _mm256_storeu_ps(to[8 * half..8 * half + 8].as_mut_ptr(), from) }
}
