//! Runs work lists: what an executor is, and the one for the CPU.
//!
//! # Canonical arithmetic
//!
//! The bits of a row's result depend on the row, the keys that it sees and their division into blocks; on nothing else.
//! All of it is f32; `fma(a, b, c)` is `a * b + c`, rounded once.
//!
//! 1. A **block** is one entry of `exact` (its keys in order), then each run of `block_tokens` entries of `columns`, then
//!    each run of `block_tokens` entries of `summaries` that belong to the KV head, all in list order.
//! 2. Logits: `s = fma(q[i], k[i], s)` from 0 over the elements in order, in int8 tiles then `s = s * key's scale`;
//!    `t = fma(s, scale * log2(e), b)`, where `b` is 0, or a column's bias, or, for a summary, the f32 nearest to
//!    `log2(weight) + bias` (a sum of f64). Elements of f16, bf16 and int8 tiles are widened, which is exact.
//! 3. Keys after the row's position do not take part: neither their logits nor their values enter any arithmetic.
//! 4. Block partial: `m` is the largest `t` (never −0); `p = exp2(t - m)`; `l` adds the `p` of keys 0, 16, 32, … of the
//!    block in order, likewise 1, 17, …, and the 16 sums pairwise (distance 8, 4, 2, 1); `o[i] = fma(w, v[i], o[i])` from 0
//!    over the keys in order, where `w` is `p` or, in int8 tiles, `p * value's scale`. A block without a visible key is
//!    the identity.
//! 5. Block partials are folded in order onto `initial`, by the arithmetic of [`Partials::merge`].
//!
//! So rows, items, threads, instruction sets, padding and keys that a row does not see change no bit, and a fold may be cut
//! between two blocks and continued through [`AttendItem::initial`].
//!
//! A [`crate::SparseWork`] list is folded by the same rules, and these:
//!
//! 6. A block is one [`crate::Visit`]. The keys of [`crate::Visit::Means`] that count are those in its mask: the others do not
//!    exist, even if they are NaN. `b` is log2 of the `block_tokens` of the KV source, and key 0 in rule 4 is `first` (a
//!    multiple of 16).
//! 7. Blocks are folded onto the partial of the stripe, in list order, which is empty before the first (or
//!    [`SparseItem::stripe`]). At [`crate::Visit::EndOfStripe`] and at the end of the list the stripe's partial is folded onto
//!    the total, by the arithmetic of [`Partials::merge`]; the total begins with [`SparseItem::earlier`].
//! 8. With [`SparseItem::skip_below`] `= d`, a row leaves out a [`crate::Visit::Block`] whose last key lies before its position
//!    when the largest `t` of the block is `< m − d` (f32), `m` being that of the row's stripe partial. Each row decides for
//!    itself, and by its stripe alone: so chunks and the places of stripes change no bit here either. Time is saved where all
//!    rows that are computed together (at most six neighbours) leave it out.

mod block;
mod check;
mod group;
pub(crate) mod microkernel;
mod output;
mod row_tile;
mod schedule;
mod sparse;
mod state;
#[cfg(test)]
mod unseen;

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use longshore_compute::{ComputePool, InstructionSet};

use crate::shape::LANES;
use crate::simd::dispatch;
use crate::{
    Error, Partials, PlanInput, PrefillPolicy, Queries, SparseItem, SparseWork, Tile, TileShape, WorkList,
};
use output::{BlockPartials, FoldPartials, Output, Room};
use row_tile::{FoldBlocks, Target, with_scratch};
use schedule::{Region, Task};

/// A paged KV source: the tiles of one sequence in one layer.
pub trait PagedKv: Sync {
    /// Shape of every tile.
    fn shape(&self) -> TileShape;
    /// Number of tiles.
    fn len(&self) -> usize;
    /// True when there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The tile at `index` < len.
    fn tile(&self, index: usize) -> &Tile;
    /// The one KV head of its tiles that the source shows; [`Self::shape`] then says one KV head, its tiles have more. Sparse
    /// calls alone know such sources. `None`: all heads.
    fn only_head(&self) -> Option<usize> {
        None
    }
}

/// One sequence's part of an attention call.
#[derive(Clone, Copy)]
pub struct AttendItem<'a> {
    /// Rotated query rows.
    pub queries: Queries<'a>,
    /// Keys and values.
    pub kv: &'a dyn PagedKv,
    /// What to visit.
    pub work: &'a WorkList,
    /// Partial to fold onto (keys that come before the work list's); `None` is the identity.
    pub initial: Option<&'a Partials>,
}

impl AttendItem<'_> {
    /// Checks every index, length and shape, as executors do before they compute.
    pub fn validate(&self) -> Result<(), Error> {
        check::check(self)
    }
}

impl std::fmt::Debug for AttendItem<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AttendItem")
            .field("queries", &self.queries.shape)
            .field("tiles", &self.kv.len())
            .field("exact", &self.work.exact.len())
            .field("columns", &self.work.columns.len())
            .field("summaries", &self.work.summaries.len())
            .field("continues", &self.initial.is_some())
            .finish()
    }
}

impl SparseItem<'_> {
    /// Checks every index, length and shape, as executors do before they compute.
    pub fn validate(&self) -> Result<(), Error> {
        sparse::check(self)
    }
}

/// Runs work lists on some device.
pub trait Executor: Send + Sync + std::fmt::Debug {
    /// One partial per item. Validates every index, length and shape before it computes.
    fn attend(&self, items: &[AttendItem<'_>]) -> Result<Vec<Partials>, Error>;

    /// One partial per item: `earlier`, then the stripes of its lists. Validates like [`Self::attend`].
    fn attend_sparse(&self, items: &[SparseItem<'_>]) -> Result<Vec<Partials>, Error>;

    /// The lists of `policy` for all rows of `input`, see [`PrefillPolicy::plan`].
    fn plan(&self, policy: &PrefillPolicy, input: &PlanInput<'_>) -> Result<SparseWork, Error>;

    /// Attention of all rows of `input` by `policy`, all of whose blocks are here, for who does not look at the lists: an executor on a device
    /// may make them there.
    fn attend_by(&self, policy: &PrefillPolicy, input: &PlanInput<'_>) -> Result<Partials, Error> {
        attend_by_lists(self, policy, input)
    }
}

/// [`Executor::plan`], then [`Executor::attend_sparse`] over its lists.
pub fn attend_by_lists<E: Executor + ?Sized>(
    executor: &E,
    policy: &PrefillPolicy,
    input: &PlanInput<'_>,
) -> Result<Partials, Error> {
    let work = executor.plan(policy, input)?;
    let item = SparseItem {
        queries: input.queries,
        kv: input.kv,
        summaries: input.summaries,
        work: &work,
        earlier: None,
        stripe: None,
        skip_below: policy.skip_below(),
    };
    let partials = executor.attend_sparse(&[item])?.pop();
    Ok(partials.expect("an executor answers every item"))
}

/// The CPU executor. A call is one region of the pool, or a few when there is work for many milliseconds, or none when it
/// is small.
#[derive(Debug, Clone)]
pub struct CpuExecutor {
    pool: Arc<ComputePool>,
    instruction_set: InstructionSet,
}

impl CpuExecutor {
    /// Runs on `pool`, with the best instruction set of the machine.
    pub fn new(pool: Arc<ComputePool>) -> Self {
        Self { pool, instruction_set: InstructionSet::detect() }
    }

    /// Runs on the calling thread alone: for tests.
    pub fn serial() -> Self {
        Self::new(ComputePool::serial())
    }

    /// Uses `instruction_set`, which changes no bit of any result.
    ///
    /// # Panics
    /// When the machine does not have it.
    #[must_use]
    pub fn with_instruction_set(self, instruction_set: InstructionSet) -> Self {
        assert!(
            InstructionSet::available().contains(&instruction_set),
            "this machine does not have {instruction_set}"
        );
        Self { instruction_set, ..self }
    }

    /// What the kernels use.
    pub fn instruction_set(&self) -> InstructionSet {
        self.instruction_set
    }

    /// Where the kernels run.
    pub(crate) fn pool(&self) -> &Arc<ComputePool> {
        &self.pool
    }

    fn run(&self, items: &[AttendItem<'_>], outputs: &[Output<'_>], region: &Region, room: &mut Room) {
        let panels = |item: usize| items[item].queries.shape.head_dim.div_ceil(LANES);
        let sizes = region.apart.iter().map(|tile| (tile.blocks, tile.rows.count, panels(tile.item)));
        let sums = sizes.clone().map(|(blocks, rows, _)| blocks * rows).sum();
        let lanes = sizes.clone().map(|(blocks, rows, panels)| blocks * rows * panels).sum();
        room.resize(sums, lanes);
        let apart = room.deal(sizes);
        let done: Vec<AtomicUsize> = apart.iter().map(|_| AtomicUsize::new(0)).collect();
        let run = |index: usize| {
            let task = &region.tasks[index];
            // The tasks in between are for the other threads.
            let after = region.tasks.get(index + self.pool.threads());
            let after = after.and_then(|task| first_tile(&items[task.item], task));
            self.run_task(&items[task.item], task, after, &outputs[task.item], &apart);
            let Some((number, _)) = task.apart else { return };
            let tile = &region.apart[number];
            // Whoever ends last sees what the others wrote.
            if done[number].fetch_add(1, Ordering::AcqRel) + 1 == tile.tasks {
                let (output, partials) = (&outputs[tile.item], &apart[number]);
                dispatch(self.instruction_set, FoldPartials { output, rows: tile.rows, partials });
            }
        };
        if region.is_small() {
            (0..region.tasks.len()).for_each(run);
        } else {
            self.pool.run(region.tasks.len(), run);
        }
    }

    fn run_task(
        &self,
        item: &AttendItem<'_>,
        task: &Task,
        after: Option<(&Tile, usize)>,
        output: &Output<'_>,
        partials: &[BlockPartials<'_>],
    ) {
        let target = match task.apart {
            Some((number, first)) => Target::Apart(&partials[number], first),
            None => Target::Fold(output),
        };
        with_scratch(|scratch| {
            let (rows, blocks) = (task.rows, task.blocks.clone());
            dispatch(self.instruction_set, FoldBlocks { item, rows, blocks, after, target, scratch });
        });
    }
}

thread_local! {
    static ROOM: RefCell<Room> = RefCell::default();
}

impl Executor for CpuExecutor {
    fn attend(&self, items: &[AttendItem<'_>]) -> Result<Vec<Partials>, Error> {
        items.iter().try_for_each(check::check)?;
        let mut partials: Vec<Partials> =
            items.iter().map(|item| start(&item.queries, item.initial)).collect();
        let regions = schedule::regions(items, self.pool.threads());
        let outputs: Vec<Output<'_>> = items
            .iter()
            .zip(&mut partials)
            .map(|(item, partials)| Output::new(item.queries.shape, partials))
            .collect();
        ROOM.with_borrow_mut(|room| {
            for region in &regions {
                self.run(items, &outputs, region, room);
            }
        });
        drop(outputs);
        Ok(partials)
    }

    fn attend_sparse(&self, items: &[SparseItem<'_>]) -> Result<Vec<Partials>, Error> {
        sparse::attend(self, items)
    }

    fn plan(&self, policy: &PrefillPolicy, input: &PlanInput<'_>) -> Result<SparseWork, Error> {
        policy.plan(self, input)
    }
}

/// Tile and KV head that a task visits first, when that is an exact block.
fn first_tile<'a>(item: &AttendItem<'a>, task: &Task) -> Option<(&'a Tile, usize)> {
    let block = item.work.exact.get(task.blocks.start)?;
    Some((item.kv.tile(block.tile as usize), task.rows.kv_head))
}

/// What a result is before any block is folded onto it.
fn start(queries: &Queries<'_>, earlier: Option<&Partials>) -> Partials {
    let shape = queries.shape;
    earlier
        .cloned()
        .unwrap_or_else(|| Partials::identity(queries.rows(), shape.query_heads(), shape.head_dim))
}
