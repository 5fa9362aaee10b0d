//! Comparisons with the CPU, for any device: the self-test runs them on a GPU, the tests of the crate on the emulator.

mod choose;
mod heads;
mod linear;
pub(crate) mod tiny;

use std::sync::Arc;

use longshore_model::Error;

use super::programs::Precision;
use crate::Device;
use crate::selftest::Case;

/// A comparison whose distance is at most `limit`; 0 asks for the same bits.
fn case(
    name: impl Into<String>,
    limit: f64,
    run: impl Fn(&Arc<dyn Device>) -> Result<f64, Error> + Send + Sync + 'static,
) -> Case {
    Case::new(name, limit, move |device| run(device).map_err(told))
}

/// A fault of a backend as one of the device.
pub(crate) fn told(error: Error) -> crate::Error {
    match error {
        Error::Device { source, .. } => match source.downcast::<crate::Error>() {
            Ok(error) => *error,
            Err(other) => crate::Error::Device { call: "the forward pass", problem: other.to_string() },
        },
        other => crate::Error::Device { call: "the forward pass", problem: other.to_string() },
    }
}

/// Every comparison of the forward pass.
pub(crate) fn cases() -> Vec<Case> {
    [linear::cases(), heads::cases(), choose::cases(), tiny::cases()].into_iter().flatten().collect()
}

impl Precision {
    /// Largest relative L2 distance of linear layers and of logits from the CPU's.
    pub(crate) fn bound(self) -> f64 {
        match self {
            Self::F32 => 1e-5,
            Self::F16 => 2e-3,
            Self::Bf16 => 8e-3,
        }
    }
}

/// Numbers in [-1, 1), the same for the same seed (SplitMix64).
fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) >> 40
    };
    (0..count).map(|_| next() as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// Relative L2 distance; infinite where lengths differ or something is no number.
pub(crate) fn distance(found: &[f32], expected: &[f64]) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let error: f64 = found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    let norm: f64 = expected.iter().map(|x| x * x).sum();
    let distance = (error / norm.max(f64::MIN_POSITIVE)).sqrt();
    if distance.is_nan() { f64::INFINITY } else { distance }
}

pub(crate) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().copied().map(f64::from).collect()
}

/// 0 for the same bits (NaN is equal to NaN), else infinity.
fn same_bits(found: &[f32], expected: &[f32]) -> f64 {
    let equal = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    let same = found.len() == expected.len() && found.iter().zip(expected).all(equal);
    if same { 0.0 } else { f64::INFINITY }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_tell_what_differs() {
        assert_eq!(distance(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert!((distance(&[3.0, 4.5], &[3.0, 4.0]) - 0.1).abs() < 1e-12);
        assert_eq!(distance(&[f32::NAN], &[1.0]), f64::INFINITY);
        assert_eq!(distance(&[1.0], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(same_bits(&[0.0, f32::NAN], &[0.0, f32::NAN]), 0.0);
        assert_eq!(same_bits(&[0.0], &[-0.0]), f64::INFINITY);
        let numbers = random(10_000, 3);
        assert!(numbers.iter().all(|x| (-1.0..1.0).contains(x)));
        assert!(numbers.iter().sum::<f32>().abs() < 200.0 && numbers != random(10_000, 4));
    }
}
