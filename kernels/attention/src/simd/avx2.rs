//! AVX2 with FMA and F16C: a lane vector is two registers, and six rows of one panel of sums fit in 16 of them.
#![allow(unsafe_code, reason = "vector instructions, whose presence the type proves")]

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, Lane, Simd};
use crate::shape::LANES;

/// Proof that the machine has AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    ///
    /// The machine has the instructions.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
fn call<K: Kernel>(s: Avx2, kernel: K) -> K::Output {
    kernel.run(s)
}

/// Calls intrinsics.
macro_rules! vector {
    ($($body:tt)*) => {
        // SAFETY: `self` proves that the machine has the instructions; loads and stores go through references.
        unsafe { $($body)* }
    };
}

/// Lanes 0 to 7 and 8 to 15.
type Pair = [__m256; 2];

impl Simd for Avx2 {
    type F32s = Pair;
    const WIDE: bool = false;
    const PREFETCHES: bool = true;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        vector!(call(self, kernel))
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Pair {
        vector!([_mm256_set1_ps(x); 2])
    }

    #[inline(always)]
    fn load(self, lane: &Lane) -> Pair {
        let halves = halves(lane);
        vector!([_mm256_loadu_ps(halves[0].as_ptr()), _mm256_loadu_ps(halves[1].as_ptr())])
    }

    #[inline(always)]
    fn store(self, x: Pair, lane: &mut Lane) {
        let (low, high) = lane.split_at_mut(LANES / 2);
        vector! {
            _mm256_storeu_ps(low.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(high.as_mut_ptr(), x[1]);
        }
    }

    #[inline(always)]
    fn widen_f16(self, lane: &[f16; LANES]) -> Pair {
        let [low, high] = halves(lane);
        vector! {
            let (low, high) = (_mm_loadu_si128(low.as_ptr().cast()), _mm_loadu_si128(high.as_ptr().cast()));
            [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
        }
    }

    #[inline(always)]
    fn widen_bf16(self, lane: &[bf16; LANES]) -> Pair {
        let [low, high] = halves(lane);
        vector! {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(low.as_ptr().cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(high.as_ptr().cast()));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            ]
        }
    }

    #[inline(always)]
    fn widen_i8(self, lane: &[i8; LANES]) -> Pair {
        let [low, high] = halves(lane);
        vector! {
            let low = _mm256_cvtepi8_epi32(_mm_loadl_epi64(low.as_ptr().cast()));
            let high = _mm256_cvtepi8_epi32(_mm_loadl_epi64(high.as_ptr().cast()));
            [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)]
        }
    }

    #[inline(always)]
    fn add(self, a: Pair, b: Pair) -> Pair {
        vector!([_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn sub(self, a: Pair, b: Pair) -> Pair {
        vector!([_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn mul(self, a: Pair, b: Pair) -> Pair {
        vector!([_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn fma(self, a: Pair, b: Pair, c: Pair) -> Pair {
        vector!([_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])])
    }

    #[inline(always)]
    fn max(self, a: Pair, b: Pair) -> Pair {
        vector!([_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn power(self, shifted: Pair) -> Pair {
        vector! {
            let one = _mm256_set1_epi32(1.0_f32.to_bits().cast_signed());
            let low = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted[0]));
            let high = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted[1]));
            [
                _mm256_castsi256_ps(_mm256_add_epi32(low, one)),
                _mm256_castsi256_ps(_mm256_add_epi32(high, one)),
            ]
        }
    }

    #[inline(always)]
    fn zero_below(self, x: Pair, limit: Pair, value: Pair) -> Pair {
        vector! {
            [
                _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(x[0], limit[0]), value[0]),
                _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(x[1], limit[1]), value[1]),
            ]
        }
    }

    #[inline(always)]
    fn sum(self, x: Pair) -> f32 {
        vector! {
            let x = _mm256_add_ps(x[0], x[1]);
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }

    #[inline(always)]
    fn top(self, x: Pair) -> f32 {
        vector! {
            let x = _mm256_max_ps(x[0], x[1]);
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

#[inline(always)]
fn halves<T>(lane: &[T; LANES]) -> [&[T; LANES / 2]; 2] {
    let (halves, _) = lane.as_chunks();
    [&halves[0], &halves[1]]
}
