//! Folds one block onto a few packed rows: logits, softmax, outputs.

use std::array;

use crate::shape::LANES;
use crate::simd::{Kernel, Lane, Simd};
use crate::tile::Element;

use super::block::{Block, MAX_KEYS, Visibility};
use super::microkernel::{GROUP, Scores, panels_at_once, products, products_at};
use super::state::{Change, take_in};

/// `R` rows and the block that is folded onto them. A kernel of its own, so that the compiler sees one size of group at a
/// time.
pub(super) struct FoldGroup<'a, 'b, E, const R: usize> {
    pub(super) block: &'a Block<'b, E>,
    /// `[head_dim][R]`.
    pub(super) q: &'a [[f32; R]],
    /// Scale of the logits, base 2.
    pub(super) scale: f32,
    /// A row leaves out a block of which no logit comes so near to its maximum (base 2); +∞: none.
    pub(super) skip_below: f32,
    /// Of each row; they ascend.
    pub(super) positions: &'a [u64],
    pub(super) m: &'a mut [f32],
    pub(super) l: &'a mut [f32],
    /// `[R][panels of the head]`.
    pub(super) o: &'a mut [Lane],
    pub(super) scores: &'a mut Scores,
}

/// Which keys of the block the rows see.
#[derive(Clone, Copy)]
struct Seen {
    /// Keys before this one are seen by all rows.
    common: usize,
    /// Keys from this one on are seen by none.
    end: usize,
}

impl<E: Element, const R: usize> Kernel for FoldGroup<'_, '_, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (first, last) = (self.positions[0], self.positions[R - 1]);
        let (keys, visibility) = (self.block.keys.min(MAX_KEYS), self.block.visibility);
        let seen = Seen { common: visibility.leading(first, keys), end: visibility.end(last, keys) };
        if seen.end == 0 {
            return;
        }
        let panels = seen.end.div_ceil(LANES);
        if let Some(ahead) = self.block.ahead.filter(|_| S::PREFETCHES && E::SCALED) {
            let head = &self.block.head;
            let lanes = size_of_val(head.k) + size_of_val(head.v);
            ahead.after(lanes).ask_for(s, size_of_val(head.k_scales) + size_of_val(head.v_scales));
        }
        let most = const { panels_at_once::<S>(R) };
        let mut panel = 0;
        while panel < panels {
            panel += match panels - panel {
                4.. if most >= 4 => self.logits::<S, 4>(s, panel),
                2.. if most >= 2 => self.logits::<S, 2>(s, panel),
                _ => self.logits::<S, 1>(s, panel),
            };
        }
        let mut tops = self.tops(s, panels, &seen);
        let may_skip = self.skip_below != f32::INFINITY;
        let skips = if may_skip { self.skips(&tops) } else { [false; R] };
        if may_skip && skips == [true; R] {
            return;
        }
        let sums = self.weigh(s, panels, &tops);
        if may_skip {
            for (top, _) in tops.iter_mut().zip(skips).filter(|(_, skips)| *skips) {
                *top = f32::NEG_INFINITY;
            }
        }
        let changes = take_in(s, self.m, self.l, &tops, &sums);
        let columns = self.o.len() / R;
        let mut panel = 0;
        while panel < columns {
            panel += match columns - panel {
                4.. if most >= 4 => self.outputs::<S, 4>(s, panel, &seen, &changes),
                2.. if most >= 2 => self.outputs::<S, 2>(s, panel, &seen, &changes),
                _ => self.outputs::<S, 1>(s, panel, &seen, &changes),
            };
        }
    }
}

impl<E: Element, const R: usize> FoldGroup<'_, '_, E, R> {
    /// Logits against `P` panels of keys from panel `first` on; gives `P`.
    #[inline(always)]
    fn logits<S: Simd, const P: usize>(&mut self, s: S, first: usize) -> usize {
        let (block, dim) = (self.block, self.q.len());
        let panels = array::from_fn(|p| &block.head.k[(first + p) * dim..][..dim]);
        let q = self.q;
        let ahead = block.ahead.map(|ahead| ahead.after(first * dim * size_of::<[E; LANES]>()));
        let sums = products::<S, E, R, P>(s, panels, |i, r| q[i][r], ahead);
        let scale = s.splat(self.scale);
        for p in 0..P {
            let bias = block.bias.get(first + p).map_or(s.splat(0.0), |bias| s.load(bias));
            let hidden = block.only().map(|only| s.load(&only.hidden[first + p]));
            for (r, sums) in sums.iter().enumerate() {
                let mut dot = sums[p];
                if E::SCALED {
                    dot = s.mul(dot, s.load(&block.head.k_scales[first + p]));
                }
                let mut logits = s.fma(dot, scale, bias);
                if let Some(hidden) = hidden {
                    // First 0, so that what does not exist may be NaN.
                    logits = s.add(s.zero_below(hidden, s.splat(0.0), logits), hidden);
                }
                let lanes = self.scores[r].as_chunks_mut().0;
                s.store(logits, &mut lanes[first + p]);
            }
        }
        P
    }

    /// The largest logit of each row; those of keys that it does not see become −∞.
    #[inline(always)]
    fn tops<S: Simd>(&mut self, s: S, panels: usize, seen: &Seen) -> Lane {
        let mut tops = [f32::NEG_INFINITY; LANES];
        for (r, largest) in tops.iter_mut().enumerate().take(R) {
            if seen.common < panels * LANES {
                hide(&mut self.scores[r][..panels * LANES], self.positions[r], self.block);
            }
            let lanes = &self.scores[r].as_chunks::<LANES>().0[..panels];
            let mut top = s.splat(f32::NEG_INFINITY);
            for lane in lanes {
                top = s.max(s.load(lane), top);
            }
            // Of two zeros either may be found first: + 0 makes −0 the other.
            *largest = s.top(top) + 0.0;
        }
        tops
    }

    /// Which rows leave the block out: a rule of its own for each row, so that nothing depends on who is computed with whom.
    #[inline(always)]
    fn skips(&self, tops: &Lane) -> [bool; R] {
        let Visibility::From(first) = self.block.visibility else { return [false; R] };
        let end = first + self.block.keys as u64;
        array::from_fn(|r| self.positions[r] >= end && tops[r] < self.m[r] - self.skip_below)
    }

    /// Turns logits into probabilities (times the values' scales); gives their sums. A loop of its own, so that no row waits
    /// for its maximum.
    #[inline(always)]
    fn weigh<S: Simd>(&mut self, s: S, panels: usize, tops: &Lane) -> Lane {
        let mut sums = [0.0; LANES];
        for (r, &top) in tops.iter().enumerate().take(R) {
            let lanes = &mut self.scores[r].as_chunks_mut::<LANES>().0[..panels];
            let (top, mut sum) = (s.splat(top), s.splat(0.0));
            for (panel, lane) in lanes.iter_mut().enumerate() {
                let p = s.exp2(s.sub(s.load(lane), top));
                sum = s.add(sum, p);
                let p = if E::SCALED { s.mul(p, s.load(&self.block.head.v_scales[panel])) } else { p };
                s.store(p, lane);
            }
            sums[r] = s.sum(sum);
        }
        sums
    }

    /// `Σ p v` of `P` panels of columns from panel `first` on, folded onto the rows' outputs; gives `P`.
    #[inline(always)]
    fn outputs<S: Simd, const P: usize>(
        &mut self,
        s: S,
        first: usize,
        seen: &Seen,
        changes: &[Change; R],
    ) -> usize {
        let (stride, v) = (self.block.v_stride, self.block.head.v);
        let common = seen.common.min(MAX_KEYS);
        let scores: &Scores = self.scores;
        let panels = array::from_fn(|p| &v[(first + p) * stride..][..common]);
        let before = size_of_val(self.block.head.k) + first * stride * size_of::<[E; LANES]>();
        let ahead = self.block.ahead.map(|ahead| ahead.after(before));
        let mut sums = match self.block.only() {
            Some(only) => products_at::<S, E, R, P>(s, panels, only.keys, |i, r| scores[r][i]),
            None => products::<S, E, R, P>(s, panels, |i, r| scores[r][i], ahead),
        };
        if seen.common < seen.end {
            let panels = array::from_fn(|p| &v[(first + p) * stride..][..seen.end]);
            self.add_diagonal::<S, P>(s, panels, seen, &mut sums);
        }
        let width = self.o.len() / R;
        for r in 0..R {
            changes[r].apply(s, &mut self.o[r * width + first..][..P], |p| sums[r][p]);
        }
        P
    }

    /// Adds the keys that some rows see and others do not.
    #[inline(always)]
    fn add_diagonal<S: Simd, const P: usize>(
        &self,
        s: S,
        panels: [&[[E; LANES]]; P],
        seen: &Seen,
        sums: &mut [[S::F32s; P]; R],
    ) {
        // Through memory, so that the sums of the loop before stay in registers.
        let mut room = [[[0.0; LANES]; P]; R];
        for r in 0..R {
            (0..P).for_each(|p| s.store(sums[r][p], &mut room[r][p]));
        }
        for (r, row) in room.iter_mut().enumerate() {
            for key in seen.common..seen.end.min(MAX_KEYS) {
                if self.block.visibility.sees(self.positions[r], key) {
                    let factor = s.splat(self.scores[r][key]);
                    for (panel, sum) in panels.iter().zip(row.iter_mut()) {
                        s.store(s.fma(factor, E::load(s, &panel[key]), s.load(sum)), sum);
                    }
                }
            }
        }
        for r in 0..R {
            (0..P).for_each(|p| sums[r][p] = s.load(&room[r][p]));
        }
    }
}

/// Makes the logits of keys that the row does not see −∞.
#[inline(always)]
fn hide<E>(scores: &mut [f32], position: u64, block: &Block<'_, E>) {
    let keys = block.keys.min(scores.len());
    match block.visibility {
        Visibility::At(_) => {
            for (key, score) in scores[..keys].iter_mut().enumerate() {
                if !block.visibility.sees(position, key) {
                    *score = f32::NEG_INFINITY;
                }
            }
            scores[keys..].fill(f32::NEG_INFINITY);
        }
        Visibility::From(_) | Visibility::All => {
            let seen = block.visibility.leading(position, keys);
            scores[seen..].fill(f32::NEG_INFINITY);
        }
    }
}

const _: () = assert!(GROUP <= LANES, "the rows of a group fit in a vector");
