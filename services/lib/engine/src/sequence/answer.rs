//! Rows of an answer, in which streaming heads visit the first and the newest blocks only.

use futures::future::join_all;
use longshore_attention::{PrefillPolicy, Streaming};
use longshore_fabric::CallContext;

use super::Sequence;
use crate::{Engine, Error};

/// What the rows of an answer visited, over all layers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AnswerVisits {
    /// Blocks that were visited, one count per row, layer and KV head.
    pub blocks: u64,
    /// Blocks that exact attention would have visited.
    pub of: u64,
}

/// The rows of an answer under a policy with streaming heads.
#[derive(Debug)]
pub(crate) struct Answer {
    /// Position of the first of them.
    from: u64,
    /// What the KV heads of each layer visit; `None`: everything.
    layers: Vec<Option<Vec<Option<Streaming>>>>,
    visits: AnswerVisits,
}

impl Sequence {
    /// In rows of later steps from the end of a prompt of `prompt_tokens` on, the streaming heads of `policy` visit the first and the
    /// newest blocks only, whoever computes the rows: they belong to the answer. The guards `dense_layers` and `min_positions` count
    /// as in a prompt. Does nothing where no head streams; refuses a plan for another model.
    pub fn set_answer(
        &mut self,
        engine: &Engine,
        policy: &PrefillPolicy,
        prompt_tokens: u64,
    ) -> Result<(), Error> {
        self.answer = None;
        if policy.streams_answers() {
            let heads = engine.backend().config().heads;
            let layers = (0..self.layers).map(|layer| policy.answer_heads(layer, heads));
            let layers = layers.collect::<Result<_, _>>().map_err(|error| Error::Invalid {
                field: "prefill_policy",
                problem: format!("is `{policy}`, which cannot be followed: {error}"),
            })?;
            let from = policy.answer_from(prompt_tokens);
            self.answer = Some(Answer { from, layers, visits: AnswerVisits::default() });
        }
        Ok(())
    }

    /// Position from which on heads may stream.
    pub(crate) fn answer_from(&self) -> Option<u64> {
        self.answer.as_ref().map(|answer| answer.from)
    }

    /// What the KV heads of a layer visit in rows from [`Self::answer_from`] on; `None`: everything.
    pub(crate) fn answer_heads(&self, layer: usize) -> Option<&[Option<Streaming>]> {
        self.answer.as_ref().and_then(|answer| answer.layers.get(layer)?.as_deref())
    }

    /// What rows visited since [`Self::set_answer`]; nothing where no head streams.
    pub fn answer_visits(&self) -> AnswerVisits {
        self.answer.as_ref().map_or_else(AnswerVisits::default, |answer| answer.visits)
    }

    /// Counts the rows of a step that ends.
    pub(super) fn count_answer(&mut self) {
        let (block, kv_heads) = (self.shape.block_tokens as u64, self.shape.kv_heads as u64);
        let rows = self.done..self.done + self.under_way;
        let Some(answer) = self.answer.as_mut() else { return };
        for position in rows.start.max(answer.from)..rows.end {
            let all = position / block + 1;
            let of_head = |rule: &Option<Streaming>| match rule {
                Some(rule) => {
                    rule.blocks(position, position, block).into_iter().map(|run| run.end - run.start).sum()
                }
                None => all,
            };
            for heads in &answer.layers {
                answer.visits.of += all * kv_heads;
                answer.visits.blocks += match heads {
                    Some(heads) => heads.iter().map(of_head).sum(),
                    None => all * kv_heads,
                };
            }
        }
    }

    /// Whether some shards may not be asked for long, so that their views need [`Self::keep_views`].
    pub fn leaves_views_idle(&self) -> bool {
        (self.answer.is_some() || self.prefill.is_some()) && !self.views.is_empty()
    }

    /// Renews the leases of all views: queries alone would not where policies leave shards out. What fails here is told by the next use.
    pub async fn keep_views(&self, ctx: &CallContext) {
        let kept = self.views.iter().map(|view| self.open_view(ctx, view.shard, Vec::new(), Some(view.id)));
        for error in join_all(kept).await.into_iter().filter_map(Result::err) {
            tracing::debug!(%error, "the lease of a view was not renewed");
        }
    }
}
