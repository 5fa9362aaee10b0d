//! Lists over blocks on shards: the shards answer one partial per stripe of a list that visits blocks of it; means and local blocks
//! are folded onto it here, and stripes in order, so that every bit is that of the same lists with all blocks in one place.

use std::{ops::Range, time::Instant};

use longshore_attention::{Partials, PlanInput, Queries, SparseItem, SparseWork, Visit};

use super::{
    RemoteVisits,
    ask::Answers,
    lists::{Lists, Span, WaveSizes, waves},
};
use crate::{
    Error, StepObserver,
    attend::{LayerAttention, Part},
    sequence::LayerTiles,
};

/// Rows of one wave, and what is folded onto what.
struct Fold<'a> {
    queries: Queries<'a>,
    kv: LayerTiles<'a>,
    plan: &'a PlanInput<'a>,
    lists: &'a Lists,
    spans: &'a [Span],
    skip_below: Option<f32>,
    total: Option<Partials>,
}

impl LayerAttention<'_, '_> {
    /// Runs the lists of `work`, wave by wave.
    pub(super) fn run_on_shards(
        &mut self,
        part: &Part,
        plan: &PlanInput<'_>,
        work: &SparseWork,
        observer: &mut dyn StepObserver,
    ) -> Result<Partials, Error> {
        let sequence = &*self.batch[part.input].sequence;
        let shape = plan.queries.shape;
        let lists = Lists::new(work, self.engine.geometry(), sequence.remote_blocks());
        let sizes = WaveSizes {
            partial_bytes_max: self.engine.options().wave_bytes,
            partial_bytes: shape.group * (shape.head_dim + 2) * size_of::<f32>(),
            query_bytes: self.row_width() * size_of::<f32>(),
        };
        let mut whole = Partials::identity(plan.queries.rows(), shape.query_heads(), shape.head_dim);
        let mut visits = RemoteVisits::default();
        for spans in waves(work, &lists, sizes) {
            let answers = self.ask_lists(part, plan, &lists, &spans, &mut visits)?;
            let started = Instant::now();
            let partials = self.fold_wave(part, plan, &lists, &spans, &answers)?;
            whole.place(spans[0].rows.start, 0, &partials)?;
            self.times.local += started.elapsed();
        }
        observer.visited_remotely(&visits);
        Ok(whole)
    }

    fn fold_wave(
        &self,
        part: &Part,
        plan: &PlanInput<'_>,
        lists: &Lists,
        spans: &[Span],
        answers: &Answers,
    ) -> Result<Partials, Error> {
        let sequence = &*self.batch[part.input].sequence;
        let prefill = sequence.prefill().expect("the sequence has a sparse policy");
        let width = self.row_width();
        let rows = spans[0].rows.start..spans.last().map_or(0, |span| span.rows.end);
        let queries = Queries {
            first_position: plan.queries.first_position + rows.start as u64,
            data: &plan.queries.data[rows.start * width..rows.end * width],
            ..plan.queries
        };
        let skip_below = prefill.policy.skip_below();
        let kv = sequence.layer(self.layer);
        let mut fold = Fold { queries, kv, plan, lists, spans, skip_below, total: None };
        // The last stripe with a block on a shard may go on here.
        let local = self.engine.geometry().stripe_of(sequence.remote_blocks() - 1) + 1;
        for stripe in 0..local {
            let partial = answers.stripe(stripe, &fold.queries, spans)?;
            fold.stripe(self, stripe, partial)?;
        }
        fold.rest(self, local)?;
        Ok(fold.total.take().unwrap_or_else(|| fold.identity()))
    }
}

impl Fold<'_> {
    fn identity(&self) -> Partials {
        let shape = self.queries.shape;
        Partials::identity(self.queries.rows(), shape.query_heads(), shape.head_dim)
    }

    /// Folds one stripe onto the total: what a shard answered, then what is here.
    fn stripe(
        &mut self,
        layer: &LayerAttention<'_, '_>,
        stripe: u64,
        partial: Option<Partials>,
    ) -> Result<(), Error> {
        if let Some(work) = self.work(stripe..stripe + 1)? {
            return self.run(layer, &work, partial.as_ref());
        }
        match (partial, self.total.as_mut()) {
            (None, _) => {}
            (Some(partial), Some(total)) => total.merge(&partial)?,
            (Some(partial), None) => self.total = Some(partial),
        }
        Ok(())
    }

    /// Folds the stripes from `first` on, which are all here.
    fn rest(&mut self, layer: &LayerAttention<'_, '_>, first: u64) -> Result<(), Error> {
        match self.work(first..u64::MAX)? {
            Some(work) => self.run(layer, &work, None),
            None => Ok(()),
        }
    }

    fn run(
        &mut self,
        layer: &LayerAttention<'_, '_>,
        work: &SparseWork,
        stripe: Option<&Partials>,
    ) -> Result<(), Error> {
        let item = SparseItem {
            queries: self.queries,
            kv: &self.kv,
            summaries: self.plan.summaries,
            work,
            earlier: self.total.as_ref(),
            stripe,
            skip_below: self.skip_below,
        };
        let partials = layer.engine.executor().attend_sparse(&[item])?.pop();
        self.total = Some(partials.expect("an executor answers every item"));
        Ok(())
    }

    /// What the rows visit here of some stripes; `None` when that is nothing.
    fn work(&self, stripes: Range<u64>) -> Result<Option<SparseWork>, Error> {
        let first = self.spans[0].rows.start;
        let (kv_heads, spans) = (self.queries.shape.kv_heads, self.spans);
        let mut lists = Vec::with_capacity(kv_heads * spans.len());
        for kv_head in 0..kv_heads {
            for span in spans {
                lists.push((self.local_visits(kv_head, span.tile, &stripes), Vec::new()));
            }
        }
        if lists.iter().all(|(visits, _)| visits.is_empty()) {
            return Ok(None);
        }
        let row_ends = spans.iter().map(|span| (span.rows.end - first) as u32).collect();
        Ok(Some(SparseWork::new(kv_heads, row_ends, lists)?))
    }

    fn local_visits(&self, kv_head: usize, tile: usize, stripes: &Range<u64>) -> Vec<Visit> {
        if stripes.end == stripes.start + 1 {
            let visits = self.lists.of_stripe(kv_head, tile, stripes.start);
            return visits.map(|visits| visits.local.clone()).unwrap_or_default();
        }
        let list = self.lists.list(kv_head, tile);
        let first = list.partition_point(|visits| visits.stripe < stripes.start);
        let ended = |visits: &super::lists::StripeVisits| [&visits.local[..], &[Visit::EndOfStripe]].concat();
        list[first..].iter().flat_map(ended).collect()
    }
}
