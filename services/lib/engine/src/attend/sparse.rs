//! Attention of one sequence by a sparse policy: plan, run, finish. Blocks that lie on shards are visited there.

mod ask;
mod lists;
mod shards;

use std::time::Instant;

use longshore_attention::{
    Cosines, PagedKv, Partials, PlanInput, Queries, SparseItem, SparseWork, Tile, TileShape,
};

use super::{LayerAttention, Part};
use crate::{
    Error, Sequence, StepObserver,
    sequence::{LayerTiles, SparsePrefill},
    step::AttentionProbe,
};

/// What shards did for one sequence in one layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RemoteVisits {
    /// Lists (of a KV head and a query tile, or a part of its rows) that shards ran.
    pub lists: u64,
    /// Blocks that they visited, one count per list.
    pub blocks: u64,
    /// Bytes of the queries that went out.
    pub query_bytes: u64,
    /// Bytes of the partials that came back.
    pub partial_bytes: u64,
}

impl LayerAttention<'_, '_> {
    /// Attends the rows of `part` and writes f32 `[rows, query_heads * head_dim]` to `output`. When a shard fails or is late, nothing is
    /// written and the failure is the sequence's, unless other copies take over.
    pub(super) fn run_sparse(
        &mut self,
        part: &Part,
        q: &[f32],
        output: &mut [f32],
        observer: &mut dyn StepObserver,
    ) -> Result<(), Error> {
        if self.failed[part.input].is_some() {
            return Ok(());
        }
        let sequence = &*self.batch[part.input].sequence;
        let prefill = sequence.prefill().expect("the sequence has a sparse policy");
        with_plan(sequence, prefill, self.layer, self.queries(part, q), |plan| {
            self.run_by((sequence, prefill), part, plan, output, observer)
        })
    }

    /// [`Self::run_sparse`], given what the policy reads.
    fn run_by(
        &mut self,
        (sequence, prefill): (&Sequence, &SparsePrefill),
        part: &Part,
        plan: &PlanInput<'_>,
        output: &mut [f32],
        observer: &mut dyn StepObserver,
    ) -> Result<(), Error> {
        let executor = self.engine.executor();
        let is_here = sequence.remote_blocks() == 0;
        let started = Instant::now();
        if is_here && !observer.probes() {
            output.copy_from_slice(&executor.attend_by(&prefill.policy, plan)?.finish());
            self.times.local += started.elapsed();
            return Ok(());
        }
        let work = executor.plan(&prefill.policy, plan)?;
        let plan_time = started.elapsed();
        self.times.plan += plan_time;
        let started = Instant::now();
        let partials = match is_here {
            true => self.run_here(plan, &work, prefill.policy.skip_below()),
            false => self.run_on_shards(part, plan, &work, observer),
        };
        let partials = match partials {
            Ok(partials) => partials,
            Err(error) if error.failed_shard().is_some() => {
                self.lose(part.input, &error);
                self.failed[part.input] = Some(error);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        output.copy_from_slice(&partials.finish());
        let attend_time = started.elapsed();
        observer.probe(&AttentionProbe {
            layer: self.layer,
            plan: *plan,
            work: &work,
            output,
            plan_time,
            attend_time,
        });
        Ok(())
    }

    /// Runs lists whose blocks are all here.
    fn run_here(
        &mut self,
        plan: &PlanInput<'_>,
        work: &SparseWork,
        skip_below: Option<f32>,
    ) -> Result<Partials, Error> {
        let started = Instant::now();
        let item = SparseItem {
            queries: plan.queries,
            kv: plan.kv,
            summaries: plan.summaries,
            work,
            earlier: None,
            stripe: None,
            skip_below,
        };
        let partials = self.engine.executor().attend_sparse(&[item])?.pop();
        self.times.local += started.elapsed();
        Ok(partials.expect("an executor answers every item"))
    }
}

/// Calls `take` with what the policy of a sequence is followed by in a layer.
pub(super) fn with_plan<R>(
    sequence: &Sequence,
    prefill: &SparsePrefill,
    layer: usize,
    queries: Queries<'_>,
    take: impl FnOnce(&PlanInput<'_>) -> R,
) -> R {
    let tiles = AllBlocks { local: sequence.layer(layer), remote: sequence.remote_blocks() as usize };
    let summaries = &prefill.summaries[layer];
    let spreads = summaries.spreads();
    let cosines = |block, kv_head| summaries.cosine(block, kv_head);
    take(&PlanInput {
        queries,
        layer,
        kv: &tiles,
        first_block: 0,
        summaries,
        stripe_blocks: sequence.geometry().stripe_blocks(),
        dense_from: prefill.dense_from,
        spreads: prefill.reads.spreads.then_some(&spreads as &dyn PagedKv),
        cosines: prefill.reads.cosines.then_some(&cosines as Cosines<'_>),
    })
}

/// All blocks of a sequence in one layer, for who plans. Only those after the remote ones have tiles here.
struct AllBlocks<'a> {
    local: LayerTiles<'a>,
    remote: usize,
}

impl PagedKv for AllBlocks<'_> {
    fn shape(&self) -> TileShape {
        self.local.shape()
    }

    fn len(&self) -> usize {
        self.remote + self.local.len()
    }

    /// # Panics
    /// When the block lies on a shard. Policies that read keys while they plan are refused such blocks.
    fn tile(&self, index: usize) -> &Tile {
        let local = index.checked_sub(self.remote).expect("no plan reads the keys of blocks on shards");
        self.local.tile(local)
    }
}
