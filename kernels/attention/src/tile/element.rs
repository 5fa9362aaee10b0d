//! The element types of tiles: how an f32 becomes one, and how vectors of them become f32 again.

use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::KvDtype;
use crate::shape::LANES;
use crate::simd::Simd;

/// An element of K or V in a tile.
pub(crate) trait Element: Pod {
    /// Its type by name.
    const DTYPE: KvDtype;
    /// Whether it counts in units of a scale.
    const SCALED: bool = false;

    /// Rounds some numbers, `from.len()` of them; gives their scale, 1 where there is none.
    fn narrow(from: &[f32], to: &mut [Self]) -> f32;
    /// Its number, exactly, in units of the scale.
    fn widen(self) -> f32;
    /// 16 of them.
    fn load<S: Simd>(s: S, lane: &[Self; LANES]) -> S::F32s;
    /// Whether all are numbers, neither infinite nor NaN. Looks at the bits of each without an early end, so that the compiler takes
    /// many at a time: every tile that a shard takes goes through this.
    fn are_finite(lanes: &[[Self; LANES]]) -> bool;
}

impl Element for f32 {
    const DTYPE: KvDtype = KvDtype::F32;

    fn narrow(from: &[f32], to: &mut [Self]) -> f32 {
        to.copy_from_slice(from);
        1.0
    }

    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, lane: &[Self; LANES]) -> S::F32s {
        s.load(lane)
    }

    fn are_finite(lanes: &[[Self; LANES]]) -> bool {
        lanes.as_flattened().iter().fold(0, |top: u32, x| top.max(x.to_bits() & 0x7fff_ffff)) < 0x7f80_0000
    }
}

impl Element for f16 {
    const DTYPE: KvDtype = KvDtype::F16;

    fn narrow(from: &[f32], to: &mut [Self]) -> f32 {
        to.convert_from_f32_slice(from);
        for x in to.iter_mut().filter(|x| x.is_infinite()) {
            *x = if x.is_sign_negative() { Self::MIN } else { Self::MAX };
        }
        1.0
    }

    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, lane: &[Self; LANES]) -> S::F32s {
        s.widen_f16(lane)
    }

    fn are_finite(lanes: &[[Self; LANES]]) -> bool {
        lanes.as_flattened().iter().fold(0, |top: u16, x| top.max(x.to_bits() & 0x7fff)) < 0x7c00
    }
}

impl Element for bf16 {
    const DTYPE: KvDtype = KvDtype::Bf16;

    fn narrow(from: &[f32], to: &mut [Self]) -> f32 {
        to.convert_from_f32_slice(from);
        for x in to.iter_mut().filter(|x| x.is_infinite()) {
            *x = if x.is_sign_negative() { Self::MIN } else { Self::MAX };
        }
        1.0
    }

    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, lane: &[Self; LANES]) -> S::F32s {
        s.widen_bf16(lane)
    }

    fn are_finite(lanes: &[[Self; LANES]]) -> bool {
        lanes.as_flattened().iter().fold(0, |top: u16, x| top.max(x.to_bits() & 0x7fff)) < 0x7f80
    }
}

impl Element for i8 {
    const DTYPE: KvDtype = KvDtype::Int8;
    const SCALED: bool = true;

    fn narrow(from: &[f32], to: &mut [Self]) -> f32 {
        if from.iter().any(|x| x.is_nan()) {
            to.fill(0);
            return f32::NAN;
        }
        let largest = from.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
        let scale = largest.min(f32::MAX) / 127.0;
        for (to, &from) in to.iter_mut().zip(from) {
            // Of an infinite ratio the cast makes −128 or 127.
            let steps = if scale == 0.0 { 0.0 } else { (from / scale).round_ties_even() };
            *to = (steps as Self).max(-127);
        }
        scale
    }

    fn widen(self) -> f32 {
        f32::from(self)
    }

    #[inline(always)]
    fn load<S: Simd>(s: S, lane: &[Self; LANES]) -> S::F32s {
        s.widen_i8(lane)
    }

    fn are_finite(_: &[[Self; LANES]]) -> bool {
        true
    }
}
