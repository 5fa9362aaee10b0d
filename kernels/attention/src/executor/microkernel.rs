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

/// Parts of a head that are asked for in turn. In heads of 16 KiB and more each lies in a page of its own, where the processor's
/// own prefetcher goes on by itself: several pages at once keep more lines on their way than one after the other. When a head's
/// lines are no multiple of this, up to three are left to the processor.
const STREAMS: usize = 4;

/// The head that comes next, asked for line by line while this one is computed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ahead {
    start: usize,
    /// Lines of each stream.
    stream_lines: usize,
    /// Lines that were asked for before.
    done: usize,
}

impl Ahead {
    /// Some bytes at `start`, which nobody need have yet.
    #[inline(always)]
    pub(super) fn new(start: usize, bytes: usize) -> Self {
        Self { start, stream_lines: bytes / (LINE * STREAMS), done: 0 }
    }

    /// The same after the lines of so many bytes.
    #[inline(always)]
    pub(super) fn after(self, bytes: usize) -> Self {
        Self { done: self.done + bytes / LINE, ..self }
    }

    /// Asks for the line with this number, counted from those before.
    #[inline(always)]
    fn ask<S: Simd>(self, s: S, line: usize) {
        s.prefetch(std::ptr::without_provenance(self.address(line)));
    }

    /// Asks for the lines of so many bytes at once.
    #[inline(always)]
    pub(super) fn ask_for<S: Simd>(self, s: S, bytes: usize) {
        (0..bytes / LINE).for_each(|line| self.ask(s, line));
    }

    #[inline(always)]
    fn address(self, line: usize) -> usize {
        let line = self.done + line;
        self.start.wrapping_add((line % STREAMS * self.stream_lines + line / STREAMS) * LINE)
    }
}

/// Sums of `R` rows and `P` panels: `factor(i, row) * panels[panel][i]`, one chain of fused multiply-adds over `i` in order
/// from 0 on. As many cache lines `ahead` are asked for as the panels have.
#[inline(always)]
pub(crate) fn products<S: Simd, E: Element, const R: usize, const P: usize>(
    s: S,
    panels: [&[[E; LANES]]; P],
    factor: impl Fn(usize, usize) -> f32,
    ahead: Option<Ahead>,
) -> [[S::F32s; P]; R] {
    match ahead {
        Some(ahead) if S::PREFETCHES => {
            multiply::<S, E, R, P>(s, panels, factor, |i| {
                // In a steady order, and a few at a time, as the queues of the memory like it.
                let lines = const { (P * size_of::<[E; LANES]>()).div_ceil(LINE) };
                let bytes = i * P * size_of::<[E; LANES]>();
                if bytes.is_multiple_of(LINE) {
                    (0..lines).for_each(|line| ahead.ask(s, bytes / LINE + line));
                }
            })
        }
        _ => multiply::<S, E, R, P>(s, panels, factor, |_| {}),
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
fn multiply<S: Simd, E: Element, const R: usize, const P: usize>(
    s: S,
    panels: [&[[E; LANES]]; P],
    factor: impl Fn(usize, usize) -> f32,
    ask: impl Fn(usize),
) -> [[S::F32s; P]; R] {
    let steps = panels[0].len();
    let panels = panels.map(|panel| &panel[..steps]);
    let mut sums = [[s.splat(0.0); P]; R];
    for i in 0..steps {
        let mut lanes = [s.splat(0.0); P];
        for (panel, lane) in panels.iter().zip(&mut lanes) {
            *lane = E::load(s, &panel[i]);
        }
        ask(i);
        for (r, sums) in sums.iter_mut().enumerate() {
            let factor = s.splat(factor(i, r));
            for (sum, &lane) in sums.iter_mut().zip(&lanes) {
                *sum = s.fma(factor, lane, *sum);
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_of_the_next_head_is_asked_for_once() {
        // K, V and scales of f16 and int8 heads of 64 and 80 elements.
        for (k, v, scales) in [(8192, 8192, 0), (4096, 4096, 512), (10_240, 10_240, 0), (5120, 5120, 512)] {
            let start = 1 << 20;
            let ahead = Ahead::new(start, k + v + scales);
            let parts = [(ahead, k), (ahead.after(k), v), (ahead.after(k).after(v), scales)];
            let each =
                parts.iter().flat_map(|(ahead, bytes)| (0..bytes / LINE).map(|line| ahead.address(line)));
            let mut asked: Vec<usize> = each.collect();
            assert_eq!(asked[1] - asked[0], (k + v + scales) / STREAMS, "the next line is another stream's");
            asked.sort_unstable();
            let all: Vec<usize> = (start..start + k + v + scales).step_by(LINE).collect();
            assert_eq!(asked, all);
        }
    }
}
