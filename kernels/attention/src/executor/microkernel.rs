//! The inner loops: a few query rows against 16 keys or 16 columns at a time, held in registers.
//!
//! Everything here is `inline(always)`, so that it is compiled with the vector instructions of whoever dispatched it.
//! There are no reductions across lanes but the one of `l`, and no arithmetic that the compiler may reorder: scalar and
//! vector code give the same bits.

use crate::exp2::exp2;
use crate::shape::LANES;
use crate::tile::Lane;

use super::block::{Block, MAX_KEYS};

/// Logits, then probabilities, of `R` rows.
pub(super) type Scores<const R: usize> = [[f32; MAX_KEYS]; R];

/// Logits of `R` rows (`q` is `[head_dim][R]`) against the first `panels` panels of keys.
#[inline(always)]
pub(super) fn logits<const R: usize>(
    q: &[[f32; R]],
    block: &Block<'_>,
    scale: f32,
    panels: usize,
    scores: &mut Scores<R>,
) {
    for (panel, k) in block.k.chunks_exact(q.len()).take(panels.min(MAX_KEYS / LANES)).enumerate() {
        let mut sums = [[0.0_f32; LANES]; R];
        for (q, k) in q.iter().zip(k) {
            for r in 0..R {
                for i in 0..LANES {
                    sums[r][i] = q[r].mul_add(k[i], sums[r][i]);
                }
            }
        }
        let bias: Lane = block.bias.as_chunks().0.get(panel).copied().unwrap_or([0.0; LANES]);
        for r in 0..R {
            for i in 0..LANES {
                scores[r][panel * LANES + i] = sums[r][i].mul_add(scale, bias[i]);
            }
        }
    }
}

/// Turns logits (−∞ where a key is not seen) into probabilities; gives (m, l).
#[inline(always)]
pub(super) fn soften(scores: &mut [Lane]) -> (f32, f32) {
    let mut tops = [f32::NEG_INFINITY; LANES];
    for lane in scores.iter() {
        for i in 0..LANES {
            tops[i] = if lane[i] > tops[i] { lane[i] } else { tops[i] };
        }
    }
    let top = tops.iter().fold(f32::NEG_INFINITY, |top, &t| if t > top { t } else { top });
    if top == f32::NEG_INFINITY {
        return (top, 0.0);
    }
    // Of two zeros either may be found first: + 0 makes −0 the other.
    let top = top + 0.0;
    let mut sums = [0.0_f32; LANES];
    for lane in scores.iter_mut() {
        for i in 0..LANES {
            lane[i] = exp2(lane[i] - top);
            sums[i] += lane[i];
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    (top, sums[0])
}

/// Which keys the rows of a group see.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen<const R: usize> {
    /// Each row's position.
    pub(super) positions: [u64; R],
    /// Keys before this one are seen by all rows.
    pub(super) common: usize,
    /// Keys from this one on are seen by none.
    pub(super) end: usize,
}

/// `Σ p v` of `R` rows over one panel of 16 columns, keys in order.
#[inline(always)]
pub(super) fn outputs<const R: usize>(
    scores: &Scores<R>,
    panel: &[Lane],
    block: &Block<'_>,
    seen: &Seen<R>,
) -> [Lane; R] {
    let mut sums = [[0.0_f32; LANES]; R];
    for (key, v) in panel.iter().enumerate().take(seen.common.min(MAX_KEYS)) {
        for r in 0..R {
            for i in 0..LANES {
                sums[r][i] = scores[r][key].mul_add(v[i], sums[r][i]);
            }
        }
    }
    // Row by row, so that the sums of the loop above stay in registers.
    for r in 0..R {
        let mut sum = sums[r];
        for (key, v) in panel.iter().enumerate().take(seen.end.min(MAX_KEYS)).skip(seen.common) {
            if block.visibility.sees(seen.positions[r], key) {
                for i in 0..LANES {
                    sum[i] = scores[r][key].mul_add(v[i], sum[i]);
                }
            }
        }
        sums[r] = sum;
    }
    sums
}
