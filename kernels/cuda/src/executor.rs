//! The executor of the device: work lists over tiles of the host, which are copied to pages once.

mod decode;
mod lists;
mod pages;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use longshore_attention::{
    AttendItem, CpuExecutor, Error as AttentionError, ExactBlock, Executor, Partials, PlanInput,
    PrefillPolicy, Queries, SparseItem, SparseWork, TileShape, WorkList,
};

use crate::{Buffer, Device, Error, Kind, PageElement, PageStats};
use decode::DecodeBatch;
use lists::ListCall;
use pages::TilePages;

/// Different shapes of tiles that one executor knows: one of a deployment, and that of its summaries.
const SHAPES_MAX: usize = 4;
/// Packed rows (positions × query heads of a KV head) up to which keys are split over the device instead of rows.
const DECODE_ROWS_MAX: usize = 32;

/// Runs work lists on a device. Tiles stay where they are, in memory of the host; those that are visited are copied to a bounded cache
/// of pages on the device and found there again. The bits differ from those of the CPU (queries and weights are rounded to the type of
/// the pages, stripes make no difference), and depend on what is called together and, where pages are short, on what has room.
///
/// What the lists of a sparse prefill visit is planned on the CPU; pseudo-tokens of a [`WorkList`] are folded on the CPU.
#[derive(Debug)]
pub struct CudaExecutor {
    device: Arc<dyn Device>,
    cpu: CpuExecutor,
    budget_bytes: usize,
    /// One call at a time: the device has one queue, and pages that are filled are of use from the next launch on.
    shapes: Mutex<HashMap<(TileShape, PageElement), TilePages>>,
}

type Shapes = HashMap<(TileShape, PageElement), TilePages>;

impl CudaExecutor {
    /// An executor whose pages take up to `budget_bytes` of `device` for tiles of one shape and their summaries, all together; `cpu` plans.
    /// Five eighths are for tiles as they are, two for tiles whose elements become others, one for summaries.
    pub fn new(device: Arc<dyn Device>, cpu: CpuExecutor, budget_bytes: usize) -> Self {
        Self { device, cpu, budget_bytes, shapes: Mutex::default() }
    }

    /// What the caches of pages did so far, all together.
    pub fn stats(&self) -> PageStats {
        let shapes = self.lock();
        shapes.values().map(TilePages::stats).fold(PageStats::default(), |sum, one| PageStats {
            pages: sum.pages + one.pages,
            reserved_bytes: sum.reserved_bytes + one.reserved_bytes,
            hits: sum.hits + one.hits,
            misses: sum.misses + one.misses,
            evictions: sum.evictions + one.evictions,
            shortages: sum.shortages + one.shortages,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Shapes> {
        // Entries are added whole.
        self.shapes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes sure that there are pages of `element` for tiles of `shape`.
    fn furnish(
        &self,
        shapes: &mut Shapes,
        shape: TileShape,
        element: PageElement,
        eighths: usize,
    ) -> Result<(), Error> {
        if shapes.contains_key(&(shape, element)) {
            return Ok(());
        }
        if shapes.len() == SHAPES_MAX {
            let problem =
                format!("is one more than the {SHAPES_MAX} that a device keeps pages for: {shape:?}");
            return Err(Error::Invalid { field: "tile_shape", problem });
        }
        let pages = TilePages::new(&self.device, shape, element, self.budget_bytes / 8 * eighths)?;
        shapes.insert((shape, element), pages);
        Ok(())
    }

    fn attend_all(&self, items: &[AttendItem<'_>]) -> Result<Vec<Partials>, Error> {
        let mut shapes = self.lock();
        let mut partials: Vec<Option<Partials>> = vec![None; items.len()];
        // In the order in which they are met; there is nearly always one.
        let mut batches: Vec<(BatchKey, Vec<usize>)> = Vec::new();
        for (index, item) in items.iter().enumerate() {
            match BatchKey::of(item) {
                Some(key) => match batches.iter_mut().find(|(other, _)| *other == key) {
                    Some((_, batch)) => batch.push(index),
                    None => batches.push((key, vec![index])),
                },
                None => partials[index] = Some(self.attend_lists(&mut shapes, item)?),
            }
        }
        for (key, batch) in batches {
            self.furnish(&mut shapes, key.tile, key.tile.dtype.into(), OWN_EIGHTHS)?;
            let pages = &shapes[&(key.tile, key.tile.dtype.into())];
            let of: Vec<&AttendItem<'_>> = batch.iter().map(|&index| &items[index]).collect();
            let done = DecodeBatch::new(&self.device, pages, &of)?.run()?;
            for (&index, partial) in batch.iter().zip(done) {
                partials[index] = Some(partial);
            }
        }
        Ok(partials.into_iter().map(|partial| partial.expect("every item is in one of the two")).collect())
    }

    /// Blocks and columns of one item, in as many calls as pages allow.
    fn attend_lists(&self, shapes: &mut Shapes, item: &AttendItem<'_>) -> Result<Partials, Error> {
        let tile = item.kv.shape();
        let element = list_element(tile);
        self.furnish(shapes, tile, element, eighths(tile, element))?;
        let pages = &shapes[&(tile, element)];
        let call = ListCall::new(&self.device, pages, item.queries)?;
        let mut partial = start(&item.queries, item.initial);
        let mut rest = &item.work.exact[..];
        while !rest.is_empty() {
            let tiles: Vec<_> = rest.iter().map(|block| item.kv.tile(block.tile as usize)).collect();
            let pinned = pages.pin(&tiles)?;
            let (now, later) = rest.split_at(pinned.len());
            let exact: Vec<ExactBlock> =
                now.iter().zip(0..).map(|(block, tile)| ExactBlock { tile, ..*block }).collect();
            let work = WorkList { exact, ..WorkList::default() };
            partial = call.flat(&work, pinned.addresses(), partial)?;
            rest = later;
        }
        for (columns, bias) in column_runs(item.work, pages.limit()) {
            let tiles: Vec<_> = columns.iter().map(|column| item.kv.tile(column.tile as usize)).collect();
            let pinned = pages.pin_all(&tiles)?;
            let renamed =
                columns.iter().zip(0..).map(|(column, tile)| longshore_attention::Column { tile, ..*column });
            let work =
                WorkList { columns: renamed.collect(), column_bias: bias.to_vec(), ..WorkList::default() };
            partial = call.flat(&work, pinned.addresses(), partial)?;
        }
        self.fold_summaries(item, partial)
    }

    fn fold_summaries(&self, item: &AttendItem<'_>, partial: Partials) -> Result<Partials, Error> {
        if item.work.summaries.is_empty() {
            return Ok(partial);
        }
        let work = WorkList { summaries: item.work.summaries.clone(), ..WorkList::default() };
        let rest = AttendItem { work: &work, initial: Some(&partial), ..*item };
        let mut folded = self.cpu.attend(&[rest]).map_err(refused)?;
        Ok(folded.pop().expect("one partial for one item"))
    }

    fn attend_sparse_one(&self, shapes: &mut Shapes, item: &SparseItem<'_>) -> Result<Partials, Error> {
        let mut partial = start(&item.queries, item.earlier);
        if let Some(stripe) = item.stripe {
            partial.merge(stripe).map_err(refused)?;
        }
        let Some(lists) = lists::Visited::of(item) else { return Ok(partial) };
        let (tile, element) = (lists.tile_shape(item), list_element(item.kv.shape()));
        self.furnish(shapes, tile, element, eighths(tile, element))?;
        let means = lists.mean_shape(item);
        if let Some(means) = means {
            self.furnish(shapes, means, element, MEAN_EIGHTHS)?;
        }
        let pages = &shapes[&(tile, element)];
        let mean_pages = means.map(|means| &shapes[&(means, element)]);
        ListCall::new(&self.device, pages, item.queries)?.sparse(item, &lists, mean_pages, partial)
    }
}

impl Executor for CudaExecutor {
    fn attend(&self, items: &[AttendItem<'_>]) -> Result<Vec<Partials>, AttentionError> {
        items.iter().try_for_each(AttendItem::validate)?;
        self.attend_all(items).map_err(failed)
    }

    fn attend_sparse(&self, items: &[SparseItem<'_>]) -> Result<Vec<Partials>, AttentionError> {
        items.iter().try_for_each(SparseItem::validate)?;
        let mut shapes = self.lock();
        items.iter().map(|item| self.attend_sparse_one(&mut shapes, item).map_err(failed)).collect()
    }

    fn plan(&self, policy: &PrefillPolicy, input: &PlanInput<'_>) -> Result<SparseWork, AttentionError> {
        self.cpu.plan(policy, input)
    }
}

/// Items of one launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct BatchKey {
    tile: TileShape,
    group: usize,
    scale: u32,
}

impl BatchKey {
    /// Of an item with few rows over blocks that follow each other; `None` for all others. All of int8 are such or go by lists.
    fn of(item: &AttendItem<'_>) -> Option<Self> {
        let WorkList { exact, columns, summaries, .. } = item.work;
        let (tile, group) = (item.kv.shape(), item.queries.shape.group);
        let plain = columns.is_empty() && summaries.is_empty() && !exact.is_empty();
        let few = (1..=DECODE_ROWS_MAX).contains(&(item.queries.rows() * group));
        let follows = |pair: &[ExactBlock]| {
            pair[0].len as usize == tile.block_tokens
                && pair[1].first_position == pair[0].first_position + u64::from(pair[0].len)
        };
        (plain && few && exact.windows(2).all(follows)).then_some(Self {
            tile,
            group,
            scale: item.queries.scale.to_bits(),
        })
    }
}

/// Runs of columns whose tiles have room at once, with their bias.
fn column_runs(
    work: &WorkList,
    pages: usize,
) -> impl Iterator<Item = (&[longshore_attention::Column], &[f32])> {
    let run = pages.clamp(1, 256);
    let bias = move |index: usize| match work.column_bias.is_empty() {
        true => &[][..],
        false => &work.column_bias[index * run..work.columns.len().min((index + 1) * run)],
    };
    work.columns.chunks(run).enumerate().map(move |(index, columns)| (columns, bias(index)))
}

/// Shares of the budget: of tiles as they are, of tiles whose elements become others, of summaries.
const OWN_EIGHTHS: usize = 5;
const OTHER_EIGHTHS: usize = 2;
const MEAN_EIGHTHS: usize = 1;

fn eighths(tile: TileShape, element: PageElement) -> usize {
    if element == tile.dtype.into() { OWN_EIGHTHS } else { OTHER_EIGHTHS }
}

/// The type of the pages that lists are run over: the matrix units know no scales.
fn list_element(tile: TileShape) -> PageElement {
    match tile.dtype.into() {
        PageElement::Int8 => PageElement::F16,
        same => same,
    }
}

/// What a result is before any key.
fn start(queries: &Queries<'_>, earlier: Option<&Partials>) -> Partials {
    let shape = queries.shape;
    earlier
        .cloned()
        .unwrap_or_else(|| Partials::identity(queries.rows(), shape.query_heads(), shape.head_dim))
}

/// Partials that the device wrote, as they travel.
fn read_partials(records: &Buffer, rows: usize, heads: usize, head_dim: usize) -> Result<Partials, Error> {
    let data: Vec<f32> = records.to_vec()?;
    Partials::from_interleaved(rows, heads, head_dim, &data[..rows * heads * (2 + head_dim)])
        .map_err(|error| Error::Device { call: "attention", problem: format!("gave no numbers: {error}") })
}

/// A refusal of the primitive within a call of the device.
fn refused(error: AttentionError) -> Error {
    match error {
        AttentionError::Invalid { field, problem } => Error::Invalid { field, problem },
        other => Error::Device { call: "attention", problem: other.to_string() },
    }
}

/// What a fault of the device is to who asked for attention.
fn failed(error: Error) -> AttentionError {
    match error {
        Error::Invalid { field, problem } => AttentionError::Invalid { field, problem },
        other if other.kind() == Kind::Exhausted => AttentionError::Exhausted(other.to_string()),
        other => AttentionError::Device(other.to_string()),
    }
}
