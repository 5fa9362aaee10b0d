//! Folds what a list visits, stripe by stripe, onto the rows of a tile. No partial of a stripe leaves the thread.

use half::{bf16, f16};

use crate::simd::{Kernel, Simd};
use crate::tile::Element;
use crate::{Column, ExactBlock, KvDtype, SparseItem, Visit};

use crate::executor::block::{Block, Gathered, Visibility};
use crate::executor::output::{Output, Rows};
use crate::executor::row_tile::{RowTile, Scratch};
use crate::executor::state::{MergeStates, State};

/// Some stripes of a list, for some rows of its query tile.
pub(super) struct FoldList<'a, 'b> {
    pub(super) item: &'a SparseItem<'b>,
    pub(super) rows: Rows,
    pub(super) visits: &'a [Visit],
    /// Whether they are the list's first.
    pub(super) begins: bool,
    pub(super) output: &'a Output<'a>,
    pub(super) scratch: &'a mut Scratch,
}

impl Kernel for FoldList<'_, '_> {
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

impl FoldList<'_, '_> {
    #[inline(always)]
    fn run_as<S: Simd, E: Element>(self, s: S) {
        let Self { item, rows, visits, begins, output, scratch } = self;
        let Scratch { state, total, rows: packed, gathered } = scratch;
        let shape = item.queries.shape;
        total.clear(rows.count, shape.head_dim);
        output.load(&rows, total);
        state.clear(rows.count, shape.head_dim);
        if let Some(stripe) = item.stripe.filter(|_| begins) {
            state.read(stripe, &shape, &rows);
        }
        let mut tile = packed.pack(&item.queries, &rows, state);
        tile.skip_below = item.skip_below.unwrap_or(f32::INFINITY);
        let source = Source { item, kv_head: item.kv.only_head().unwrap_or(rows.kv_head) };
        for visit in visits {
            match visit {
                Visit::Block(block) => source.block::<S, E>(s, block, &mut tile),
                &Visit::Columns { first, count } => {
                    let columns = &item.work.columns()[first as usize..][..count as usize];
                    source.columns::<S, E>(s, columns, gathered, &mut tile);
                }
                &Visit::Means { tile: index, first, keys } => {
                    let means = item.summaries.tile(index as usize);
                    let bias = item.kv.shape().block_tokens.ilog2() as f32;
                    tile.fold(s, &gathered.means(means, rows.kv_head, first, keys, bias));
                }
                Visit::EndOfStripe => end_stripe(s, total, tile.state),
            }
        }
        end_stripe(s, total, tile.state);
        output.store(&rows, total);
    }
}

/// Where the keys of a list are.
struct Source<'a, 'b> {
    item: &'a SparseItem<'b>,
    kv_head: usize,
}

impl Source<'_, '_> {
    #[inline(always)]
    fn block<S: Simd, E: Element>(&self, s: S, block: &ExactBlock, tile: &mut RowTile<'_>) {
        if block.first_position <= tile.last() {
            let keys = self.item.kv.tile(block.tile as usize);
            tile.fold(s, &Block::<E>::exact(block, keys, self.kv_head, None));
        }
    }

    #[inline(always)]
    fn columns<S: Simd, E: Element>(
        &self,
        s: S,
        columns: &[Column],
        gathered: &mut Gathered,
        tile: &mut RowTile<'_>,
    ) {
        if columns.iter().all(|column| column.position > tile.last()) {
            return;
        }
        let mut block = gathered.columns::<E>(self.item.kv, self.kv_head, columns, &[]);
        if columns.iter().all(|column| column.position <= tile.first()) {
            // The same keys, and nobody asks each of them for its position.
            block.visibility = Visibility::All;
        }
        tile.fold(s, &block);
    }
}

/// Folds the stripe's partial onto the total and leaves the stripe empty.
#[inline(always)]
fn end_stripe<S: Simd>(s: S, total: &mut State, stripe: &mut State) {
    if stripe.is_empty() {
        return;
    }
    if total.is_empty() {
        std::mem::swap(total, stripe);
    } else {
        s.call(MergeStates { earlier: total, later: stripe });
    }
    stripe.forget();
}
