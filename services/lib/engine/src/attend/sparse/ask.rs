//! The remote half of sparse attention: one query per shard, one item per list, and what the answers must look like.

use std::{
    collections::{BTreeMap, HashMap},
    time::Instant,
};

use longshore_attention::{HeadShape, Partials, PlanInput, Queries};
use longshore_fabric::{PendingAttend, StripePartial};
use longshore_proto::types::{AttendItem, AttendQuery, SparseVisits};

use super::{
    RemoteVisits,
    lists::{Lists, Span},
};
use crate::{
    Error, Sequence,
    attend::{LayerAttention, Part, remote::head_queries},
    health::Question,
};

/// A list that went to a shard.
struct Asked {
    /// Number of the span in the wave.
    span: usize,
    kv_head: usize,
    /// Stripes of the view that it visits, ascending.
    stripes: Vec<u64>,
}

/// What shards answered to one wave, by stripe.
pub(super) struct Answers {
    /// Span, KV head, and the partial of its rows and heads.
    stripes: BTreeMap<u64, Vec<(usize, usize, Partials)>>,
}

impl LayerAttention<'_, '_> {
    /// Sends the lists of a wave to the shards that have the blocks, and waits for all answers.
    pub(super) fn ask_lists(
        &mut self,
        part: &Part,
        plan: &PlanInput<'_>,
        lists: &Lists,
        spans: &[Span],
        visits: &mut RemoteVisits,
    ) -> Result<Answers, Error> {
        let sequence = &*self.batch[part.input].sequence;
        let owners = owners(sequence);
        let mut views: Vec<usize> = (0..sequence.views().len()).collect();
        // Shards of this process compute while they are asked; the others shall compute meanwhile.
        views.sort_by_key(|&view| sequence.links().links()[sequence.views()[view].shard].attend.is_here());
        let started = Instant::now();
        let mut pending = Vec::new();
        for view in views {
            let shard = sequence.views()[view].shard;
            let (items, asked) = self.items(sequence, view, &owners, plan, lists, spans);
            if items.is_empty() {
                continue;
            }
            let blocks = items.iter().map(visited_blocks).sum::<u64>();
            visits.lists += items.len() as u64;
            visits.query_bytes += items.iter().map(|item| item.queries.data.len() as u64).sum::<u64>();
            visits.blocks += blocks;
            let question = (Question::Visits(blocks as usize), tokio::time::Instant::now());
            pending.push((shard, asked, question, self.send(sequence, shard, items)));
        }
        let waiting = Instant::now();
        let mut answers = Answers { stripes: BTreeMap::new() };
        for (shard, asked, question, pending) in pending {
            let partials = self.hear((sequence.links(), shard), question, pending)?;
            self.take(sequence, shard, (plan.queries.shape, spans), &asked, partials, &mut answers, visits)?;
        }
        self.times.waited += waiting.elapsed();
        self.times.round_trip += started.elapsed();
        Ok(answers)
    }

    /// One item per list that visits blocks of the view.
    fn items(
        &self,
        sequence: &Sequence,
        view: usize,
        owners: &HashMap<u64, usize>,
        plan: &PlanInput<'_>,
        lists: &Lists,
        spans: &[Span],
    ) -> (Vec<AttendItem>, Vec<Asked>) {
        let view_id = sequence.views()[view].id;
        let skip_below = sequence.prefill().and_then(|prefill| prefill.policy.skip_below());
        let (mut items, mut asked) = (Vec::new(), Vec::new());
        for (number, span) in spans.iter().enumerate() {
            for kv_head in 0..plan.queries.shape.kv_heads {
                let list = lists.list(kv_head, span.tile).iter();
                let own = list
                    .filter(|visits| owners.get(&visits.stripe) == Some(&view) && !visits.remote.is_empty());
                let (mut runs, mut stripes): (Vec<std::ops::Range<u64>>, _) = (Vec::new(), Vec::new());
                for visits in own {
                    stripes.push(visits.stripe);
                    for run in &visits.remote {
                        match runs.last_mut().filter(|last| last.end == run.start) {
                            Some(last) => last.end = run.end,
                            None => runs.push(run.clone()),
                        }
                    }
                }
                if stripes.is_empty() {
                    continue;
                }
                items.push(AttendItem {
                    view_id,
                    first_position: plan.queries.first_position + span.rows.start as u64,
                    queries: head_queries(&plan.queries, &span.rows, kv_head),
                    scale: plan.queries.scale,
                    sparse: Some(SparseVisits { kv_head: kv_head as u32, runs, skip_below }),
                });
                asked.push(Asked { span: number, kv_head, stripes });
            }
        }
        (items, asked)
    }

    fn send(
        &self,
        sequence: &Sequence,
        shard: usize,
        items: Vec<AttendItem>,
    ) -> Result<PendingAttend, longshore_fabric::Error> {
        let identity = *sequence.identity();
        let query = AttendQuery { query_id: 0, identity, layer: self.layer as u32, items };
        let ctx = self.ctx.child().with_timeout(self.engine.options().attend_timeout);
        let links = sequence.links();
        let link = &links.links()[shard].attend;
        links.second_asks.asked();
        let ask = || link.query_blocking(&ctx, query);
        if link.is_here() { ask() } else { self.engine.while_waiting(ask) }
    }

    /// Takes the answer of one shard; its partials are those of the stripes that were asked for, in order.
    #[allow(clippy::too_many_arguments, reason = "what was asked, and where the answer goes")]
    fn take(
        &self,
        sequence: &Sequence,
        shard: usize,
        (shape, spans): (HeadShape, &[Span]),
        asked: &[Asked],
        partials: Vec<StripePartial>,
        answers: &mut Answers,
        visits: &mut RemoteVisits,
    ) -> Result<(), Error> {
        let expected = asked.iter().enumerate();
        let expected =
            expected.flat_map(|(item, list)| list.stripes.iter().map(move |&stripe| (item as u32, stripe)));
        let shapes = partials.iter().all(|answer| {
            let rows = asked.get(answer.item as usize).map(|list| spans[list.span].rows.len());
            Some(answer.partial.shape()) == rows.map(|rows| (rows, shape.group, shape.head_dim))
        });
        if !shapes || !partials.iter().map(|answer| (answer.item, answer.stripe)).eq(expected) {
            let problem = "other partials than those of the stripes that lists visit".to_owned();
            return Err(Error::Mismatch { shard: sequence.links().links()[shard].id.clone(), problem });
        }
        for StripePartial { item, stripe, partial } in partials {
            let list = &asked[item as usize];
            let (rows, heads, dim) = partial.shape();
            visits.partial_bytes += (rows * heads * (dim + 2) * size_of::<f32>()) as u64;
            answers.stripes.entry(stripe).or_default().push((list.span, list.kv_head, partial));
        }
        Ok(())
    }
}

impl Answers {
    /// The partials of one stripe in place, for the rows of the wave; `None` when no list visits a block of it on a shard.
    pub(super) fn stripe(
        &self,
        stripe: u64,
        queries: &Queries<'_>,
        spans: &[Span],
    ) -> Result<Option<Partials>, Error> {
        let Some(parts) = self.stripes.get(&stripe) else { return Ok(None) };
        let (shape, first) = (queries.shape, spans[0].rows.start);
        let mut whole = Partials::identity(queries.rows(), shape.query_heads(), shape.head_dim);
        for (span, kv_head, partial) in parts {
            whole.place(spans[*span].rows.start - first, kv_head * shape.group, partial)?;
        }
        Ok(Some(whole))
    }
}

/// Blocks that an item visits.
fn visited_blocks(item: &AttendItem) -> u64 {
    let runs = item.sparse.as_ref().map_or(&[][..], |visits| &visits.runs);
    runs.iter().map(|run| run.end - run.start).sum()
}

/// View that answers for every stripe with blocks on shards.
fn owners(sequence: &Sequence) -> HashMap<u64, usize> {
    let views = sequence.views().iter().enumerate();
    let parts = views.flat_map(|(view, opened)| opened.parts.iter().map(move |part| (part, view)));
    parts.filter(|(part, _)| part.used).map(|(part, view)| (part.stripe, view)).collect()
}
