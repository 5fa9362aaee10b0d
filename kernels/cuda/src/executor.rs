//! The executor of the device: work lists over tiles of the host, which are copied to pages once.

mod append;
mod arrivals;
mod decode;
mod fallback;
mod jobs;
mod kept;
mod lists;
mod means;
mod pages;
mod plan;
mod rule;
mod tally;
mod uploads;
mod wave;

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use longshore_attention::{
    AttendItem, Column, CpuExecutor, Error as AttentionError, ExactBlock, Executor, Partials, PlanInput,
    PrefillPolicy, Queries, SparseItem, SparseWork, TileShape, WorkList, attend_by_lists,
};

use crate::{Buffer, Device, Error, Kind, PageElement, PageShape, PageStats, PrefillAttention, Span};
pub use fallback::{FallbackStats, Shortage};
pub use tally::ExecutorStats;

use arrivals::Arrivals;
use decode::DecodeBatch;
use fallback::{Fallbacks, RuleCallOf};
use jobs::{BatchKey, Job};
use lists::{ListCall, Visited};
use pages::TilePages;
use plan::CHOICES_MIN;
use rule::Layers;
use tally::Tally;
use uploads::QueryRows;
use wave::{RecordShape, WAVE_BYTES, Wave, first_wave, record_shape};

/// Different shapes of tiles that one executor knows: one of a deployment, and that of its summaries.
const SHAPES_MAX: usize = 4;

/// Runs work lists on a device. Tiles stay where they are, in memory of the host; those that are visited are copied to a bounded cache
/// of pages on the device and found there again. The bits differ from those of the CPU (queries and weights are rounded to the type of
/// the pages, stripes make no difference), and depend on what is called together and, where pages are short, on what has room.
///
/// A call that the device has no memory or no page for is done by the CPU, from the same tiles: a full device is slow, and ends nothing
/// ([`ExecutorStats::fallbacks`]).
///
/// Blocks by the scorers `pooled` and `row-normalised` are chosen on the device, all else of a plan on the CPU; pseudo-tokens of a
/// [`WorkList`] are folded on the CPU.
#[derive(Debug)]
pub struct CudaExecutor {
    device: Arc<dyn Device>,
    tally: Arc<Tally>,
    cpu: CpuExecutor,
    budget_bytes: usize,
    wave_bytes: usize,
    choices_min: usize,
    wgmma: bool,
    arrivals: Arc<Arrivals>,
    /// Locked while one is looked up.
    shapes: Mutex<Shapes>,
    /// What was told of the pages last.
    told: Mutex<PageStats>,
    fallbacks: Fallbacks,
    layers: Layers,
}

type Shapes = HashMap<(TileShape, PageElement), Arc<TilePages>>;

impl CudaExecutor {
    /// An executor whose pages take up to `budget_bytes` of `device` for tiles of one shape and their summaries, all together; `cpu` plans.
    /// Six eighths are for tiles (of int8 ones four as they are, and two for those whose elements become others), one for means that lists
    /// visit, one for means by which blocks are chosen.
    pub fn new(device: Arc<dyn Device>, cpu: CpuExecutor, budget_bytes: usize) -> Self {
        let tally = Arc::new(Tally::new(device));
        let device: Arc<dyn Device> = Arc::clone(&tally) as Arc<dyn Device>;
        Self {
            arrivals: Arc::new(Arrivals::new(&device)),
            device,
            tally,
            cpu,
            budget_bytes,
            wave_bytes: WAVE_BYTES,
            choices_min: CHOICES_MIN,
            wgmma: false,
            shapes: Mutex::default(),
            told: Mutex::default(),
            fallbacks: Fallbacks::default(),
            layers: Layers::default(),
        }
    }

    /// Reads results back whenever there are so many bytes of them, instead of 256 MiB.
    #[must_use]
    pub fn with_wave_bytes(self, wave_bytes: usize) -> Self {
        Self { wave_bytes, ..self }
    }

    /// Chooses blocks on the device from so many pairs of query tile and block on, instead of 16,384.
    #[must_use]
    pub fn with_choices_min(self, choices_min: usize) -> Self {
        Self { choices_min, ..self }
    }

    /// Runs all attention of many rows by warp groups where the device has them: [`PrefillAttention::with_wgmma`].
    #[must_use]
    pub fn with_wgmma(self, wgmma: bool) -> Self {
        Self { wgmma, ..self }
    }

    /// What was done so far.
    pub fn stats(&self) -> ExecutorStats {
        self.tally.stats(self.page_stats(), &self.fallbacks)
    }

    /// What the caches of pages did, all together; as it was told last where somebody looks for pages: who asks (a scrape of metrics)
    /// must not wait for a device.
    fn page_stats(&self) -> PageStats {
        let shapes = self.shapes.lock().unwrap_or_else(PoisonError::into_inner);
        let all: Option<Vec<PageStats>> = shapes.values().map(|pages| pages.stats()).collect();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(all) = all else { return *told };
        *told = all.into_iter().fold(PageStats::default(), |sum, one| PageStats {
            pages: sum.pages + one.pages,
            reserved_bytes: sum.reserved_bytes + one.reserved_bytes,
            hits: sum.hits + one.hits,
            misses: sum.misses + one.misses,
            evictions: sum.evictions + one.evictions,
            shortages: sum.shortages + one.shortages,
            returned: sum.returned + one.returned,
        });
        *told
    }

    /// The pages of `element` for tiles of `shape`, which take a share of the budget.
    fn pages(&self, shape: TileShape, element: PageElement, eighths: usize) -> Result<Arc<TilePages>, Error> {
        // Entries are added whole.
        let mut shapes = self.shapes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pages) = shapes.get(&(shape, element)) {
            return Ok(Arc::clone(pages));
        }
        if shapes.len() == SHAPES_MAX {
            let problem =
                format!("{shape:?} is one more shape than the {SHAPES_MAX} that a device keeps pages for");
            return Err(Error::OutOfPages { problem });
        }
        let budget = self.budget_bytes / 8 * eighths;
        let pages = TilePages::new(&self.device, &self.arrivals, shape, element, budget)?;
        let pages = Arc::new(pages);
        shapes.insert((shape, element), Arc::clone(&pages));
        Ok(pages)
    }

    /// Queues `jobs`, in waves whose results come to the host together: `shapes` says what a job brings, `queue` queues it, its results
    /// to the given places. Nothing is locked meanwhile: others queue theirs in between, and wait only for pages that they want too or
    /// that there are too few of. Pages of a job may be taken by another as soon as it is queued: the device does everything in order.
    fn run<'a, J>(
        &'a self,
        mut jobs: &[J],
        shapes: impl Fn(&J) -> Vec<RecordShape>,
        queue: impl Fn(&J, &mut QueryRows<'a>, &[Span<'_>]) -> Result<(), Error>,
    ) -> Result<Vec<Partials>, Error> {
        let mut partials = Vec::new();
        while !jobs.is_empty() {
            let (now, later) = jobs.split_at(first_wave(jobs.iter().map(&shapes), self.wave_bytes));
            let of: Vec<Vec<RecordShape>> = now.iter().map(&shapes).collect();
            let wave = Wave::new(&self.device, &of.concat())?;
            let results = wave.results()?;
            let mut rest = &results[..];
            let mut rows = QueryRows::new(&self.device);
            for (job, shapes) in now.iter().zip(&of) {
                let own;
                (own, rest) = rest.split_at(shapes.len());
                queue(job, &mut rows, own)?;
            }
            partials.extend(wave.read()?);
            jobs = later;
        }
        Ok(partials)
    }

    fn attend_all(&self, items: &[AttendItem<'_>]) -> Result<Vec<Partials>, Error> {
        let jobs = jobs::of(items);
        let shapes = |job: &Job| job.items().iter().map(|&item| record_shape(&items[item].queries)).collect();
        let done = self.run(&jobs, shapes, |job, rows, results| match job {
            Job::Decode(key, of) => self.queue_decode(*key, items, of, results),
            Job::Lists([item]) => self.queue_lists(&items[*item], rows, results[0]),
        })?;
        let mut partials: Vec<Option<Partials>> = vec![None; items.len()];
        for (item, partial) in jobs.iter().flat_map(Job::items).zip(done) {
            partials[*item] = Some(partial);
        }
        let whole = items.iter().zip(partials).map(|(item, partial)| {
            let partial = partial.unwrap_or_else(|| start(&item.queries, item.initial));
            self.fold_summaries(item, partial)
        });
        whole.collect()
    }

    fn queue_decode(
        &self,
        key: BatchKey,
        items: &[AttendItem<'_>],
        of: &[usize],
        results: &[Span<'_>],
    ) -> Result<(), Error> {
        let element = key.tile.dtype.into();
        let pages = self.pages(key.tile, element, eighths(key.tile, element))?;
        let of: Vec<&AttendItem<'_>> = of.iter().map(|&item| &items[item]).collect();
        DecodeBatch::new(&self.device, &pages, &of)?.queue(results)
    }

    /// Blocks and columns of one item, in as many launches as pages allow.
    fn queue_lists<'a>(
        &'a self,
        item: &AttendItem<'a>,
        rows: &mut QueryRows<'a>,
        result: Span<'_>,
    ) -> Result<(), Error> {
        let tile = item.kv.shape();
        let element = list_element(tile);
        let pages = self.pages(tile, element, eighths(tile, element))?;
        let call = self.list_call(&pages, item.queries, rows.of(item.queries.data)?)?;
        let mut chain = call.chain(item.initial, result)?;
        let mut exact = &item.work.exact[..];
        let mut columns = (&item.work.columns[..], &item.work.column_bias[..]);
        while !exact.is_empty() {
            let tiles: Vec<_> = exact.iter().map(|block| item.kv.tile(block.tile as usize)).collect();
            let pinned = pages.pin(&tiles)?;
            let (now, later) = exact.split_at(pinned.len());
            let now = now.iter().zip(0..).map(|(block, tile)| ExactBlock { tile, ..*block });
            let work = WorkList { exact: now.collect(), ..WorkList::default() };
            let last = later.is_empty() && columns.0.is_empty();
            call.flat(&work, pinned.addresses(), &mut chain, last)?;
            exact = later;
        }
        while !columns.0.is_empty() {
            let some = &columns.0[..columns.0.len().min(COLUMN_TILES_MAX)];
            let tiles: Vec<_> = some.iter().map(|column| item.kv.tile(column.tile as usize)).collect();
            let pinned = pages.pin(&tiles)?;
            let (now, later) = columns.0.split_at(pinned.len());
            let (bias, bias_later) = columns.1.split_at(columns.1.len().min(now.len()));
            let now = now.iter().zip(0..).map(|(column, tile)| Column { tile, ..*column });
            let work = WorkList { columns: now.collect(), column_bias: bias.to_vec(), ..WorkList::default() };
            call.flat(&work, pinned.addresses(), &mut chain, later.is_empty())?;
            columns = (later, bias_later);
        }
        Ok(())
    }

    fn list_call<'a>(
        &'a self,
        pages: &'a TilePages,
        queries: Queries<'a>,
        rows: Rc<Buffer>,
    ) -> Result<ListCall<'a>, Error> {
        let shape = PageShape { kv_heads: queries.shape.kv_heads, ..pages.shape() };
        let kernel = self.prefill(&shape, queries.shape.group)?;
        Ok(ListCall::new(&self.device, pages, (shape, kernel), queries, rows))
    }

    /// What all attention of many rows is queued by: that of lists of the host, of a rule, and of rows that stay. So its bits do not depend
    /// on which of these ways a call takes.
    fn prefill(&self, shape: &PageShape, group: usize) -> Result<PrefillAttention, Error> {
        Ok(PrefillAttention::new(&self.device, shape, group)?.with_wgmma(self.wgmma))
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

    fn attend_sparse_all(&self, items: &[SparseItem<'_>]) -> Result<Vec<Partials>, Error> {
        let visited: Vec<Option<Visited>> = items
            .iter()
            .map(|item| if item.queries.rows() == 0 { None } else { Visited::of(item) })
            .collect();
        let jobs: Vec<(&SparseItem<'_>, &Visited)> = items
            .iter()
            .zip(&visited)
            .filter_map(|(item, visited)| Some((item, visited.as_ref()?)))
            .collect();
        let mut done = self
            .run(
                &jobs,
                |(item, _)| vec![record_shape(&item.queries)],
                |(item, visited), rows, results| self.queue_sparse(item, visited, rows, results[0]),
            )?
            .into_iter();
        let whole = items.iter().zip(&visited).map(|(item, visited)| match visited {
            Some(_) => Ok(done.next().expect("every job has a result")),
            None => earlier(item).map(|earlier| earlier.unwrap_or_else(|| start(&item.queries, None))),
        });
        whole.collect()
    }

    fn queue_sparse<'a>(
        &'a self,
        item: &SparseItem<'a>,
        visited: &Visited,
        rows: &mut QueryRows<'a>,
        result: Span<'_>,
    ) -> Result<(), Error> {
        let (tile, element) = (visited.tile_shape(item), list_element(item.kv.shape()));
        let pages = self.pages(tile, element, eighths(tile, element))?;
        let means = visited.mean_shape(item);
        let mean_pages = means.map(|means| self.pages(means, element, MEAN_EIGHTHS)).transpose()?;
        let call = self.list_call(&pages, item.queries, rows.of(item.queries.data)?)?;
        let mut chain = call.chain(earlier(item)?.as_ref(), result)?;
        call.sparse(item, visited, mean_pages.as_deref(), &mut chain)
    }
}

impl Executor for CudaExecutor {
    fn attend(&self, items: &[AttendItem<'_>]) -> Result<Vec<Partials>, AttentionError> {
        items.iter().try_for_each(AttendItem::validate)?;
        self.or_on_cpu(|| self.attend_all(items), || self.cpu.attend(items))
    }

    fn attend_sparse(&self, items: &[SparseItem<'_>]) -> Result<Vec<Partials>, AttentionError> {
        items.iter().try_for_each(SparseItem::validate)?;
        self.or_on_cpu(|| self.attend_sparse_all(items), || self.cpu.attend_sparse(items))
    }

    fn plan(&self, policy: &PrefillPolicy, input: &PlanInput<'_>) -> Result<SparseWork, AttentionError> {
        policy.plan_with(&self.cpu, input, self)
    }

    fn attend_by(&self, policy: &PrefillPolicy, input: &PlanInput<'_>) -> Result<Partials, AttentionError> {
        // Rows that could not stay come here next: what was lacking then would be again, after the same work.
        let refused = self.fallbacks.take_refused(&RuleCallOf::of(input, input.queries.rows(), &[]));
        let by_rule = if refused { None } else { self.attend_by_rule(policy, input)? };
        by_rule.map_or_else(|| attend_by_lists(self, policy, input), Ok)
    }
}

/// Columns whose tiles are pinned at once, at most.
const COLUMN_TILES_MAX: usize = 256;

/// Shares of the budget: of tiles, of means that lists visit, of means by which blocks are chosen. Where lists run over tiles whose elements
/// became others, a third of the first is for those.
const TILE_EIGHTHS: usize = 6;
const OTHER_EIGHTHS: usize = 2;
const MEAN_EIGHTHS: usize = 1;
const SCORE_EIGHTHS: usize = 1;

fn eighths(tile: TileShape, element: PageElement) -> usize {
    match (list_element(tile) == tile.dtype.into(), element == tile.dtype.into()) {
        (true, _) => TILE_EIGHTHS,
        (false, true) => TILE_EIGHTHS - OTHER_EIGHTHS,
        (false, false) => OTHER_EIGHTHS,
    }
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

/// What the lists of a sparse item are folded onto; `None`: nothing.
fn earlier(item: &SparseItem<'_>) -> Result<Option<Partials>, Error> {
    let (Some(earlier), Some(stripe)) = (item.earlier, item.stripe) else {
        return Ok(item.earlier.or(item.stripe).cloned());
    };
    let mut both = earlier.clone();
    both.merge(stripe).map_err(refused)?;
    Ok(Some(both))
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
