//! Sixteen f32 lanes in the registers of each instruction set, and how a kernel gets there.
//!
//! A kernel is written once, over [`Simd`]. Every operation is exactly rounded and none crosses lanes but [`Simd::sum`],
//! whose order is fixed, and [`Simd::top`]: so all instruction sets give the same bits. [`Portable`] is the specification
//! (and what AArch64 runs, whose vector unit the compiler uses for it).

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use half::{bf16, f16};
use longshore_compute::InstructionSet;

use crate::exp2::{COEFFICIENTS, ROUND, SMALLEST};
use crate::shape::LANES;

pub(crate) use portable::Portable;

/// 16 keys of one element of K, or 16 columns of one row of V.
pub(crate) type Lane = [f32; LANES];

/// The operations of an instruction set. A value of the type is the proof that the machine has it.
pub(crate) trait Simd: Copy {
    /// 16 lanes.
    type F32s: Copy;
    /// Whether the registers hold 4 panels of sums for 6 rows, else 1.
    const WIDE: bool;
    /// Whether [`Simd::prefetch`] does anything.
    const PREFETCHES: bool;

    /// Runs a kernel compiled with the instruction set: inlining ends here.
    fn call<K: Kernel>(self, kernel: K) -> K::Output;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F32s;
    /// Reads 16 numbers.
    fn load(self, lane: &Lane) -> Self::F32s;
    /// Writes 16 numbers.
    fn store(self, x: Self::F32s, lane: &mut Lane);
    /// Reads 16 numbers, exactly.
    fn widen_f16(self, lane: &[f16; LANES]) -> Self::F32s;
    /// Reads 16 numbers, exactly.
    fn widen_bf16(self, lane: &[bf16; LANES]) -> Self::F32s;
    /// Reads 16 numbers, exactly.
    fn widen_i8(self, lane: &[i8; LANES]) -> Self::F32s;
    /// `a + b`.
    fn add(self, a: Self::F32s, b: Self::F32s) -> Self::F32s;
    /// `a - b`.
    fn sub(self, a: Self::F32s, b: Self::F32s) -> Self::F32s;
    /// `a * b`.
    fn mul(self, a: Self::F32s, b: Self::F32s) -> Self::F32s;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F32s, b: Self::F32s, c: Self::F32s) -> Self::F32s;
    /// `a` where it is greater, else `b` (also when either is NaN).
    fn max(self, a: Self::F32s, b: Self::F32s) -> Self::F32s;
    /// `2^n`, where the low bits of `shifted` are `n` (see [`Simd::exp2`]).
    fn power(self, shifted: Self::F32s) -> Self::F32s;
    /// 0 where `x < limit`, else `value`.
    fn zero_below(self, x: Self::F32s, limit: Self::F32s, value: Self::F32s) -> Self::F32s;
    /// Sum of the lanes, pairwise: distance 8, 4, 2, 1.
    fn sum(self, x: Self::F32s) -> f32;
    /// The largest lane; none may be NaN.
    fn top(self, x: Self::F32s) -> f32;
    /// Asks for the cache line at an address, which need not be valid.
    fn prefetch(self, address: *const u8);

    /// [`crate::exp2::exp2`] of each lane.
    #[inline(always)]
    fn exp2(self, x: Self::F32s) -> Self::F32s {
        let round = self.splat(ROUND);
        let shifted = self.add(x, round);
        let rest = self.sub(x, self.sub(shifted, round));
        let mut power = self.splat(COEFFICIENTS[0]);
        for &coefficient in &COEFFICIENTS[1..] {
            power = self.fma(power, rest, self.splat(coefficient));
        }
        self.zero_below(x, self.splat(SMALLEST), self.mul(power, self.power(shifted)))
    }
}

/// A computation that is compiled once per instruction set.
///
/// `run` must be `inline(always)`, and so must be all that it calls with vectors: then it is compiled into [`Simd::call`].
pub(crate) trait Kernel {
    /// What comes out.
    type Output;
    /// Does it.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Runs a kernel with the instructions of `set`, which the machine must have.
#[allow(unsafe_code, reason = "only who looked at the machine may claim its instructions")]
pub(crate) fn dispatch<K: Kernel>(set: InstructionSet, kernel: K) -> K::Output {
    debug_assert!(InstructionSet::available().contains(&set), "this machine does not have {set}");
    match set {
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx512 => {
            // SAFETY: `InstructionSet::available` listed it: that is what callers of this function checked.
            let s = unsafe { avx512::Avx512::new() };
            s.call(kernel)
        }
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx2 => {
            // SAFETY: as above.
            let s = unsafe { avx2::Avx2::new() };
            s.call(kernel)
        }
        _ => Portable.call(kernel),
    }
}

#[cfg(test)]
mod tests;
