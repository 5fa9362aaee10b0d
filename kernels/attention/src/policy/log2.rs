//! Logarithms with the same bits on every processor.

use std::f64::consts::{LN_2, SQRT_2};

/// log2 of `x`: −∞ of 0, NaN of what is negative. The error is below one unit in the last place of f32.
///
/// The mantissa lies in [√½, √2), and its logarithm is the series of 2 artanh((m − 1) / (m + 1)), in f64: additions,
/// multiplications and divisions only, each exactly rounded.
pub(super) fn log2(x: f32) -> f32 {
    if !(x > 0.0 && x < f32::INFINITY) {
        return match x {
            0.0 => f32::NEG_INFINITY,
            f32::INFINITY => x,
            _ => f32::NAN,
        };
    }
    let bits = f64::from(x).to_bits();
    let mut exponent = (bits >> 52) as i64 - 1023;
    let mut mantissa = f64::from_bits((bits & ((1 << 52) - 1)) | 1.0_f64.to_bits());
    if mantissa > SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    let y = (mantissa - 1.0) / (mantissa + 1.0);
    let square = y * y;
    // 1 + y²/3 + y⁴/5 + …; y² is below 0.03.
    let series = (0..8).rev().fold(0.0, |sum, k| sum * square + 1.0 / f64::from(2 * k + 1));
    (exponent as f64 + 2.0 * y * series / LN_2) as f32
}

#[cfg(test)]
mod tests {
    use super::log2;

    #[test]
    fn equals_the_logarithm() {
        let mut x = 1e-40_f32;
        while x < 1e38 {
            let exact = f64::from(x).log2();
            let error = (f64::from(log2(x)) - exact).abs();
            assert!(error <= exact.abs() * 6.1e-8 + 1e-12, "log2({x:e}) = {} is off by {error:e}", log2(x));
            x *= 1.013;
        }
        for n in -126..128 {
            assert_eq!(log2(2.0_f32.powi(n)), n as f32);
        }
    }

    #[test]
    fn edges() {
        assert_eq!(log2(0.0), f32::NEG_INFINITY);
        assert_eq!(log2(f32::INFINITY), f32::INFINITY);
        assert!(log2(-1.0).is_nan() && log2(f32::NAN).is_nan());
    }
}
