//! Runs units: every one is an item of the executor.

use std::sync::Arc;

use longshore_attention::{
    AttendItem, ExactBlock, PagedKv, Partials, SparseItem, SparseWork, Tile, TileShape, Visit, WorkList,
};
use longshore_blocks::pool::ViewBlock;

use super::{Item, Unit};
use crate::{Error, store::Store};

/// One partial per unit.
pub(super) fn attend(
    layer: usize,
    items: &[Item],
    units: &[Unit],
    store: &Store,
) -> Result<Vec<Partials>, Error> {
    let shape = store.identity().tile_shape;
    let sources: Vec<Source<'_>> =
        units.iter().map(|unit| Source::new(layer, shape, &items[unit.item], unit)).collect();
    let mut exact: Vec<AttendItem<'_>> = Vec::with_capacity(units.len());
    let mut sparse: Vec<SparseItem<'_>> = Vec::new();
    for (unit, source) in units.iter().zip(&sources) {
        let item = &items[unit.item];
        match &source.work {
            Work::Exact(work) => {
                exact.push(AttendItem { queries: item.queries(), kv: source, work, initial: None });
            }
            Work::Sparse(work) => sparse.push(SparseItem {
                queries: item.queries(),
                kv: source,
                // No visit names a mean: whoever asks has them, and folds them after the blocks.
                summaries: source,
                work,
                earlier: None,
                stripe: None,
                skip_below: item.visits.as_ref().and_then(|visits| visits.skip_below),
            }),
        }
    }
    let visited: usize =
        sources.iter().filter(|source| source.only.is_some()).map(|source| source.blocks.len()).sum();
    store.metrics.attend_visited_blocks.inc_by(visited as u64);
    let mut exact = store.executor().attend(&exact)?.into_iter();
    let mut sparse = store.executor().attend_sparse(&sparse)?.into_iter();
    let partials = sources.iter().map(|source| match source.work {
        Work::Exact(_) => exact.next(),
        Work::Sparse(_) => sparse.next(),
    });
    Ok(partials.map(|partial| partial.expect("the executor answers every item")).collect())
}

/// The blocks of one unit in one layer, and what is visited of them: all.
struct Source<'a> {
    blocks: Vec<&'a ViewBlock<Arc<Tile>>>,
    layer: usize,
    shape: TileShape,
    /// The KV head of a sparse item.
    only: Option<usize>,
    work: Work,
}

enum Work {
    Exact(WorkList),
    Sparse(SparseWork),
}

impl<'a> Source<'a> {
    fn new(layer: usize, shape: TileShape, item: &'a Item, unit: &Unit) -> Self {
        let blocks: Vec<_> = unit.runs.iter().flat_map(|run| &item.blocks[run.clone()]).collect();
        let exact = blocks.iter().enumerate().map(|(tile, entry)| ExactBlock {
            tile: tile as u32,
            first_position: entry.index * shape.block_tokens as u64,
            len: shape.block_tokens as u32,
        });
        let Some(visits) = &item.visits else {
            let work = Work::Exact(WorkList { exact: exact.collect(), ..WorkList::default() });
            return Self { blocks, layer, shape, only: None, work };
        };
        let list = (exact.map(Visit::Block).collect(), Vec::new());
        let rows = item.queries().rows() as u32;
        let work =
            SparseWork::new(1, vec![rows], vec![list]).expect("one list of blocks for rows that there are");
        let shape = TileShape { kv_heads: 1, ..shape };
        Self { blocks, layer, shape, only: Some(visits.kv_head), work: Work::Sparse(work) }
    }
}

impl PagedKv for Source<'_> {
    fn shape(&self) -> TileShape {
        self.shape
    }

    fn len(&self) -> usize {
        self.blocks.len()
    }

    fn tile(&self, index: usize) -> &Tile {
        &self.blocks[index].block.pages()[self.layer].payload
    }

    fn only_head(&self) -> Option<usize> {
        self.only
    }
}
