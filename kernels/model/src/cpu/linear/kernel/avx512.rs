//! AVX-512 with VNNI: all 16 outputs of a panel in one vector, up to 12 rows in registers. `vpdpbusd` adds four exact products
//! to 32-bit sums; the quad of activations comes straight from memory, broadcast.
//!
//! Helpers with inner loops are always inlined, as a call would spill all sums; Rust allows that only without
//! `#[target_feature]`, which makes the intrinsics in them unsafe.
#![allow(unsafe_code, reason = "vector loads and stores go through pointers")]

use std::arch::x86_64::*;

use super::{Loads, Sums, sized};
use crate::cpu::linear::floats::Stored;
use crate::cpu::linear::format::{Format, Second};
use crate::cpu::linear::input::{
    NEGATED_LOWER_SUM, NEGATED_SUM, Planes, ROUND, SCALE, SCALED_SUM, WORDS, scale_and_inverse, write_sums,
};
use crate::cpu::linear::panels::{GROUP, Lane, PANEL, Panel};

/// A panel of quantised weights; see the portable kernel.
pub(super) fn quantised<F: Format>(panel: Panel<'_, F>, x: Planes<'_>, size: usize, sums: &mut Sums) {
    // SAFETY: this function is called for `InstructionSet::Avx512` only, which machines with these features have.
    unsafe { sized!(size, [1, 2, 3, 4, 6, 8, 12], rows::<F>, (panel, x, sums)) }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni")]
fn rows<F: Format, const R: usize>(panel: Panel<'_, F>, x: Planes<'_>, sums: &mut Sums) {
    let mut totals = [_mm512_setzero_ps(); R];
    let groups = panel.quants.chunks_exact(F::LANES).zip(panel.scales.chunks_exact(F::NUMBERS));
    for ((lanes, numbers), (coarse, mut finer)) in groups.zip(x.groups(WORDS * R)) {
        let mut plane = Some(coarse);
        while let Some(x) = plane {
            // SAFETY: this function has the features that the helper asks for.
            unsafe { add_group::<F, R>(lanes, numbers, x, &mut totals) }
            plane = finer.take();
        }
    }
    for (sums, total) in sums.iter_mut().zip(totals) {
        store(sums, total);
    }
}

/// What one group of one plane adds.
///
/// # Safety
///
/// The machine has AVX-512 F, BW and VNNI, F16C and AVX2.
#[inline(always)]
unsafe fn add_group<F: Format, const R: usize>(
    lanes: &[Lane],
    numbers: &[[F::Element; PANEL]],
    x: &[i32],
    totals: &mut [__m512; R],
) {
    // SAFETY: the caller knows the machine.
    unsafe {
        let first = number::<F>(&numbers[0]);
        if F::SECOND == Second::UpperScale {
            let second = number::<F>(&numbers[1]);
            let mut dots = start::<F, R>(|r| x[NEGATED_LOWER_SUM * R + r]);
            byte_dots(&lanes[..4], x, &mut dots);
            add(totals, first, &dots, x);
            let mut dots = start::<F, R>(|r| x[NEGATED_SUM * R + r] - x[NEGATED_LOWER_SUM * R + r]);
            byte_dots(&lanes[4..], &x[4 * R..], &mut dots);
            add(totals, second, &dots, x);
            return;
        }
        let mut dots = start::<F, R>(|r| x[NEGATED_SUM * R + r]);
        if F::NIBBLES {
            nibble_dots(lanes, x, &mut dots);
        } else {
            byte_dots(lanes, x, &mut dots);
        }
        add(totals, first, &dots, x);
        if F::SECOND == Second::Minimum {
            let minimum = number::<F>(&numbers[1]);
            for (r, total) in totals.iter_mut().enumerate() {
                *total = _mm512_fmadd_ps(minimum, broadcast(x[SCALED_SUM * R + r]), *total);
            }
        }
    }
}

/// Sums before the first product: the zero point times the negated sum of the activations.
///
/// # Safety
///
/// The machine has AVX-512 F, BW and VNNI.
#[inline(always)]
unsafe fn start<F: Format, const R: usize>(negated_sum: impl Fn(usize) -> i32) -> [__m512i; R] {
    // SAFETY: the caller knows the machine; loads are of whole lanes.
    unsafe {
        let mut dots = [_mm512_setzero_si512(); R];
        if let Some(shift) = F::ZERO_SHIFT {
            for (r, dot) in dots.iter_mut().enumerate() {
                *dot = _mm512_set1_epi32(negated_sum(r) << shift);
            }
        }
        dots
    }
}

/// Adds the products of lanes of two nibbles: the low ones with quads 0 to 3, the high ones with quads 4 to 7.
///
/// # Safety
///
/// The machine has AVX-512 F, BW and VNNI.
#[inline(always)]
unsafe fn nibble_dots<const R: usize>(lanes: &[Lane], x: &[i32], dots: &mut [__m512i; R]) {
    // SAFETY: the caller knows the machine; loads are of whole lanes.
    unsafe {
        let mask = _mm512_set1_epi8(0xf);
        for (quad, lane) in lanes.iter().enumerate() {
            let both = load(lane);
            let low = _mm512_and_si512(both, mask);
            let high = _mm512_and_si512(_mm512_srli_epi16::<4>(both), mask);
            for (r, dot) in dots.iter_mut().enumerate() {
                *dot = _mm512_dpbusd_epi32(*dot, low, _mm512_set1_epi32(x[quad * R + r]));
            }
            for (r, dot) in dots.iter_mut().enumerate() {
                *dot = _mm512_dpbusd_epi32(*dot, high, _mm512_set1_epi32(x[(quad + 4) * R + r]));
            }
        }
    }
}

/// Adds the products of lanes of bytes with as many quads.
///
/// # Safety
///
/// The machine has AVX-512 F, BW and VNNI.
#[inline(always)]
unsafe fn byte_dots<const R: usize>(lanes: &[Lane], x: &[i32], dots: &mut [__m512i; R]) {
    // SAFETY: the caller knows the machine; loads are of whole lanes.
    unsafe {
        for (quad, lane) in lanes.iter().enumerate() {
            let weights = load(lane);
            for (r, dot) in dots.iter_mut().enumerate() {
                *dot = _mm512_dpbusd_epi32(*dot, weights, _mm512_set1_epi32(x[quad * R + r]));
            }
        }
    }
}

/// `totals += scales * activation scale * dots`.
///
/// # Safety
///
/// The machine has AVX-512 F, BW and VNNI.
#[inline(always)]
unsafe fn add<const R: usize>(totals: &mut [__m512; R], scales: __m512, dots: &[__m512i; R], x: &[i32]) {
    // SAFETY: the caller knows the machine; loads are of whole lanes.
    unsafe {
        for (r, total) in totals.iter_mut().enumerate() {
            let scales = _mm512_mul_ps(scales, broadcast(x[SCALE * R + r]));
            *total = _mm512_fmadd_ps(scales, _mm512_cvtepi32_ps(dots[r]), *total);
        }
    }
}

/// Quantises a row into its slot of a block; see `input`.
pub(in crate::cpu::linear) fn quantise(x: &[f32], words: &mut [i32], slot: usize, size: usize) {
    // SAFETY: this function is called for `InstructionSet::Avx512` only, which machines with these features have.
    unsafe { quantise_row(x, words, slot, size) }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
fn quantise_row(x: &[f32], words: &mut [i32], slot: usize, size: usize) {
    for (x, words) in x.as_chunks::<GROUP>().0.iter().zip(words.chunks_exact_mut(WORDS * size)) {
        let [lower, upper]: &[[f32; 16]; 2] = x.as_chunks().0.try_into().expect("a group is two vectors");
        let (lower, upper) = (stored(lower), stored(upper));
        let magnitude = _mm512_max_epu32(
            _mm512_castps_si512(_mm512_abs_ps(lower)),
            _mm512_castps_si512(_mm512_abs_ps(upper)),
        );
        let (scale, inverse) = scale_and_inverse(_mm512_reduce_max_epu32(magnitude));
        let (lower, upper) = (quants(lower, inverse), quants(upper, inverse));
        write_quads(words, slot, size, lower);
        write_quads(&mut words[4 * size..], slot, size, upper);
        let sums = [_mm512_reduce_add_epi32(lower), _mm512_reduce_add_epi32(upper)];
        write_sums(words, slot, size, scale, sums);
    }
}

/// The nearest integers, ties to even; 0 for all where the inverse is 0, of infinities and NaN too.
#[inline]
#[target_feature(enable = "avx512f")]
fn quants(x: __m512, inverse: f32) -> __m512i {
    let (round, counts) = (_mm512_set1_ps(ROUND), if inverse > 0.0 { 0xffff } else { 0 });
    let scaled = _mm512_maskz_mul_ps(counts, x, _mm512_set1_ps(inverse));
    let shifted = _mm512_castps_si512(_mm512_add_ps(scaled, round));
    _mm512_sub_epi32(shifted, _mm512_castps_si512(round))
}

/// Writes 16 quants as four words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn write_quads(words: &mut [i32], slot: usize, size: usize, quants: __m512i) {
    let bytes = _mm512_cvtepi32_epi8(quants);
    words[slot] = _mm_extract_epi32::<0>(bytes);
    words[size + slot] = _mm_extract_epi32::<1>(bytes);
    words[2 * size + slot] = _mm_extract_epi32::<2>(bytes);
    words[3 * size + slot] = _mm_extract_epi32::<3>(bytes);
}

/// One panel of floating-point weights; see the portable kernel.
pub(super) fn float_panel<E: Stored>(panel: &[[E; PANEL]], x: &[f32], size: usize, sums: &mut Sums) {
    // SAFETY: this function is called for `InstructionSet::Avx512` only, which machines with these features have.
    unsafe { sized!(size, [1, 2, 3, 4, 6, 8, 12], float_rows::<E>, (panel, x, sums)) }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
fn float_rows<E: Stored, const R: usize>(panel: &[[E; PANEL]], x: &[f32], sums: &mut Sums) {
    let mut totals = [_mm512_setzero_ps(); R];
    for (weights, x) in panel.iter().zip(x.as_chunks::<R>().0) {
        let weights = stored(weights);
        for (total, x) in totals.iter_mut().zip(x) {
            *total = _mm512_fmadd_ps(_mm512_set1_ps(*x), weights, *total);
        }
    }
    for (sums, total) in sums.iter_mut().zip(totals) {
        store(sums, total);
    }
}

/// Two panels at once, so that a broadcast activation serves 32 outputs.
pub(super) fn two_float_panels<E: Stored>(
    panels: [&[[E; PANEL]]; 2],
    x: &[f32],
    size: usize,
    sums: [&mut Sums; 2],
) {
    // SAFETY: this function is called for `InstructionSet::Avx512` only, which machines with these features have.
    unsafe { sized!(size, [1, 2, 3, 4, 6, 8, 12], two_float_rows::<E>, (panels, x, sums)) }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
fn two_float_rows<E: Stored, const R: usize>(panels: [&[[E; PANEL]]; 2], x: &[f32], sums: [&mut Sums; 2]) {
    let mut totals = [[_mm512_setzero_ps(); 2]; R];
    for ((a, b), x) in panels[0].iter().zip(panels[1]).zip(x.as_chunks::<R>().0) {
        let (a, b) = (stored(a), stored(b));
        for (total, x) in totals.iter_mut().zip(x) {
            let x = _mm512_set1_ps(*x);
            total[0] = _mm512_fmadd_ps(x, a, total[0]);
            total[1] = _mm512_fmadd_ps(x, b, total[1]);
        }
    }
    let [first, second] = sums;
    for ((first, second), total) in first.iter_mut().zip(second).zip(totals) {
        store(first, total[0]);
        store(second, total[1]);
    }
}

#[inline]
#[target_feature(enable = "avx512f,f16c,avx2")]
fn number<F: Format>(numbers: &[F::Element; PANEL]) -> __m512 {
    // SAFETY: callers have AVX-512 F.
    unsafe { F::Element::load512(numbers) }
}

#[inline]
#[target_feature(enable = "avx512f,f16c,avx2")]
fn stored<E: Stored>(weights: &[E; PANEL]) -> __m512 {
    // SAFETY: callers have AVX-512 F.
    unsafe { E::load512(weights) }
}

/// The bits of a number, as a number, in every element.
#[inline]
#[target_feature(enable = "avx512f")]
fn broadcast(bits: i32) -> __m512 {
    _mm512_castsi512_ps(_mm512_set1_epi32(bits))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(lane: &Lane) -> __m512i {
    // SAFETY: a lane is 64 bytes, aligned to 64.
    unsafe { _mm512_load_si512(lane.0.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut [f32; PANEL], from: __m512) {
    // SAFETY: the array is 64 bytes.
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), from) }
}
