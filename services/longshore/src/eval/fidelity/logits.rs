//! Logits of sampled rows, and the likeliest token of every row.

use anyhow::Result;
use longshore_engine::Logits;
use serde::Serialize;

use crate::eval::{
    candidate::Candidate,
    samples::Quantiles,
    subject::{Subject, likeliest},
    watch::Watch,
};

/// What a prompt predicts.
#[derive(Debug)]
pub(super) struct LogitRows<'a> {
    sampled: &'a [u64],
    /// Of the sampled rows.
    logits: Vec<Vec<f32>>,
    /// Last hidden states of them.
    hidden: Vec<Vec<f32>>,
    /// Of all rows.
    top: Vec<u32>,
}

/// How far the predictions of a sparse prompt are from those of an exact one.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Drift {
    /// Relative L2 distance of the last hidden state, before the final norm, of sampled rows from the first sparse one on.
    pub(super) hidden: Quantiles,
    /// Relative L2 distance of centred logits, of sampled rows from the first sparse one on.
    pub(super) logits: Quantiles,
    /// KL divergence of the sparse distribution from the exact one, in nats, of the same rows.
    pub(super) kl: Quantiles,
    /// Share of all rows from the first sparse one on whose likeliest token is the same; 1 when there are none.
    pub(super) top1_agreement: f64,
    /// The same over all rows of the prompt, exact ones too.
    pub(super) top1_of_all: f64,
    /// Rows from the first sparse one on.
    pub(super) rows: usize,
}

impl<'a> LogitRows<'a> {
    /// Will keep the logits of these positions, ascending.
    pub(super) fn new(sampled: &'a [u64]) -> Self {
        Self { sampled, logits: Vec::new(), hidden: Vec::new(), top: Vec::new() }
    }

    /// Computes a prompt and keeps what it predicts; `watch` keeps the hidden states of the sampled rows.
    pub(super) fn read(
        &mut self,
        subject: &Subject,
        tokens: &[u32],
        candidate: &Candidate,
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        let mut keep = |first: u64, logits: &[f32]| {
            for (position, row) in (first..).zip(logits.chunks_exact(subject.vocabulary())) {
                self.top.push(likeliest(row));
                if self.sampled.binary_search(&position).is_ok() {
                    self.logits.push(row.to_vec());
                }
            }
            Ok(())
        };
        subject.prefill(tokens, candidate, &|_| Logits::All, &mut keep, watch)?;
        self.hidden = std::mem::take(&mut watch.hidden);
        Ok(())
    }

    /// Compares with an exact prompt of the same tokens.
    pub(super) fn drift(&self, exact: &Self, first_sparse: Option<u64>) -> Drift {
        let from = first_sparse.unwrap_or(u64::MAX);
        let (mut distances, mut divergences) = (Vec::new(), Vec::new());
        for ((position, ours), theirs) in self.sampled.iter().zip(&self.logits).zip(&exact.logits) {
            if *position >= from {
                distances.push(centred_distance(ours, theirs));
                divergences.push(divergence(theirs, ours));
            }
        }
        let late = self.sampled.partition_point(|position| *position < from);
        let hidden: Vec<f64> =
            self.hidden.iter().zip(&exact.hidden).skip(late).map(|(a, b)| distance(a, b)).collect();
        let first = from.min(self.top.len() as u64) as usize;
        Drift {
            hidden: Quantiles::of(&hidden),
            logits: Quantiles::of(&distances),
            kl: Quantiles::of(&divergences),
            top1_agreement: agreement(&self.top[first..], &exact.top[first..]),
            top1_of_all: agreement(&self.top, &exact.top),
            rows: self.top.len() - first,
        }
    }
}

/// Share of equal tokens; 1 when there are none.
fn agreement(ours: &[u32], theirs: &[u32]) -> f64 {
    let same = ours.iter().zip(theirs).filter(|(a, b)| a == b).count();
    if ours.is_empty() { 1.0 } else { same as f64 / ours.len() as f64 }
}

fn mean(row: &[f32]) -> f64 {
    row.iter().map(|x| f64::from(*x)).sum::<f64>() / row.len() as f64
}

/// |a − b| / |b|.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let distance: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let norm: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    if norm == 0.0 { distance.sqrt() } else { (distance / norm).sqrt() }
}

/// |(a − ā) − (b − b̄)| / |b − b̄|.
fn centred_distance(a: &[f32], b: &[f32]) -> f64 {
    let (a_mean, b_mean) = (mean(a), mean(b));
    let (mut distance, mut norm) = (0.0, 0.0);
    for (a, b) in a.iter().zip(b) {
        let (a, b) = (f64::from(*a) - a_mean, f64::from(*b) - b_mean);
        distance += (a - b).powi(2);
        norm += b.powi(2);
    }
    if norm == 0.0 { distance.sqrt() } else { (distance / norm).sqrt() }
}

/// ln Σ e^x.
pub(in crate::eval) fn log_sum(row: &[f32]) -> f64 {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    f64::from(top) + row.iter().map(|x| f64::from(x - top).exp()).sum::<f64>().ln()
}

/// Σ p ln(p / q), in nats, of the softmaxes of two rows.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let (p_sum, q_sum) = (log_sum(p), log_sum(q));
    let terms = p.iter().zip(q).map(|(p, q)| {
        let (p, q) = (f64::from(*p) - p_sum, f64::from(*q) - q_sum);
        p.exp() * (p - q)
    });
    terms.sum::<f64>().max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_those_of_the_definitions() {
        let (p, q) = ([0.0f32, 1.0, -2.0], [0.5f32, 0.5, 3.0]);
        let soft = |x: &[f32]| {
            let sum: f64 = x.iter().map(|x| f64::from(*x).exp()).sum();
            x.iter().map(|x| f64::from(*x).exp() / sum).collect::<Vec<_>>()
        };
        let right: f64 = soft(&p).iter().zip(soft(&q)).map(|(p, q)| p * (p / q).ln()).sum();
        assert!((divergence(&p, &q) - right).abs() < 1e-12);
        assert_eq!(divergence(&p, &p), 0.0);
        // A shift of all logits changes no prediction.
        let shifted = p.map(|x| x + 5.0);
        assert!(centred_distance(&shifted, &p) < 1e-6 && divergence(&shifted, &p) < 1e-6);
        assert!((centred_distance(&p.map(|x| 1.5 * x), &p) - 0.5).abs() < 1e-6);
    }

    #[test]
    fn agreement_counts_rows_from_the_first_sparse_one_on() {
        let sampled = [1, 3];
        let logits = vec![vec![1.0, 0.0], vec![0.0, 1.0]];
        let hidden = vec![vec![1.0, 0.0], vec![3.0, 4.0]];
        let exact = LogitRows { sampled: &sampled, logits: logits.clone(), hidden, top: vec![0, 1, 0, 1] };
        let moved = vec![vec![9.0, 9.0], vec![3.0, 3.0]];
        let ours = LogitRows { sampled: &sampled, logits, hidden: moved, top: vec![0, 1, 1, 1] };
        let drift = ours.drift(&exact, Some(2));
        assert_eq!((drift.top1_agreement, drift.rows, drift.kl.count), (0.5, 2, 1));
        assert_eq!(drift.top1_of_all, 0.75, "exact rows count there");
        assert_eq!((drift.hidden.count, drift.hidden.max), (1, 0.2));
        assert_eq!(ours.drift(&exact, None).top1_agreement, 1.0);
    }
}
