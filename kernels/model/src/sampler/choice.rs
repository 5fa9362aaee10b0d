//! Choosing from adjusted logits. Sums are in f64 and in a fixed order, so that a choice never depends on the machine's load.

use std::cmp::Ordering;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};

use super::SamplerParams;

/// Separates these draws from any other use of a request's seed; the first 8 bytes of the key are the seed.
const KEY_CONTEXT: &[u8; 24] = b"longshore token draw, v1";

/// ChaCha counts its stream in 32-bit words; each index has a block of 16 of them to itself.
const WORDS_PER_INDEX: u128 = 16;

/// Candidates that a nucleus is looked for in at first; grows until they suffice.
const FIRST_CANDIDATES: usize = 256;

/// A token and its weight, relative to the likeliest token's 1.
type Candidate = (u32, f64);

/// The number in [0, 1) that belongs to (seed, index).
pub(super) fn uniform(seed: u64, index: u64) -> f64 {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..].copy_from_slice(KEY_CONTEXT);
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_word_pos(u128::from(index) * WORDS_PER_INDEX);
    (rng.next_u64() >> 11) as f64 * (1.0 / (1_u64 << 53) as f64)
}

/// The likeliest token; of equals the one with the lowest id.
pub(super) fn greedy(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best as u32
}

/// The `n` likeliest tokens, best first; equals by id.
pub(super) fn best(logits: &[f32], n: usize) -> Vec<u32> {
    let n = n.min(logits.len());
    if n == 0 {
        return Vec::new();
    }
    let order = |a: &u32, b: &u32| likelier(logits[*a as usize], *a, logits[*b as usize], *b);
    let mut tokens: Vec<u32> = (0..logits.len() as u32).collect();
    if n < tokens.len() {
        tokens.select_nth_unstable_by(n - 1, order);
        tokens.truncate(n);
    }
    tokens.sort_unstable_by(order);
    tokens
}

/// `ln Σ exp(logit)`.
pub(super) fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = maximum(logits);
    max + logits.iter().map(|logit| (f64::from(*logit) - max).exp()).sum::<f64>().ln()
}

/// Draws by `uniform` in [0, 1) from what temperature, top-k, top-p and min-p leave.
pub(super) fn draw(logits: &[f32], params: &SamplerParams, uniform: f64) -> u32 {
    let kept = survivors(logits, params);
    let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
    let target = uniform * total;
    let mut sum = 0.0;
    for (token, weight) in &kept {
        sum += weight;
        if sum > target {
            return *token;
        }
    }
    // Unreachable unless rounding makes the target the sum itself: then the last that has any weight.
    kept.iter().rev().find(|(_, weight)| *weight > 0.0).map_or_else(|| greedy(logits), |(token, _)| *token)
}

/// Tokens that may be drawn with their weights; never empty.
pub(super) fn survivors(logits: &[f32], params: &SamplerParams) -> Vec<Candidate> {
    let (max, temperature) = (maximum(logits), f64::from(params.temperature));
    let weight = |logit: f32| ((f64::from(logit) - max) / temperature).exp();
    let weigh =
        |tokens: Vec<u32>| tokens.into_iter().map(|t| (t, weight(logits[t as usize]))).collect::<Vec<_>>();
    let top_k = match params.top_k as usize {
        0 => logits.len(),
        k => k.min(logits.len()),
    };
    let mut kept = if params.top_p < 1.0 {
        nucleus(logits, top_k, f64::from(params.top_p), weigh)
    } else if top_k < logits.len() {
        weigh(best(logits, top_k))
    } else {
        weigh((0..logits.len() as u32).collect())
    };
    let floor = f64::from(params.min_p);
    if floor > 0.0 {
        kept.retain(|(_, weight)| *weight >= floor);
    }
    kept
}

/// The likeliest of the first `top_k` tokens whose weights reach `top_p` of those of all `top_k`.
fn nucleus(
    logits: &[f32],
    top_k: usize,
    top_p: f64,
    weigh: impl Fn(Vec<u32>) -> Vec<Candidate>,
) -> Vec<Candidate> {
    let everything = if top_k < logits.len() { best(logits, top_k) } else { (0..top_k as u32).collect() };
    let limit = top_p * weigh(everything).iter().map(|(_, weight)| weight).sum::<f64>();
    let mut n = FIRST_CANDIDATES.min(top_k);
    loop {
        let mut kept = weigh(best(logits, n));
        let mut sum = 0.0;
        let reached = kept.iter().position(|(_, weight)| {
            sum += weight;
            sum >= limit
        });
        if let Some(last) = reached {
            kept.truncate(last + 1);
            return kept;
        }
        if n == top_k {
            return kept;
        }
        n = (n * 8).min(top_k);
    }
}

fn maximum(logits: &[f32]) -> f64 {
    f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max))
}

/// Orders by descending logit, then by ascending token; zeros of both signs are equal.
fn likelier(a: f32, a_token: u32, b: f32, b_token: u32) -> Ordering {
    b.partial_cmp(&a).unwrap_or(Ordering::Equal).then(a_token.cmp(&b_token))
}
