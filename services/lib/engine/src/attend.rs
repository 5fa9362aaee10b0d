//! Attention of one layer over local and remote blocks, folded in the canonical order: blocks within their stripe, then
//! stripes, whatever lies where.

mod remote;

use std::ops::Range;

use longshore_attention::{AttendItem, ExactBlock, Partials, Queries, WorkList};
use longshore_fabric::CallContext;

use crate::{Engine, Error, Sequence, StepInput};

/// One layer of a step.
pub(crate) struct LayerAttention<'a, 'b> {
    pub(crate) engine: &'a Engine,
    pub(crate) ctx: &'a CallContext,
    pub(crate) layer: usize,
    pub(crate) batch: &'a [StepInput<'b>],
    pub(crate) failed: &'a mut Vec<Option<Error>>,
}

/// Consecutive rows of one sequence. Rows do not depend on each other, so that waves may cut anywhere.
#[derive(Debug, Clone)]
struct Part {
    /// Index of the sequence in the batch.
    input: usize,
    /// Absolute position of the first row.
    first_position: u64,
    /// Rows of the whole step.
    rows: Range<usize>,
}

/// A partial per stripe of one part, unordered.
type StripePartials = Vec<(u64, Partials)>;

impl LayerAttention<'_, '_> {
    /// Attends `q` (f32 `[rows, query_heads, head_dim]`) and returns f32 `[rows, query_heads * head_dim]`; `first` is the
    /// first row of each sequence. Rows of failed sequences are 0.
    pub(crate) fn run(&mut self, q: &[f32], first: &[usize]) -> Result<Vec<f32>, Error> {
        let width = self.row_width();
        let mut output = vec![0.0; q.len()];
        for wave in self.waves(first) {
            for (part, partials) in wave.iter().zip(self.attend(&wave, q)?) {
                let Some(merged) = fold(partials)? else { continue };
                output[part.rows.start * width..part.rows.end * width].copy_from_slice(&merged.finish());
            }
        }
        Ok(output)
    }

    /// Elements of one row of queries or output.
    fn row_width(&self) -> usize {
        let heads = self.engine.backend().config().heads;
        heads.query_heads() * heads.head_dim
    }

    /// Cuts the rows so that the partials of a wave stay within the budget.
    fn waves(&self, first: &[usize]) -> Vec<Vec<Part>> {
        let heads = self.engine.backend().config().heads;
        let partial_bytes = heads.query_heads() * (heads.head_dim + 2) * size_of::<f32>();
        let budget = self.engine.options().wave_bytes;
        let (mut waves, mut wave, mut used) = (Vec::new(), Vec::new(), 0);
        for (input, (step, &first_row)) in self.batch.iter().zip(first).enumerate() {
            let position = step.sequence.position();
            let end = position + step.tokens.len() as u64;
            let stripes = self.engine.geometry().stripe_of(end - 1) + 1;
            let row_bytes = partial_bytes * stripes as usize;
            let mut row = 0;
            while row < step.tokens.len() {
                let room = (budget.saturating_sub(used) / row_bytes).min(step.tokens.len() - row);
                if room == 0 && !wave.is_empty() {
                    waves.push(std::mem::take(&mut wave));
                    used = 0;
                    continue;
                }
                let rows = room.max(1);
                let rows_of_step = first_row + row..first_row + row + rows;
                wave.push(Part { input, first_position: position + row as u64, rows: rows_of_step });
                used += rows * row_bytes;
                row += rows;
            }
        }
        waves.push(wave);
        waves
    }

    /// The partials of each part: asks the shards, computes what does not depend on their answers, waits, and folds the
    /// rest of the stripe that is partly remote onto its remote part.
    fn attend(&mut self, wave: &[Part], q: &[f32]) -> Result<Vec<StripePartials>, Error> {
        let pending = self.ask_shards(wave, q);
        let local: Vec<(usize, StripeWork)> =
            self.stripe_work(wave, |sequence, stripe| !is_border(sequence, stripe));
        let mut partials = self.compute(wave, q, local, vec![Vec::new(); wave.len()])?;
        self.collect(wave, q, pending, &mut partials)?;
        let border = self.stripe_work(wave, is_border);
        let mut partials = self.compute(wave, q, border, partials)?;
        for (part, partials) in wave.iter().zip(&mut partials) {
            if self.failed[part.input].is_some() {
                partials.clear();
            }
        }
        Ok(partials)
    }

    /// Work over the local blocks of the stripes that `wanted` chooses, per part.
    fn stripe_work(&self, wave: &[Part], wanted: fn(&Sequence, u64) -> bool) -> Vec<(usize, StripeWork)> {
        let mut work = Vec::new();
        for (index, part) in wave.iter().enumerate() {
            let sequence = &self.batch[part.input].sequence;
            if self.failed[part.input].is_some() {
                continue;
            }
            let end = part.first_position + part.rows.len() as u64;
            for stripe in StripeWork::of(sequence, end) {
                if wanted(sequence, stripe.stripe) {
                    work.push((index, stripe));
                }
            }
        }
        work
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
        let items: Vec<AttendItem<'_>> = work
            .iter()
            .zip(&initial)
            .map(|((part, work), initial)| AttendItem {
                queries: self.queries(&wave[*part], q),
                kv: &tiles[*part],
                work: &work.list,
                initial: initial.as_ref(),
            })
            .collect();
        let computed = self.engine.executor().attend(&items)?;
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
    list: WorkList,
}

impl StripeWork {
    /// Work over every local key of `sequence` before position `end`, one list per stripe, ascending.
    fn of(sequence: &Sequence, end: u64) -> Vec<Self> {
        let block_tokens = u64::from(sequence.geometry().block_tokens());
        let remote = sequence.remote_blocks();
        let mut stripes: Vec<Self> = Vec::new();
        for block in remote..sequence.blocks_before(end) {
            let first_position = block * block_tokens;
            let exact = ExactBlock {
                tile: (block - remote) as u32,
                first_position,
                len: (end - first_position).min(block_tokens) as u32,
            };
            let stripe = sequence.geometry().stripe_of(block);
            match stripes.last_mut().filter(|last| last.stripe == stripe) {
                Some(last) => last.list.exact.push(exact),
                None => {
                    stripes
                        .push(Self { stripe, list: WorkList { exact: vec![exact], ..WorkList::default() } });
                }
            }
        }
        stripes
    }
}

/// Merges the partials of all stripes, ascending; `None` when there are none.
fn fold(mut partials: StripePartials) -> Result<Option<Partials>, Error> {
    partials.sort_by_key(|(stripe, _)| *stripe);
    let mut partials = partials.into_iter().map(|(_, partial)| partial);
    let Some(mut merged) = partials.next() else { return Ok(None) };
    for partial in partials {
        merged.merge(&partial)?;
    }
    Ok(Some(merged))
}
