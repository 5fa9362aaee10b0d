//! Powers of two in f32: the only transcendental function of the primitive, with the same bits on every processor.

use std::f32::consts::LN_2;

/// 1.5 × 2^23: adding it leaves the nearest integer in the low bits of the sum.
pub(crate) const ROUND: f32 = 12_582_912.0;
/// Below it powers are no normal numbers.
pub(crate) const SMALLEST: f32 = -126.0;
/// Of the polynomial, the highest power first.
pub(crate) const COEFFICIENTS: [f32; 7] =
    [1.535_336_2e-4, 1.339_887_5e-3, 9.618_437e-3, 5.550_332_4e-2, 2.402_264_8e-1, LN_2, 1.0];

/// 2^`x` for `x` ≤ 127, −∞ and NaN included. [`crate::simd::Simd::exp2`] does it on 16 lanes, bit for bit.
///
/// `x` is split into its nearest integer and a rest in [−½, ½], whose power is a polynomial of degree 6 (minimax of the
/// relative error, 2e-9 before rounding). The relative error of the result is below 1.2e-7 (two units in the last place
/// where it is worst). 2^0 is exactly 1, and results below the smallest normal number (2^−126), 2^−∞ among them, are
/// exactly 0. There is no call into a mathematics library, and every operation is an IEEE one that is exactly rounded.
#[inline(always)]
pub(crate) fn exp2(x: f32) -> f32 {
    let shifted = x + ROUND;
    let rest = x - (shifted - ROUND);
    let mut power = COEFFICIENTS[0];
    for &coefficient in &COEFFICIENTS[1..] {
        power = power.mul_add(rest, coefficient);
    }
    // The integer times 2^23 added to the bits of 1.0 is the power of that integer.
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    if x < SMALLEST { 0.0 } else { power * scale }
}

#[cfg(test)]
mod tests {
    use super::exp2;

    #[test]
    fn error_is_as_documented() {
        let mut worst = 0.0_f64;
        let mut x = 0.0_f32;
        while x >= -126.0 {
            let exact = f64::from(x).exp2();
            worst = worst.max((f64::from(exp2(x)) / exact - 1.0).abs());
            x -= 0.000_37;
        }
        assert!(worst < 1.2e-7, "relative error {worst:e}");
    }

    #[test]
    fn integers_are_exact() {
        for n in -126..=127 {
            assert_eq!(exp2(n as f32), 2.0_f32.powi(n), "2^{n}");
        }
        assert_eq!(exp2(-0.0), 1.0);
    }

    #[test]
    fn vanishes_below_normal_numbers_and_keeps_nan() {
        for x in [-126.0001, -127.0, -149.0, -1e4, -1e30, f32::MIN, f32::NEG_INFINITY] {
            assert_eq!(exp2(x).to_bits(), 0, "2^{x}");
        }
        assert!(exp2(f32::NAN).is_nan());
    }
}
