//! Where tasks leave their results: rows of the items' partials, and partials of single blocks that await their fold.
#![allow(unsafe_code, reason = "tasks share the results and write disjoint rows")]

use longshore_compute::DisjointSlice;

use crate::partial::{Fold, Parts};
use crate::shape::LANES;
use crate::simd::{Kernel, Lane, Simd};
use crate::{HeadShape, Partials};

use super::state::State;

/// Some packed rows of one KV head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rows {
    pub(super) kv_head: usize,
    /// First packed row.
    pub(super) first: usize,
    /// Packed rows.
    pub(super) count: usize,
}

/// An item's result.
pub(super) struct Output<'a> {
    shape: HeadShape,
    m: DisjointSlice<'a, f32>,
    l: DisjointSlice<'a, f32>,
    o: DisjointSlice<'a, f32>,
}

impl<'a> Output<'a> {
    pub(super) fn new(shape: HeadShape, partials: &'a mut Partials) -> Self {
        let Parts { m, l, o } = partials.parts_mut();
        Self { shape, m: DisjointSlice::new(m), l: DisjointSlice::new(l), o: DisjointSlice::new(o) }
    }

    /// `m`, `l` and `o` of each row, with its number in the tile.
    fn each(&self, rows: &Rows, mut f: impl FnMut(usize, &mut f32, &mut f32, &mut [f32])) {
        let HeadShape { group, head_dim, .. } = self.shape;
        for row in 0..rows.count {
            let packed = rows.first + row;
            let place = packed / group * self.shape.query_heads() + rows.kv_head * group + packed % group;
            // SAFETY: a packed row of a KV head has a place of its own, tasks that run at once have different rows (or
            // fold one after the other), and these parts end before the next row's begin.
            let (m, l, o) = unsafe {
                let o = self.o.range(place * head_dim..(place + 1) * head_dim);
                (self.m.range(place..place + 1), self.l.range(place..place + 1), o)
            };
            f(row, &mut m[0], &mut l[0], o);
        }
    }

    /// Reads rows.
    pub(super) fn load(&self, rows: &Rows, state: &mut State) {
        let panels = self.shape.head_dim.div_ceil(LANES);
        self.each(rows, |row, m, l, o| {
            (state.m[row], state.l[row]) = (*m, *l);
            state.o[row * panels..].as_flattened_mut()[..o.len()].copy_from_slice(o);
        });
    }

    /// Writes rows; those without keys as the identity.
    pub(super) fn store(&self, rows: &Rows, state: &State) {
        let panels = self.shape.head_dim.div_ceil(LANES);
        self.each(rows, |row, m, l, o| {
            (*m, *l) = (state.m[row], state.l[row]);
            if *m == f32::NEG_INFINITY {
                o.fill(0.0);
            } else {
                o.copy_from_slice(&state.o[row * panels..].as_flattened()[..o.len()]);
            }
        });
    }
}

/// Room for partials of single blocks, each of some rows. It stays with the thread that calls the executor.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// (m, l) of each row.
    sums: Vec<[f32; 2]>,
    o: Vec<Lane>,
}

/// The partials of the blocks of one row tile.
pub(super) struct BlockPartials<'a> {
    sums: DisjointSlice<'a, [f32; 2]>,
    o: DisjointSlice<'a, Lane>,
    rows: usize,
    panels: usize,
}

impl Room {
    /// Room for row tiles that need so many (rows × blocks) and lanes.
    pub(super) fn resize(&mut self, sums: usize, lanes: usize) {
        if self.sums.len() < sums {
            self.sums.resize(sums, [0.0; 2]);
        }
        if self.o.len() < lanes {
            self.o.resize(lanes, [0.0; LANES]);
        }
    }

    /// Deals out the room: each tile has (blocks, rows, panels).
    pub(super) fn deal(
        &mut self,
        tiles: impl Iterator<Item = (usize, usize, usize)>,
    ) -> Vec<BlockPartials<'_>> {
        let (mut sums, mut o) = (&mut self.sums[..], &mut self.o[..]);
        tiles
            .map(|(blocks, rows, panels)| {
                let own_sums = sums.split_off_mut(..blocks * rows).expect("resized to the sum of all");
                let own_o = o.split_off_mut(..blocks * rows * panels).expect("resized to the sum of all");
                BlockPartials {
                    sums: DisjointSlice::new(own_sums),
                    o: DisjointSlice::new(own_o),
                    rows,
                    panels,
                }
            })
            .collect()
    }
}

impl BlockPartials<'_> {
    /// Parts of the block in place `block`.
    #[expect(clippy::mut_from_ref, reason = "blocks are disjoint parts")]
    fn block(&self, block: usize) -> (&mut [[f32; 2]], &mut [Lane]) {
        let rows = block * self.rows..(block + 1) * self.rows;
        // SAFETY: one task writes a block; whoever folds reads it after all tasks of the tile have ended, and neither
        // keeps the parts.
        unsafe {
            (self.sums.range(rows.clone()), self.o.range(rows.start * self.panels..rows.end * self.panels))
        }
    }

    /// Writes the partial of a block.
    pub(super) fn store(&self, block: usize, state: &State) {
        let (sums, o) = self.block(block);
        for (sums, (&m, &l)) in sums.iter_mut().zip(state.m.iter().zip(&state.l)) {
            *sums = [m, l];
        }
        o.copy_from_slice(&state.o);
    }
}

/// Folds the partials of a tile's blocks onto its rows, in order.
pub(super) struct FoldPartials<'a> {
    pub(super) output: &'a Output<'a>,
    pub(super) rows: Rows,
    pub(super) partials: &'a BlockPartials<'a>,
}

impl Kernel for FoldPartials<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { output, rows, partials } = self;
        let blocks = partials.sums.len() / partials.rows;
        output.each(&rows, |row, m, l, o| {
            for block in 0..blocks {
                let (sums, later) = partials.block(block);
                let fold = Fold::begin(m, l, sums[row][0], sums[row][1]);
                let later = later[row * partials.panels..].as_flattened();
                fold.output(o, &later[..o.len()]);
            }
        });
    }
}
