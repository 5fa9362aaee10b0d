//! Partials of the rows of a tile while blocks are folded onto them, and how a row takes in later keys.

use std::array;

use crate::shape::LANES;
use crate::simd::{Kernel, Lane, Simd};
use crate::{HeadShape, Partials};

use super::output::Rows;

/// Partials of the rows of a tile.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) m: Vec<f32>,
    pub(super) l: Vec<f32>,
    /// `[rows][panels]`. Of a row without keys it may be anything.
    pub(super) o: Vec<Lane>,
}

impl State {
    /// So many rows without keys.
    pub(super) fn clear(&mut self, rows: usize, head_dim: usize) {
        self.o.resize(rows * head_dim.div_ceil(LANES), [0.0; LANES]);
        self.m.resize(rows, 0.0);
        self.l.resize(rows, 0.0);
        self.forget();
    }

    /// Makes all rows without keys.
    pub(super) fn forget(&mut self) {
        self.m.fill(f32::NEG_INFINITY);
        self.l.fill(0.0);
    }

    /// Whether no row has keys.
    pub(super) fn is_empty(&self) -> bool {
        self.m.iter().all(|&m| m == f32::NEG_INFINITY)
    }

    /// Reads rows of a result with the same head shape.
    pub(super) fn read(&mut self, partials: &Partials, shape: &HeadShape, rows: &Rows) {
        let panels = shape.head_dim.div_ceil(LANES);
        for row in 0..rows.count {
            let packed = rows.first + row;
            let head = rows.kv_head * shape.group + packed % shape.group;
            let (m, l, o) = partials.row(packed / shape.group, head);
            (self.m[row], self.l[row]) = (m, l);
            self.o[row * panels..].as_flattened_mut()[..o.len()].copy_from_slice(o);
        }
    }
}

/// What the outputs of a row become.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Change {
    /// There are no later keys.
    Keep,
    /// There were none before.
    Replace,
    /// `fma(later, later's, earlier * row's)`.
    Scale {
        /// Factor of the row's.
        earlier: f32,
        /// Factor of the later keys'.
        later: f32,
    },
}

impl Change {
    /// Changes lanes of the output; `later_o` gives those of the later keys.
    #[inline(always)]
    pub(super) fn apply<S: Simd>(self, s: S, o: &mut [Lane], later_o: impl Fn(usize) -> S::F32s) {
        match self {
            Self::Keep => {}
            Self::Replace => {
                for (p, o) in o.iter_mut().enumerate() {
                    s.store(later_o(p), o);
                }
            }
            Self::Scale { earlier, later } => {
                let (earlier, later) = (s.splat(earlier), s.splat(later));
                for (p, o) in o.iter_mut().enumerate() {
                    s.store(s.fma(later, later_o(p), s.mul(earlier, s.load(o))), o);
                }
            }
        }
    }
}

/// Folds maxima and sums of later keys onto those of `R` rows, all at once. The arithmetic is that of
/// [`crate::partial::Fold::begin`].
#[inline(always)]
pub(super) fn take_in<S: Simd, const R: usize>(
    s: S,
    row_m: &mut [f32],
    row_l: &mut [f32],
    tops: &Lane,
    sums: &Lane,
) -> [Change; R] {
    let (mut m, mut l) = ([0.0; LANES], [0.0; LANES]);
    m[..R].copy_from_slice(&row_m[..R]);
    l[..R].copy_from_slice(&row_l[..R]);
    let top = s.max(s.load(tops), s.load(&m));
    let (earlier, later) = (s.exp2(s.sub(s.load(&m), top)), s.exp2(s.sub(s.load(tops), top)));
    let sum = s.fma(later, s.load(sums), s.mul(earlier, s.load(&l)));
    let [mut top_of, mut sum_of, mut earlier_of, mut later_of] = [[0.0; LANES]; 4];
    s.store(top, &mut top_of);
    s.store(sum, &mut sum_of);
    s.store(earlier, &mut earlier_of);
    s.store(later, &mut later_of);
    array::from_fn(|r| {
        if tops[r] == f32::NEG_INFINITY {
            return Change::Keep;
        }
        if m[r] == f32::NEG_INFINITY {
            (row_m[r], row_l[r]) = (tops[r], sums[r]);
            return Change::Replace;
        }
        (row_m[r], row_l[r]) = (top_of[r], sum_of[r]);
        Change::Scale { earlier: earlier_of[r], later: later_of[r] }
    })
}

/// Folds the partials of later keys onto those of the same rows, with the arithmetic of [`Partials::merge`].
pub(super) struct MergeStates<'a> {
    pub(super) earlier: &'a mut State,
    pub(super) later: &'a State,
}

impl Kernel for MergeStates<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { earlier, later } = self;
        let rows = earlier.m.len();
        for first in (0..rows).step_by(LANES) {
            let count = (rows - first).min(LANES);
            let range = first..first + count;
            // Rows that are not there have no keys.
            let [mut m, mut tops] = [[f32::NEG_INFINITY; LANES]; 2];
            let [mut l, mut sums] = [[0.0; LANES]; 2];
            m[..count].copy_from_slice(&earlier.m[range.clone()]);
            l[..count].copy_from_slice(&earlier.l[range.clone()]);
            tops[..count].copy_from_slice(&later.m[range.clone()]);
            sums[..count].copy_from_slice(&later.l[range.clone()]);
            let changes = take_in::<S, LANES>(s, &mut m, &mut l, &tops, &sums);
            earlier.m[range.clone()].copy_from_slice(&m[..count]);
            earlier.l[range].copy_from_slice(&l[..count]);
            let panels = earlier.o.len() / rows;
            let lanes = first * panels..(first + count) * panels;
            let (o, later_o) = (&mut earlier.o[lanes.clone()], &later.o[lanes]);
            let each = o.chunks_exact_mut(panels).zip(later_o.chunks_exact(panels));
            for ((o, later_o), change) in each.zip(changes) {
                change.apply(s, o, |p| s.load(&later_o[p]));
            }
        }
    }
}
