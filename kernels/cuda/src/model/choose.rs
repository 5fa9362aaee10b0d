//! The likeliest tokens of rows, chosen on the device: a few kilobytes come back in place of all logits.

use bytemuck::{Pod, Zeroable};

use super::compute::{Compute, number};
use crate::{Buffer, Error};

/// Logits, or candidates, that a block puts in order.
const SPAN: usize = 2048;
const THREADS: u32 = 256;
/// Most candidates of a row.
pub(super) const CANDIDATES: usize = 1024;

/// `Choose` of `choose.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ChooseParams {
    from: u64,
    best: u64,
    sums: u64,
    broken: u64,
    count: u32,
    keep: u32,
}

/// What a sampler needs of a row of logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Likeliest {
    /// The likeliest tokens with their logits, best first; of equals the lowest first.
    pub best: Vec<(u32, f32)>,
    /// `ln Σ exp(logit)` over all of them.
    pub log_sum_exp: f64,
}

/// What is known of a row whose logits are not all finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Broken {
    pub(super) row: usize,
    pub(super) token: usize,
}

impl Compute {
    /// The `keep` likeliest of `count` logits of each row, f32 `[rows, count]`.
    pub(super) fn choose(
        &self,
        logits: &Buffer,
        rows: usize,
        count: usize,
        keep: usize,
    ) -> Result<Result<Vec<Likeliest>, Broken>, Error> {
        let spans = count.div_ceil(SPAN);
        let sums = Buffer::new(&self.device, rows * spans * 8)?;
        let broken = Buffer::new(&self.device, rows * spans * 4)?;
        let mut best = Buffer::new(&self.device, rows * spans * keep * 8)?;
        let argument = ChooseParams {
            from: logits.address(),
            best: best.address(),
            sums: sums.address(),
            broken: broken.address(),
            count: number(count, "count")?,
            keep: number(keep, "keep")?,
        };
        let shared = SPAN * 8 + 2 * THREADS as usize / 32 * 4;
        self.launch(&self.programs.choose_logits, [spans, rows, 1], THREADS, shared, &argument)?;
        let mut left = spans;
        while left > 1 {
            let (from, spans) = (best, (left * keep).div_ceil(SPAN));
            best = Buffer::new(&self.device, rows * spans * keep * 8)?;
            let argument = ChooseParams {
                from: from.address(),
                best: best.address(),
                count: number(left * keep, "count")?,
                ..argument
            };
            self.launch(&self.programs.choose_candidates, [spans, rows, 1], THREADS, shared, &argument)?;
            left = spans;
        }
        let broken: Vec<u32> = broken.to_vec()?;
        if let Some(at) = broken.iter().position(|token| *token != u32::MAX) {
            return Ok(Err(Broken { row: at / spans, token: broken[at] as usize }));
        }
        let (best, sums): (Vec<u64>, Vec<[f32; 2]>) = (best.to_vec()?, sums.to_vec()?);
        let rows = best.chunks_exact(keep).zip(sums.chunks_exact(spans));
        let likeliest = |(best, sums): (&[u64], &[[f32; 2]])| Likeliest {
            best: best.iter().map(|candidate| decoded(*candidate)).collect(),
            log_sum_exp: log_sum_exp(sums),
        };
        Ok(Ok(rows.map(likeliest).collect()))
    }
}

/// Token and logit of a candidate, see `choose.cu`.
fn decoded(candidate: u64) -> (u32, f32) {
    let (ordered, token) = ((candidate >> 32) as u32, !(candidate as u32));
    let bits = if ordered >> 31 == 1 { ordered & 0x7fff_ffff } else { !ordered };
    (token, f32::from_bits(bits))
}

/// Of the largest logit and the sum of each span.
fn log_sum_exp(spans: &[[f32; 2]]) -> f64 {
    let largest = spans.iter().fold(f64::NEG_INFINITY, |largest, [max, _]| largest.max(f64::from(*max)));
    let parts = spans.iter().map(|[max, sum]| f64::from(*sum) * (f64::from(*max) - largest).exp());
    largest + parts.sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_carry_token_and_logit() {
        let candidate = |ordered: u32, token: u32| u64::from(ordered) << 32 | u64::from(!token);
        assert_eq!(decoded(candidate(2.5f32.to_bits() | 1 << 31, 7)), (7, 2.5));
        assert_eq!(decoded(candidate(!(-2.5f32).to_bits(), 0)), (0, -2.5));
        assert_eq!(decoded(candidate(1 << 31, u32::MAX - 1)), (u32::MAX - 1, 0.0));
    }

    #[test]
    fn sums_of_spans_are_the_sum() {
        let found = log_sum_exp(&[[1.0, 2.0], [-200.0, 5.0], [3.0, 1.5]]);
        let expected = (2.0 * 1f64.exp() + 1.5 * 3f64.exp()).ln();
        assert!((found - expected).abs() < 1e-12, "{found} must be {expected}");
    }
}
