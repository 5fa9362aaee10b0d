//! Runs units: every one is an item of the executor.

use std::sync::Arc;

use longshore_attention::{
    AttendItem, ExactBlock, PagedKv, Partials, SparseItem, SparseWork, Tile, TileShape, Visit, WorkList,
};
use longshore_blocks::pool::ViewBlock;

use super::{Item, Unit};
use crate::{
    Error,
    store::Store,
    tier::{Body, Loading},
};

/// Bytes that are read from disk for one step of a query; a step ends with the stripe that reaches it.
const STEP_DISK_BYTES: usize = 4 << 20;

/// One partial per unit. Units run in steps: while one computes, the tiles of the next one come from disk. What is in memory
/// is one step.
pub(super) fn attend(
    layer: usize,
    items: &[Item],
    units: &[Unit],
    store: &Store,
) -> Result<Vec<Partials>, Error> {
    let mut partials = Vec::with_capacity(units.len());
    let mut step = begin_step(layer, items, units, store);
    while !step.is_empty() {
        let rest = &units[partials.len()..];
        let next = begin_step(layer, items, &rest[step.len()..], store);
        let units = &rest[..step.len()];
        let sources = units.iter().zip(step).map(|(unit, loading)| {
            let bodies = loading.wait(store)?;
            Ok(Source::new(layer, store.identity().tile_shape, &items[unit.item], unit, bodies))
        });
        partials.extend(run_step(items, units, &sources.collect::<Result<Vec<_>, Error>>()?, store)?);
        step = next;
    }
    Ok(partials)
}

/// Begins to load the first units: at least one, and no more than may be read from disk at a time.
fn begin_step(layer: usize, items: &[Item], units: &[Unit], store: &Store) -> Vec<Loading> {
    let (tile_bytes, mut bytes) = (store.identity().tile_shape.bytes(), 0);
    let mut step = Vec::new();
    for unit in units {
        if bytes >= STEP_DISK_BYTES {
            break;
        }
        let loading = store.begin_load(blocks(&items[unit.item], unit), layer);
        bytes += loading.tiles_read() * tile_bytes;
        step.push(loading);
    }
    step
}

/// The blocks that a unit visits.
fn blocks<'a>(item: &'a Item, unit: &'a Unit) -> impl Iterator<Item = &'a ViewBlock<Arc<Tile>>> {
    unit.runs.iter().flat_map(|run| &item.blocks[run.clone()])
}

fn run_step(
    items: &[Item],
    units: &[Unit],
    sources: &[Source],
    store: &Store,
) -> Result<Vec<Partials>, Error> {
    let mut exact: Vec<AttendItem<'_>> = Vec::with_capacity(units.len());
    let mut sparse: Vec<SparseItem<'_>> = Vec::new();
    for (unit, source) in units.iter().zip(sources) {
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
        sources.iter().filter(|source| source.only.is_some()).map(|source| source.bodies.len()).sum();
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
struct Source {
    bodies: Vec<Body>,
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

impl Source {
    fn new(layer: usize, shape: TileShape, item: &Item, unit: &Unit, bodies: Vec<Body>) -> Self {
        let exact = blocks(item, unit).enumerate().map(|(tile, entry)| ExactBlock {
            tile: tile as u32,
            first_position: entry.index * shape.block_tokens as u64,
            len: shape.block_tokens as u32,
        });
        let Some(visits) = &item.visits else {
            let work = Work::Exact(WorkList { exact: exact.collect(), ..WorkList::default() });
            return Self { bodies, layer, shape, only: None, work };
        };
        let list = (exact.map(Visit::Block).collect(), Vec::new());
        let rows = item.queries().rows() as u32;
        let work =
            SparseWork::new(1, vec![rows], vec![list]).expect("one list of blocks for rows that there are");
        let shape = TileShape { kv_heads: 1, ..shape };
        Self { bodies, layer, shape, only: Some(visits.kv_head), work: Work::Sparse(work) }
    }
}

impl PagedKv for Source {
    fn shape(&self) -> TileShape {
        self.shape
    }

    fn len(&self) -> usize {
        self.bodies.len()
    }

    fn tile(&self, index: usize) -> &Tile {
        self.bodies[index].tile(self.layer)
    }

    fn only_head(&self) -> Option<usize> {
        self.only
    }
}
