//! The inner loops: a few query rows against panels of 16 keys or 16 columns, sums held in registers.
//!
//! Everything here is `inline(always)`, so that it is compiled with the instructions of whoever called the kernel.

use crate::shape::LANES;
use crate::simd::Simd;
use crate::tile::Element;

use super::block::MAX_KEYS;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Rows whose sums lie in registers together, at most.
pub(crate) const GROUP: usize = 6;

/// Logits, then probabilities, of the rows of a group.
pub(super) type Scores = [[f32; MAX_KEYS]; GROUP];

/// Panels whose sums lie in registers together with those of `rows` rows.
pub(crate) const fn panels_at_once<S: Simd>(rows: usize) -> usize {
    match rows {
        _ if S::WIDE => 4,
        1 => 4,
        2 | 3 => 2,
        _ => 1,
    }
}

/// Sums of `R` rows and `P` panels: `factor(i, row) * panels[panel][i]`, one chain of fused multiply-adds over `i` in order
/// from 0 on. The panels lie one after the other; as many cache lines are asked for that lie `ahead` bytes from them, when
/// that is not 0.
#[inline(always)]
pub(crate) fn products<S: Simd, E: Element, const R: usize, const P: usize>(
    s: S,
    panels: [&[[E; LANES]]; P],
    factor: impl Fn(usize, usize) -> f32,
    ahead: isize,
) -> [[S::F32s; P]; R] {
    if S::PREFETCHES && ahead != 0 {
        multiply::<S, E, R, P, true>(s, panels, factor, ahead)
    } else {
        multiply::<S, E, R, P, false>(s, panels, factor, 0)
    }
}

/// [`products`] over the steps that are named, in order.
#[inline(always)]
pub(super) fn products_at<S: Simd, E: Element, const R: usize, const P: usize>(
    s: S,
    panels: [&[[E; LANES]]; P],
    steps: &[u8],
    factor: impl Fn(usize, usize) -> f32,
) -> [[S::F32s; P]; R] {
    let len = panels[0].len();
    let panels = panels.map(|panel| &panel[..len]);
    let mut sums = [[s.splat(0.0); P]; R];
    for i in steps.iter().map(|&step| usize::from(step)) {
        let mut lanes = [s.splat(0.0); P];
        for (panel, lane) in panels.iter().zip(&mut lanes) {
            *lane = E::load(s, &panel[i]);
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            let factor = s.splat(factor(i, r));
            for (sum, &lane) in sums.iter_mut().zip(&lanes) {
                *sum = s.fma(factor, lane, *sum);
            }
        }
    }
    sums
}

#[inline(always)]
fn multiply<S: Simd, E: Element, const R: usize, const P: usize, const AHEAD: bool>(
    s: S,
    panels: [&[[E; LANES]]; P],
    factor: impl Fn(usize, usize) -> f32,
    ahead: isize,
) -> [[S::F32s; P]; R] {
    let lines = const { (P * size_of::<[E; LANES]>()).div_ceil(LINE) };
    let next = panels[0].as_ptr().cast::<u8>().wrapping_offset(ahead);
    let steps = panels[0].len();
    let panels = panels.map(|panel| &panel[..steps]);
    let mut sums = [[s.splat(0.0); P]; R];
    for i in 0..steps {
        let mut lanes = [s.splat(0.0); P];
        for (panel, lane) in panels.iter().zip(&mut lanes) {
            *lane = E::load(s, &panel[i]);
        }
        if AHEAD {
            // In order, as the memory likes it, and a few at a time, as the queues do.
            for line in 0..lines {
                s.prefetch(next.wrapping_add(i * P * size_of::<[E; LANES]>() + line * LINE));
            }
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            let factor = s.splat(factor(i, r));
            for (sum, &lane) in sums.iter_mut().zip(&lanes) {
                *sum = s.fma(factor, lane, *sum);
            }
        }
    }
    sums
}
