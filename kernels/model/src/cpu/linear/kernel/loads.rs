//! Vectors of f32 out of 16 stored elements.
#![allow(unsafe_code, reason = "vector loads read through pointers")]

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::cpu::linear::panels::PANEL;

/// Stored elements that vectors can be loaded from. Every conversion is exact.
pub(in crate::cpu::linear) trait Loads: Sized {
    /// All 16.
    ///
    /// # Safety
    ///
    /// The machine has AVX-512 F.
    unsafe fn load512(from: &[Self; PANEL]) -> __m512;

    /// Eight of them, the first or the second half.
    ///
    /// # Safety
    ///
    /// The machine has AVX2 and F16C, and `half` is 0 or 1.
    unsafe fn load256(from: &[Self; PANEL], half: usize) -> __m256;
}

impl Loads for f32 {
    #[inline(always)]
    unsafe fn load512(from: &[Self; PANEL]) -> __m512 {
        // SAFETY: the array is 64 bytes, and the caller knows the machine.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn load256(from: &[Self; PANEL], half: usize) -> __m256 {
        // SAFETY: each half of the array is 32 bytes, and the caller knows the machine.
        unsafe { _mm256_loadu_ps(from.as_ptr().add(8 * half)) }
    }
}

impl Loads for f16 {
    #[inline(always)]
    unsafe fn load512(from: &[Self; PANEL]) -> __m512 {
        // SAFETY: the array is 32 bytes, and the caller knows the machine.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())) }
    }

    #[inline(always)]
    unsafe fn load256(from: &[Self; PANEL], half: usize) -> __m256 {
        // SAFETY: each half of the array is 16 bytes, and the caller knows the machine.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().add(8 * half).cast())) }
    }
}

impl Loads for bf16 {
    #[inline(always)]
    unsafe fn load512(from: &[Self; PANEL]) -> __m512 {
        // SAFETY: the array is 32 bytes, and the caller knows the machine.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn load256(from: &[Self; PANEL], half: usize) -> __m256 {
        // SAFETY: each half of the array is 16 bytes, and the caller knows the machine.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().add(8 * half).cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
}
