//! AVX-512: a lane vector is one register, and six rows by four panels of sums fit in 32 of them.
#![allow(unsafe_code, reason = "vector instructions, whose presence the type proves")]

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, Lane, Simd};
use crate::shape::LANES;

/// Proof that the machine has AVX-512 F, BW, CD, DQ, VL and VNNI beside AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// # Safety
    ///
    /// The machine has the instructions.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
fn call<K: Kernel>(s: Avx512, kernel: K) -> K::Output {
    kernel.run(s)
}

/// Calls intrinsics.
macro_rules! vector {
    ($($body:tt)*) => {
        // SAFETY: `self` proves that the machine has the instructions; loads and stores go through references.
        unsafe { $($body)* }
    };
}

impl Simd for Avx512 {
    type F32s = __m512;
    const WIDE: bool = true;
    const PREFETCHES: bool = true;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        vector!(call(self, kernel))
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        vector!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn load(self, lane: &Lane) -> __m512 {
        vector!(_mm512_loadu_ps(lane.as_ptr()))
    }

    #[inline(always)]
    fn store(self, x: __m512, lane: &mut Lane) {
        vector!(_mm512_storeu_ps(lane.as_mut_ptr(), x))
    }

    #[inline(always)]
    fn widen_f16(self, lane: &[f16; LANES]) -> __m512 {
        vector!(_mm512_cvtph_ps(_mm256_loadu_si256(lane.as_ptr().cast())))
    }

    #[inline(always)]
    fn widen_bf16(self, lane: &[bf16; LANES]) -> __m512 {
        vector! {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(lane.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    fn widen_i8(self, lane: &[i8; LANES]) -> __m512 {
        vector!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(lane.as_ptr().cast()))))
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        vector!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        vector!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        vector!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        vector!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        vector!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn power(self, shifted: __m512) -> __m512 {
        vector! {
            let bits = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
            let one = _mm512_set1_epi32(1.0_f32.to_bits().cast_signed());
            _mm512_castsi512_ps(_mm512_add_epi32(bits, one))
        }
    }

    #[inline(always)]
    fn zero_below(self, x: __m512, limit: __m512, value: __m512) -> __m512 {
        vector!(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, limit), value))
    }

    #[inline(always)]
    fn sum(self, x: __m512) -> f32 {
        vector! {
            let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }

    #[inline(always)]
    fn top(self, x: __m512) -> f32 {
        vector! {
            let x = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        vector!(_mm_prefetch::<_MM_HINT_T1>(address.cast()))
    }
}
