//! A row tile: some packed query rows of one KV head, folded over blocks of a work list.
//!
//! Packed row `r` of a KV head is position `r / group` and query head `kv_head * group + r % group`. The rows of a tile are
//! worked on in groups of nearly equal size, at most [`GROUP`], as many as fit in registers.

use std::cell::RefCell;
use std::ops::Range;

use half::{bf16, f16};

use crate::simd::{Kernel, Simd};
use crate::tile::Element;
use crate::{KvDtype, Queries, SummaryKey, Tile};

use super::AttendItem;
use super::block::{Block, Gathered, MAX_KEYS};
use super::group::FoldGroup;
use super::microkernel::{GROUP, Scores};
use super::output::{BlockPartials, Output, Rows};
use super::state::State;

/// What a thread keeps between row tiles.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) state: State,
    /// Of all stripes before, where blocks are folded stripe by stripe.
    pub(super) total: State,
    pub(super) rows: PackedRows,
    pub(super) gathered: Gathered,
}

/// The query rows of a tile, and room for their logits.
#[derive(Debug, Default)]
pub(super) struct PackedRows {
    /// Packed queries in groups, each `[head_dim][rows of the group]`.
    q: Vec<f32>,
    /// Position of each row of the tile.
    positions: Vec<u64>,
    scores: Option<Box<Scores>>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Calls `f` with the thread's buffers.
pub(super) fn with_scratch<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    SCRATCH.with_borrow_mut(f)
}

/// Folds blocks onto the rows of a tile, or takes each block's partial by itself.
pub(super) struct FoldBlocks<'a, 'b> {
    pub(super) item: &'a AttendItem<'b>,
    pub(super) rows: Rows,
    /// Which blocks of the item: exact ones, then runs of columns, then of summaries.
    pub(super) blocks: Range<usize>,
    /// Tile and KV head that this thread is likely to visit afterwards.
    pub(super) after: Option<(&'a Tile, usize)>,
    pub(super) target: Target<'a>,
    pub(super) scratch: &'a mut Scratch,
}

/// Where results go.
#[derive(Clone, Copy)]
pub(super) enum Target<'a> {
    /// Onto the item's result.
    Fold(&'a Output<'a>),
    /// Each block's partial by itself, from this place on.
    Apart(&'a BlockPartials<'a>, usize),
}

impl Kernel for FoldBlocks<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.item.kv.shape().dtype {
            KvDtype::F32 => self.run_as::<S, f32>(s),
            KvDtype::F16 => self.run_as::<S, f16>(s),
            KvDtype::Bf16 => self.run_as::<S, bf16>(s),
            KvDtype::Int8 => self.run_as::<S, i8>(s),
        }
    }
}

impl FoldBlocks<'_, '_> {
    #[inline(always)]
    fn run_as<S: Simd, E: Element>(self, s: S) {
        let Self { item, rows, blocks, after, target, scratch } = self;
        let Scratch { state, rows: packed, gathered, .. } = scratch;
        state.clear(rows.count, item.queries.shape.head_dim);
        if let Target::Fold(output) = target {
            output.load(&rows, state);
        }
        let mut tile = packed.pack(&item.queries, &rows, state);
        let last = tile.last();
        let visit = Visit { item, kv_head: rows.kv_head, last, end: blocks.end, after };
        for index in blocks.clone() {
            visit.fold::<S, E>(s, index, gathered, &mut tile);
            if let Target::Apart(partials, first) = target {
                partials.store(first + index - blocks.start, tile.state);
                tile.state.forget();
            }
        }
        if let Target::Fold(output) = target {
            output.store(&rows, tile.state);
        }
    }
}

impl PackedRows {
    /// Packs the queries of some rows, whose partials are `state`.
    pub(super) fn pack<'a>(
        &'a mut self,
        queries: &Queries<'_>,
        rows: &Rows,
        state: &'a mut State,
    ) -> RowTile<'a> {
        let Self { q, positions, scores } = self;
        let (dim, group) = (queries.shape.head_dim, queries.shape.group);
        let width = queries.shape.query_heads() * dim;
        q.clear();
        q.resize(rows.count * dim, 0.0);
        for range in groups(rows.count) {
            let packed = &mut q[range.start * dim..range.end * dim];
            for (lane, row) in range.clone().enumerate() {
                let row = rows.first + row;
                let head = rows.kv_head * group + row % group;
                let from = &queries.data[row / group * width + head * dim..][..dim];
                for (to, &from) in packed[lane..].iter_mut().step_by(range.len()).zip(from) {
                    *to = from;
                }
            }
        }
        positions.clear();
        let packed = rows.first..rows.first + rows.count;
        positions.extend(packed.map(|row| queries.first_position + (row / group) as u64));
        RowTile {
            q,
            positions,
            scale: queries.scale * std::f32::consts::LOG2_E,
            skip_below: f32::INFINITY,
            state,
            scores: scores.get_or_insert_with(|| Box::new([[0.0; MAX_KEYS]; GROUP])),
        }
    }
}

/// The rows of a tile in groups of nearly equal size.
#[inline(always)]
fn groups(rows: usize) -> impl Iterator<Item = Range<usize>> {
    let count = rows.div_ceil(GROUP);
    (0..count).map(move |group| group * rows / count..(group + 1) * rows / count)
}

/// Finds the blocks of a work list.
struct Visit<'a, 'b> {
    item: &'a AttendItem<'b>,
    kv_head: usize,
    /// Position of the last row.
    last: u64,
    /// Of the blocks to visit.
    end: usize,
    /// Tile and KV head that come after them.
    after: Option<(&'a Tile, usize)>,
}

impl Visit<'_, '_> {
    /// Folds the block of this index, when any row sees some of it.
    #[inline(always)]
    fn fold<S: Simd, E: Element>(&self, s: S, index: usize, gathered: &mut Gathered, tile: &mut RowTile<'_>) {
        let (work, kv) = (self.item.work, self.item.kv);
        let shape = kv.shape();
        if let Some(exact) = work.exact.get(index) {
            if exact.first_position <= self.last {
                // Many rows compute long enough for the processor to find out itself what comes next.
                let few = tile.positions.len() <= 2 * GROUP;
                let next = match work.exact.get(index + 1) {
                    _ if !few => None,
                    Some(next) if index + 1 < self.end => Some((kv.tile(next.tile as usize), self.kv_head)),
                    _ => self.after,
                };
                let block = Block::<E>::exact(exact, kv.tile(exact.tile as usize), self.kv_head, next);
                tile.fold(s, &block);
            }
            return;
        }
        let first = (index - work.exact.len()) * shape.block_tokens;
        if first < work.columns.len() {
            let run = first..work.columns.len().min(first + shape.block_tokens);
            let bias = work.column_bias.get(run.clone()).unwrap_or(&[]);
            let columns = &work.columns[run];
            if columns.iter().any(|column| column.position <= self.last) {
                tile.fold(s, &gathered.columns::<E>(kv, self.kv_head, columns, bias));
            }
            return;
        }
        let skip = first - work.columns.len().next_multiple_of(shape.block_tokens);
        let own = work.summaries.iter().filter(|summary| summary.kv_head as usize == self.kv_head);
        let summaries: Vec<&SummaryKey> = own.skip(skip).take(shape.block_tokens).collect();
        if !summaries.is_empty() {
            tile.fold(s, &gathered.summaries(&shape, &summaries));
        }
    }
}

/// The rows that blocks are folded onto.
pub(super) struct RowTile<'a> {
    q: &'a [f32],
    positions: &'a [u64],
    /// Scale of the logits, base 2.
    scale: f32,
    /// See [`FoldGroup::skip_below`].
    pub(super) skip_below: f32,
    pub(super) state: &'a mut State,
    scores: &'a mut Scores,
}

impl RowTile<'_> {
    /// Position of the first row.
    pub(super) fn first(&self) -> u64 {
        self.positions.first().copied().unwrap_or(0)
    }

    /// Position of the last row.
    pub(super) fn last(&self) -> u64 {
        self.positions.last().copied().unwrap_or(0)
    }

    /// Folds a block onto all rows.
    #[inline(always)]
    pub(super) fn fold<S: Simd, E: Element>(&mut self, s: S, block: &Block<'_, E>) {
        let mut block = *block;
        for rows in groups(self.positions.len()) {
            match rows.len() {
                1 => self.fold_group::<S, E, 1>(s, &block, rows.start),
                2 => self.fold_group::<S, E, 2>(s, &block, rows.start),
                3 => self.fold_group::<S, E, 3>(s, &block, rows.start),
                4 => self.fold_group::<S, E, 4>(s, &block, rows.start),
                5 => self.fold_group::<S, E, 5>(s, &block, rows.start),
                _ => self.fold_group::<S, E, GROUP>(s, &block, rows.start),
            }
            // Asked for once.
            block.ahead = None;
        }
    }

    #[inline(always)]
    fn fold_group<S: Simd, E: Element, const R: usize>(&mut self, s: S, block: &Block<'_, E>, first: usize) {
        let rows = self.positions.len();
        let (dim, panels) = (self.q.len() / rows, self.state.o.len() / rows);
        let State { m, l, o } = &mut *self.state;
        s.call(FoldGroup {
            block,
            q: self.q[first * dim..][..R * dim].as_chunks::<R>().0,
            scale: self.scale,
            skip_below: self.skip_below,
            positions: &self.positions[first..][..R],
            m: &mut m[first..][..R],
            l: &mut l[first..][..R],
            o: &mut o[first * panels..][..R * panels],
            scores: self.scores,
        });
    }
}
