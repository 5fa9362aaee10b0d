//! Plain Rust: the specification of every operation, and the fallback.

use half::{bf16, f16};

use super::{Kernel, Lane, Simd};
use crate::shape::LANES;

/// What any processor can do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> Lane {
    std::array::from_fn(f)
}

impl Simd for Portable {
    type F32s = Lane;
    const WIDE: bool = false;
    const PREFETCHES: bool = false;

    #[inline(never)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Lane {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, lane: &Lane) -> Lane {
        *lane
    }

    #[inline(always)]
    fn store(self, x: Lane, lane: &mut Lane) {
        *lane = x;
    }

    #[inline(always)]
    fn widen_f16(self, lane: &[f16; LANES]) -> Lane {
        each(|i| widen(lane[i].to_bits()))
    }

    #[inline(always)]
    fn widen_bf16(self, lane: &[bf16; LANES]) -> Lane {
        each(|i| f32::from_bits(u32::from(lane[i].to_bits()) << 16))
    }

    #[inline(always)]
    fn widen_i8(self, lane: &[i8; LANES]) -> Lane {
        each(|i| f32::from(lane[i]))
    }

    #[inline(always)]
    fn add(self, a: Lane, b: Lane) -> Lane {
        each(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Lane, b: Lane) -> Lane {
        each(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Lane, b: Lane) -> Lane {
        each(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn fma(self, a: Lane, b: Lane, c: Lane) -> Lane {
        each(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn max(self, a: Lane, b: Lane) -> Lane {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn power(self, shifted: Lane) -> Lane {
        each(|i| f32::from_bits((shifted[i].to_bits() << 23).wrapping_add(1.0_f32.to_bits())))
    }

    #[inline(always)]
    fn zero_below(self, x: Lane, limit: Lane, value: Lane) -> Lane {
        each(|i| if x[i] < limit[i] { 0.0 } else { value[i] })
    }

    #[inline(always)]
    fn sum(self, mut x: Lane) -> f32 {
        for width in [8, 4, 2, 1] {
            for i in 0..width {
                x[i] += x[i + width];
            }
        }
        x[0]
    }

    #[inline(always)]
    fn top(self, x: Lane) -> f32 {
        x.iter().fold(f32::NEG_INFINITY, |top, &x| if x > top { x } else { top })
    }

    #[inline(always)]
    fn prefetch(self, _address: *const u8) {}
}

/// The f32 of an f16's bits, exactly; in operations that the compiler can do on a whole vector at once.
#[inline(always)]
fn widen(narrow: u16) -> f32 {
    /// Difference of the exponents' biases, as a power of two.
    const REBIAS: f32 = f32::from_bits((127 + 112) << 23);
    const INFINITY: u32 = 0x7c00;

    let narrow = u32::from(narrow);
    let magnitude = narrow & 0x7fff;
    let finite = f32::from_bits(magnitude << 13) * REBIAS;
    let special = f32::from_bits((magnitude << 13) | f32::INFINITY.to_bits());
    let wide = if magnitude >= INFINITY { special } else { finite };
    f32::from_bits(wide.to_bits() | (narrow & 0x8000) << 16)
}
