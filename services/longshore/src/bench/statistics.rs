//! Order statistics of measurements.

use serde::Serialize;

/// Median, 90th and 99th percentile, and the mean, of times in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Summary {
    /// Samples.
    pub(super) count: usize,
    /// Mean.
    pub(super) mean: f64,
    /// Median.
    pub(super) p50: f64,
    /// 90th percentile.
    pub(super) p90: f64,
    /// 99th percentile.
    pub(super) p99: f64,
    /// Largest.
    pub(super) max: f64,
}

impl Summary {
    /// Sorts and reads off nearest-rank percentiles.
    pub(super) fn of(mut samples: Vec<f64>) -> Self {
        if samples.is_empty() {
            return Self::default();
        }
        samples.sort_by(f64::total_cmp);
        let rank = |share| nearest_rank(&samples, share);
        Self {
            count: samples.len(),
            mean: samples.iter().sum::<f64>() / samples.len() as f64,
            p50: rank(0.5),
            p90: rank(0.9),
            p99: rank(0.99),
            max: samples[samples.len() - 1],
        }
    }
}

/// The middle of a few samples, and all of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct Spread {
    /// Median.
    pub(super) median: f64,
    /// Smallest.
    pub(super) min: f64,
    /// Largest.
    pub(super) max: f64,
    /// In the order in which they were taken.
    pub(super) samples: Vec<f64>,
}

impl Spread {
    /// Keeps the samples; all figures are 0 when there are none.
    pub(super) fn of(samples: Vec<f64>) -> Self {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let (Some(&min), Some(&max)) = (sorted.first(), sorted.last()) else { return Self::default() };
        Self { median: nearest_rank(&sorted, 0.5), min, max, samples }
    }

    /// The same in another unit, such as tokens a second out of seconds.
    pub(super) fn map(&self, unit: impl Fn(f64) -> f64) -> Self {
        Self::of(self.samples.iter().copied().map(unit).collect())
    }
}

/// The sample that `share` of all do not exceed; `sorted` is ascending and not empty.
fn nearest_rank(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len()) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_keeps_its_samples() {
        let spread = Spread::of(vec![4.0, 1.0, 2.0]);
        assert_eq!((spread.median, spread.min, spread.max), (2.0, 1.0, 4.0));
        assert_eq!(spread.samples, [4.0, 1.0, 2.0]);
        assert_eq!(spread.map(|seconds| 8.0 / seconds).median, 4.0);
        assert_eq!(Spread::of(Vec::new()), Spread::default());
    }

    #[test]
    fn percentiles_are_nearest_rank() {
        let summary = Summary::of((1..=100).rev().map(f64::from).collect());
        assert_eq!((summary.p50, summary.p90, summary.p99, summary.max), (50.0, 90.0, 99.0, 100.0));
        assert_eq!(Summary::of(vec![7.0]).p99, 7.0);
        assert_eq!(Summary::of(Vec::new()), Summary::default());
    }
}
