//! The likeliest tokens of rows, chosen on the device: a few kilobytes come back in place of all logits.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use longshore_model::Likeliest;

use super::compute::{Compute, number};
use crate::{Buffer, Device, Error, Span};

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

/// A row whose logits are not all finite: the first token of such.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Broken {
    pub(super) token: usize,
}

/// What comes back of some rows, side by side in one buffer: one copy brings all of it.
struct Results {
    buffer: Buffer,
    rows: usize,
    spans: usize,
    keep: usize,
}

impl Results {
    fn new(device: &Arc<dyn Device>, [rows, spans, keep]: [usize; 3]) -> Result<Self, Error> {
        let buffer = Buffer::new(device, rows * Self::row_bytes(spans, keep))?;
        Ok(Self { buffer, rows, spans, keep })
    }

    /// Candidates, and of each span its largest logit with the sum, and the first token that is not finite.
    fn row_bytes(spans: usize, keep: usize) -> usize {
        keep * size_of::<u64>() + spans * (2 * size_of::<f32>() + size_of::<u32>())
    }

    /// u64 `[rows, keep]`.
    fn best(&self) -> Result<Span<'_>, Error> {
        self.buffer.span(0, self.rows * self.keep * size_of::<u64>())
    }

    /// f32 `[rows, spans, 2]`.
    fn sums(&self) -> Result<Span<'_>, Error> {
        let all = self.rows * self.spans * 2 * size_of::<f32>();
        self.buffer.span(self.rows * self.keep * size_of::<u64>(), all)
    }

    /// u32 `[rows, spans]`.
    fn broken(&self) -> Result<Span<'_>, Error> {
        let all = self.rows * self.spans * size_of::<u32>();
        self.buffer.span(self.buffer.bytes() - all, all)
    }

    fn read(&self) -> Result<Vec<Result<Likeliest, Broken>>, Error> {
        let bytes: Vec<u8> = self.buffer.to_vec()?;
        let (best, rest) = bytes.split_at(self.best()?.bytes());
        let (sums, broken) = rest.split_at(self.sums()?.bytes());
        let (best, sums, broken) = (numbers::<u64>(best), numbers::<[f32; 2]>(sums), numbers::<u32>(broken));
        let (keep, spans) = (self.keep, self.spans);
        let row = |row: usize| {
            let broken = broken[row * spans..][..spans].iter().find(|token| **token != u32::MAX);
            if let Some(&token) = broken {
                return Err(Broken { token: token as usize });
            }
            let best = best[row * keep..][..keep].iter().map(|candidate| decoded(*candidate)).collect();
            Ok(Likeliest { best, log_sum_exp: log_sum_exp(&sums[row * spans..][..spans]) })
        };
        Ok((0..self.rows).map(row).collect())
    }
}

fn numbers<T: Pod>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

impl Compute {
    /// The `keep` likeliest of `count` logits of each row, f32 `[rows, count]`; waits for them, by one copy of `8 keep + 12` bytes a row and
    /// 12 more for every further 2,048 logits.
    pub(super) fn choose(
        &self,
        logits: Span<'_>,
        rows: usize,
        count: usize,
        keep: usize,
    ) -> Result<Vec<Result<Likeliest, Broken>>, Error> {
        if rows == 0 {
            return Ok(Vec::new());
        }
        let spans = count.div_ceil(SPAN);
        let results = Results::new(&self.device, [rows, spans, keep])?;
        let words = [rows, spans];
        let argument = ChooseParams {
            from: logits.for_kernel("logits", &[rows, count], size_of::<f32>())?,
            best: 0,
            sums: results.sums()?.for_kernel("sums", &words, 2 * size_of::<f32>())?,
            broken: results.broken()?.for_kernel("broken", &words, size_of::<u32>())?,
            count: number(count, "count")?,
            keep: number(keep, "keep")?,
        };
        // Candidates of the spans of one level are the numbers of the next, until there is one span: its are the results.
        let (mut from, mut level) = (None, spans);
        loop {
            let scratch = match level {
                1 => None,
                _ => Some(Buffer::new(&self.device, rows * level * keep * size_of::<u64>())?),
            };
            let best = scratch.as_ref().map_or_else(|| results.best(), |scratch| Ok(scratch.whole()))?;
            let best = best.for_kernel("best", &[rows, level, keep], size_of::<u64>())?;
            self.choose_level(ChooseParams { best, ..argument }, from.as_ref(), [rows, level])?;
            let Some(scratch) = scratch else { break };
            from = Some((scratch, level * keep));
            level = (level * keep).div_ceil(SPAN);
        }
        results.read()
    }

    /// Queues one level: of logits, or of so many candidates of each row.
    fn choose_level(
        &self,
        argument: ChooseParams,
        from: Option<&(Buffer, usize)>,
        [rows, spans]: [usize; 2],
    ) -> Result<(), Error> {
        let shared = SPAN * size_of::<u64>() + 2 * THREADS as usize / 32 * size_of::<f32>();
        let (mut kernel, mut argument) = (&self.programs.choose_logits, argument);
        if let Some((candidates, count)) = from {
            kernel = &self.programs.choose_candidates;
            argument.from = candidates.whole().for_kernel("from", &[rows, *count], size_of::<u64>())?;
            argument.count = number(*count, "count")?;
        }
        self.launch(kernel, [spans, rows, 1], THREADS, shared, &argument)
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
    fn a_row_of_a_large_vocabulary_comes_back_as_less_than_a_kilobyte() {
        let logits: usize = 128_256;
        assert_eq!(Results::row_bytes(logits.div_ceil(SPAN), 1), 764, "in place of 513,024");
    }

    #[test]
    fn sums_of_spans_are_the_sum() {
        let found = log_sum_exp(&[[1.0, 2.0], [-200.0, 5.0], [3.0, 1.5]]);
        let expected = (2.0 * 1f64.exp() + 1.5 * 3f64.exp()).ln();
        assert!((found - expected).abs() < 1e-12, "{found} must be {expected}");
    }
}
