//! Attention of one sequence by a sparse policy: plan, run, finish. All its blocks are here.

use std::time::Instant;

use longshore_attention::{PlanInput, SparseItem};

use super::{LayerAttention, Part};
use crate::{Error, StepObserver, step::AttentionProbe};

impl LayerAttention<'_, '_> {
    /// Attends the rows of `part` and writes f32 `[rows, query_heads * head_dim]` to `output`.
    pub(super) fn run_sparse(
        &mut self,
        part: &Part,
        q: &[f32],
        output: &mut [f32],
        observer: &mut dyn StepObserver,
    ) -> Result<(), Error> {
        let sequence = &*self.batch[part.input].sequence;
        let prefill = sequence.prefill().expect("the sequence has a sparse policy");
        let (tiles, executor) = (sequence.layer(self.layer), self.engine.executor());
        let summaries = &prefill.summaries[self.layer];
        let spreads = summaries.spreads();
        let cosines = |block, kv_head| summaries.cosine(block, kv_head);
        let plan = PlanInput {
            queries: self.queries(part, q),
            layer: self.layer,
            kv: &tiles,
            first_block: sequence.remote_blocks(),
            summaries,
            stripe_blocks: self.engine.geometry().stripe_blocks(),
            dense_from: prefill.dense_from,
            spreads: Some(&spreads),
            cosines: Some(&cosines),
        };
        let started = Instant::now();
        let work = executor.plan(&prefill.policy, &plan)?;
        let plan_time = started.elapsed();
        let started = Instant::now();
        let item = SparseItem {
            queries: plan.queries,
            kv: plan.kv,
            summaries: plan.summaries,
            work: &work,
            earlier: None,
            stripe: None,
            skip_below: prefill.policy.skip_below(),
        };
        let partials = executor.attend_sparse(&[item])?.pop().expect("an executor answers every item");
        output.copy_from_slice(&partials.finish());
        let attend_time = started.elapsed();
        self.times.plan += plan_time;
        self.times.local += attend_time;
        observer.probe(&AttentionProbe {
            layer: self.layer,
            plan,
            work: &work,
            output,
            plan_time,
            attend_time,
        });
        Ok(())
    }
}
