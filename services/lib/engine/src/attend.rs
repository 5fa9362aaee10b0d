//! Attention of one layer over local and remote blocks, folded in the canonical order: blocks within their stripe, then
//! stripes, whatever lies where.

mod answer;
mod elsewhere;
mod kept;
mod late;
mod remote;
mod sparse;

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use longshore_attention::{AttendItem, ExactBlock, Partials, Queries, SparseItem, SparseWork, WorkList};
use longshore_compute::ComputePool;
use longshore_fabric::CallContext;

use crate::{Engine, Error, Sequence, StepInput, StepObserver};

pub use sparse::RemoteVisits;

/// One layer of a step.
pub(crate) struct LayerAttention<'a, 'b> {
    pub(crate) engine: &'a Engine,
    pub(crate) ctx: &'a CallContext,
    pub(crate) layer: usize,
    pub(crate) batch: &'a [StepInput<'b>],
    pub(crate) failed: &'a mut Vec<Option<Error>>,
    pub(crate) times: AttendTimes,
    /// Where answers were bad or did not come; their sequences have failed, unless other copies take over.
    pub(crate) lost: Vec<Lost>,
    /// Waits for late answers.
    pub(crate) patient: bool,
}

pub(crate) use kept::LayerTurn;
pub(crate) use remote::Lost;

/// Consecutive rows of one sequence. Rows do not depend on each other, so that waves may cut anywhere.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    /// Index of the sequence in the batch.
    pub(crate) input: usize,
    /// Absolute position of the first row.
    pub(crate) first_position: u64,
    /// Rows of the queries.
    pub(crate) rows: Range<usize>,
}

/// Where the time of one layer's attention went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AttendTimes {
    /// From the first query to the last answer; zero when no shard was asked. A shard of this process answers while it is
    /// asked.
    pub round_trip: Duration,
    /// Of it, waiting with nothing left to compute here.
    pub waited: Duration,
    /// Computing over local blocks.
    pub local: Duration,
    /// Folding the partials of all stripes.
    pub merge: Duration,
    /// Making the lists of sparse policies.
    pub plan: Duration,
}

/// A partial per stripe of one part, unordered.
type StripePartials = Vec<(u64, Partials)>;

impl<'a, 'b> LayerAttention<'a, 'b> {
    /// Attention of `layer` for the sequences of `batch`; those that fail get their error in `failed`.
    pub(crate) fn new(
        engine: &'a Engine,
        ctx: &'a CallContext,
        layer: usize,
        batch: &'a [StepInput<'b>],
        failed: &'a mut Vec<Option<Error>>,
    ) -> Self {
        Self {
            engine,
            ctx,
            layer,
            batch,
            failed,
            times: AttendTimes::default(),
            lost: Vec::new(),
            patient: false,
        }
    }

    /// Attends `q` (f32 `[rows, query_heads, head_dim]`) and returns f32 `[rows, query_heads * head_dim]`; `parts` says whose
    /// rows they are. Rows of failed sequences are 0.
    pub(crate) fn run(
        &mut self,
        q: &[f32],
        parts: Vec<Part>,
        observer: &mut dyn StepObserver,
    ) -> Result<Vec<f32>, Error> {
        let width = self.row_width();
        let mut output = vec![0.0; q.len()];
        let parts = self.cut_at_answers(parts);
        let is_sparse =
            |part: &Part| self.batch[part.input].sequence.prefill().is_some() && !self.is_answer(part);
        let (sparse, parts): (Vec<Part>, Vec<Part>) = parts.into_iter().partition(is_sparse);
        for part in sparse {
            let rows = part.rows.start * width..part.rows.end * width;
            self.run_sparse(&part, q, &mut output[rows], observer)?;
        }
        for wave in self.waves(parts) {
            let partials = self.attend(&wave, q)?;
            let started = Instant::now();
            for (part, partials) in wave.iter().zip(partials) {
                let Some(merged) = fold(partials, &self.engine.pool)? else { continue };
                output[part.rows.start * width..part.rows.end * width].copy_from_slice(&merged);
            }
            self.times.merge += started.elapsed();
        }
        Ok(output)
    }

    /// Elements of one row of queries or output.
    fn row_width(&self) -> usize {
        let heads = self.engine.backend().config().heads;
        heads.query_heads() * heads.head_dim
    }

    /// Cuts the rows so that the partials of a wave stay within the budget.
    fn waves(&self, parts: Vec<Part>) -> Vec<Vec<Part>> {
        let heads = self.engine.backend().config().heads;
        let partial_bytes = heads.query_heads() * (heads.head_dim + 2) * size_of::<f32>();
        let budget = self.engine.options().wave_bytes;
        let (mut waves, mut wave, mut used) = (Vec::new(), Vec::new(), 0);
        for part in parts {
            let end = part.first_position + part.rows.len() as u64;
            let stripes = self.engine.geometry().stripe_of(end - 1) + 1;
            let row_bytes = partial_bytes * stripes as usize;
            let mut done = 0;
            while done < part.rows.len() {
                let room = (budget.saturating_sub(used) / row_bytes).min(part.rows.len() - done);
                if room == 0 && !wave.is_empty() {
                    waves.push(std::mem::take(&mut wave));
                    used = 0;
                    continue;
                }
                let (first, rows) = (part.rows.start + done, room.max(1));
                let first_position = part.first_position + done as u64;
                wave.push(Part { input: part.input, first_position, rows: first..first + rows });
                used += rows * row_bytes;
                done += rows;
            }
        }
        if !wave.is_empty() {
            waves.push(wave);
        }
        waves
    }

    /// The partials of each part: asks the shards, computes what does not depend on their answers, waits, and folds the
    /// rest of the stripe that is partly remote onto its remote part.
    fn attend(&mut self, wave: &[Part], q: &[f32]) -> Result<Vec<StripePartials>, Error> {
        let asked = Instant::now();
        let pending = self.ask_shards(wave, q);
        let any_remote = !pending.is_empty();
        let started = Instant::now();
        let local: Vec<(usize, StripeWork)> =
            self.stripe_work(wave, |sequence, stripe| !is_border(sequence, stripe))?;
        let mut partials = self.compute(wave, q, local, vec![Vec::new(); wave.len()])?;
        self.times.local += started.elapsed();
        let waiting = Instant::now();
        self.collect(wave, q, pending, &mut partials)?;
        if any_remote {
            self.times.waited += waiting.elapsed();
            self.times.round_trip += asked.elapsed();
        }
        let started = Instant::now();
        let border = self.stripe_work(wave, is_border)?;
        let mut partials = self.compute(wave, q, border, partials)?;
        self.times.local += started.elapsed();
        for (part, partials) in wave.iter().zip(&mut partials) {
            if self.failed[part.input].is_some() {
                partials.clear();
            }
        }
        Ok(partials)
    }

    /// Work over the local blocks of the stripes that `wanted` chooses, per part.
    fn stripe_work(
        &self,
        wave: &[Part],
        wanted: fn(&Sequence, u64) -> bool,
    ) -> Result<Vec<(usize, StripeWork)>, Error> {
        let mut work = Vec::new();
        for (index, part) in wave.iter().enumerate() {
            let sequence = &self.batch[part.input].sequence;
            if self.failed[part.input].is_some() {
                continue;
            }
            let end = part.first_position + part.rows.len() as u64;
            let stripes = match self.streaming(part) {
                Some(heads) => self.head_stripes(part, heads)?,
                None => StripeWork::of(sequence, end),
            };
            let wanted = stripes.into_iter().filter(|stripe| wanted(sequence, stripe.stripe));
            work.extend(wanted.map(|stripe| (index, stripe)));
        }
        Ok(work)
    }

    /// Runs the executor over `work` and puts the partials to those of their parts. A partial of the same stripe that is
    /// there already comes before it.
    fn compute(
        &self,
        wave: &[Part],
        q: &[f32],
        work: Vec<(usize, StripeWork)>,
        mut partials: Vec<StripePartials>,
    ) -> Result<Vec<StripePartials>, Error> {
        if work.is_empty() {
            return Ok(partials);
        }
        let tiles: Vec<_> =
            wave.iter().map(|part| self.batch[part.input].sequence.layer(self.layer)).collect();
        let initial: Vec<Option<Partials>> = work
            .iter()
            .map(|(part, work)| {
                let own = &mut partials[*part];
                let index = own.iter().position(|(stripe, _)| *stripe == work.stripe)?;
                Some(own.swap_remove(index).1)
            })
            .collect();
        let (mut exact, mut sparse) = (Vec::new(), Vec::new());
        for ((part, work), initial) in work.iter().zip(&initial) {
            let (queries, kv, initial) = (self.queries(&wave[*part], q), &tiles[*part], initial.as_ref());
            match &work.work {
                Work::All(work) => exact.push(AttendItem { queries, kv, work, initial }),
                // No visit names a mean.
                Work::Heads(work) => sparse.push(SparseItem {
                    queries,
                    kv,
                    summaries: kv,
                    work,
                    earlier: None,
                    stripe: initial,
                    skip_below: None,
                }),
            }
        }
        let mut exact = self.engine.executor().attend(&exact)?.into_iter();
        let mut sparse = self.engine.executor().attend_sparse(&sparse)?.into_iter();
        let computed = work.iter().map(|(_, work)| match &work.work {
            Work::All(_) => exact.next(),
            Work::Heads(_) => sparse.next(),
        });
        let computed: Vec<Partials> =
            computed.map(|partial| partial.expect("an executor answers every item")).collect();
        for ((part, work), partial) in work.iter().zip(computed) {
            partials[*part].push((work.stripe, partial));
        }
        Ok(partials)
    }

    fn queries<'q>(&self, part: &Part, q: &'q [f32]) -> Queries<'q> {
        let config = self.engine.backend().config();
        let width = self.row_width();
        Queries {
            shape: config.heads,
            first_position: part.first_position,
            scale: config.attention_scale(),
            data: &q[part.rows.start * width..part.rows.end * width],
        }
    }
}

/// Whether a part of `stripe` is remote and a part may be local.
fn is_border(sequence: &Sequence, stripe: u64) -> bool {
    let stripe_blocks = u64::from(sequence.geometry().stripe_blocks());
    stripe * stripe_blocks < sequence.remote_blocks()
}

/// The local blocks of one stripe.
#[derive(Debug)]
struct StripeWork {
    stripe: u64,
    work: Work,
}

/// What is visited of them.
#[derive(Debug)]
enum Work {
    /// The same by every head.
    All(WorkList),
    /// By each KV head its own, at least one.
    Heads(SparseWork),
}

impl StripeWork {
    /// Work over every local key of `sequence` before position `end`, one list per stripe, ascending.
    fn of(sequence: &Sequence, end: u64) -> Vec<Self> {
        let block_tokens = u64::from(sequence.geometry().block_tokens());
        let remote = sequence.remote_blocks();
        let mut stripes: Vec<(u64, WorkList)> = Vec::new();
        for block in remote..sequence.blocks_before(end) {
            let first_position = block * block_tokens;
            let exact = ExactBlock {
                tile: (block - remote) as u32,
                first_position,
                len: (end - first_position).min(block_tokens) as u32,
            };
            let stripe = sequence.geometry().stripe_of(block);
            match stripes.last_mut().filter(|(last, _)| *last == stripe) {
                Some((_, list)) => list.exact.push(exact),
                None => stripes.push((stripe, WorkList { exact: vec![exact], ..WorkList::default() })),
            }
        }
        stripes.into_iter().map(|(stripe, list)| Self { stripe, work: Work::All(list) }).collect()
    }
}

/// Attention out of the partials of all stripes, merged in ascending order; `None` when there are none.
fn fold(mut partials: StripePartials, pool: &ComputePool) -> Result<Option<Vec<f32>>, Error> {
    partials.sort_by_key(|(stripe, _)| *stripe);
    let mut partials = partials.into_iter().map(|(_, partial)| partial);
    let Some(first) = partials.next() else { return Ok(None) };
    let later: Vec<Partials> = partials.collect();
    Ok(Some(first.merge_and_finish(&later, pool)?))
}
