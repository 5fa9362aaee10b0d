//! Order statistics of errors.

use serde::Serialize;

/// Mean and nearest-rank quantiles of some samples; all 0 when there are none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Quantiles {
    pub(super) count: usize,
    pub(super) mean: f64,
    pub(super) p10: f64,
    pub(super) median: f64,
    pub(super) p95: f64,
    pub(super) max: f64,
}

impl Quantiles {
    /// Of samples in any order.
    pub(super) fn of<'a>(samples: impl IntoIterator<Item = &'a f64>) -> Self {
        let mut sorted: Vec<f64> = samples.into_iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        let Some(&max) = sorted.last() else { return Self::default() };
        let rank = |share: f64| sorted[((count as f64 * share).ceil() as usize).clamp(1, count) - 1];
        let mean = sorted.iter().sum::<f64>() / count as f64;
        Self { count, mean, p10: rank(0.1), median: rank(0.5), p95: rank(0.95), max }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_nearest_rank() {
        let samples: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        let q = Quantiles::of(&samples);
        assert_eq!((q.count, q.mean, q.p10, q.median, q.p95, q.max), (100, 50.5, 10.0, 50.0, 95.0, 100.0));
        assert_eq!(Quantiles::of(&[]), Quantiles::default());
    }
}
