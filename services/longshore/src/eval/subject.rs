//! The model under examination: prompts in chunks under a policy, then greedy answers.

use std::{ops::Range, sync::Arc};

use anyhow::{Context, Result, ensure};
use longshore_blocks::{EXACT_PREFILL, ShardMap};
use longshore_compute::ComputePool;
use longshore_engine::{Engine, Logits, Sequence, ShardLinks, StepInput};
use longshore_fabric::CallContext;
use longshore_model::RowLogits;
use longshore_proto::types::Identity;
use tokio_util::task::TaskTracker;

use super::{candidate::Candidate, report::check_places, watch::Watch};
use crate::{cli::EvalArgs, config::Config, node::Node, process};

/// A model and an engine over sequences that no shard holds.
#[derive(Debug)]
pub(super) struct Subject {
    /// The model and what follows from it.
    pub(super) node: Node,
    engine: Arc<Engine>,
    /// Where everything is computed.
    pub(super) pool: Arc<ComputePool>,
    identity: Identity,
    links: Arc<ShardLinks>,
    ctx: CallContext,
    chunk_tokens: usize,
}

/// Chunks are whole spans of every policy's grid.
const CHUNK_GRID: usize = 512;

/// Logits of a step and the position of their first row.
pub(super) type Rows<'a> = &'a mut dyn FnMut(u64, &[f32]) -> Result<()>;

impl Subject {
    /// Loads what the flags name; `None`: the configuration was only to be printed or checked.
    pub(super) fn of(args: &EvalArgs) -> Result<Option<Self>> {
        let Some(config) = process::configuration(&args.serve, args.serve.settings())? else {
            return Ok(None);
        };
        if process::only_checked(&args.serve) {
            return Ok(None);
        }
        check_places(&args.output)?;
        let pool = process::compute_pool(&config)?;
        Self::load(&config, pool).map(Some)
    }

    /// Loads the model. Must be called on a thread of a runtime.
    pub(super) fn load(config: &Config, pool: Arc<ComputePool>) -> Result<Self> {
        let (node, engine) = Node::load(config, &pool)?;
        let links = ShardLinks::new(ShardMap::new(0, Vec::new())?, [], &TaskTracker::new(), 1)?;
        let deployment = node.deployment;
        let identity = Identity {
            deployment,
            namespace: deployment.namespace(EXACT_PREFILL, b"eval"),
            shard_map_epoch: 0,
        };
        let chunk_tokens = (config.prefill.chunk_tokens as usize).next_multiple_of(CHUNK_GRID);
        let links = Arc::new(links);
        Ok(Self { node, engine, pool, identity, links, ctx: CallContext::new("eval"), chunk_tokens })
    }

    /// The policies that the flags name.
    pub(super) fn candidates(&self, args: &EvalArgs) -> Result<Vec<Candidate>> {
        Candidate::all(args, self.node.head_plan.as_deref())
    }

    /// Refuses lengths beyond what the model was made for.
    pub(super) fn check_lengths(&self, lengths: &[u32]) -> Result<()> {
        let limit = self.node.context_tokens.max(self.node.info.config.context_tokens);
        for &length in lengths {
            ensure!(
                u64::from(length) <= limit,
                "`--lengths` has {length}, the model has {limit} positions; hint: `--max-context-tokens {length}`, with `--rope-scaling yarn:F` where the model was not made for them"
            );
        }
        Ok(())
    }

    /// Tokens of a step.
    pub(super) fn chunk_tokens(&self) -> usize {
        self.chunk_tokens
    }

    /// Entries of the vocabulary.
    pub(super) fn vocabulary(&self) -> usize {
        self.engine.backend().config().vocabulary
    }

    /// Layers.
    pub(super) fn layers(&self) -> usize {
        self.engine.backend().config().layers
    }

    /// Computes a prompt under a policy. `wanted` says which logits of the rows of a chunk (by position) are needed, and
    /// `rows` is given them: f32 `[rows, vocabulary]`.
    pub(super) fn prefill(
        &self,
        tokens: &[u32],
        candidate: &Candidate,
        wanted: &dyn Fn(Range<u64>) -> Logits,
        rows: Rows<'_>,
        watch: &mut Watch<'_>,
    ) -> Result<Sequence> {
        let mut sequence = Sequence::new(&self.engine, self.identity, Arc::clone(&self.links));
        sequence.set_prefill(Arc::clone(&candidate.policy), candidate.dense_from(tokens.len()))?;
        for chunk in tokens.chunks(self.chunk_tokens) {
            let first = sequence.position();
            let end = first + chunk.len() as u64;
            let logits = wanted(first..end);
            let mut batch = [StepInput { sequence: &mut sequence, tokens: chunk, logits }];
            let mut outputs = self.engine.step(&self.ctx, &mut batch, watch)?;
            if let Some(found) = outputs.pop().context("a step has no output")??.map(RowLogits::into_all) {
                let count = (found.len() / self.vocabulary()) as u64;
                rows(end - count, &found)?;
            }
        }
        Ok(sequence)
    }

    /// Computes a prompt and generates greedily after it, exactly but for streaming heads, until an end token, `most` tokens, or `enough` says so.
    pub(super) fn answer(
        &self,
        tokens: &[u32],
        candidate: &Candidate,
        most: usize,
        enough: &dyn Fn(&[u32]) -> bool,
        watch: &mut Watch<'_>,
    ) -> Result<Vec<u32>> {
        let end = tokens.len() as u64;
        let wanted = |rows: Range<u64>| if rows.end == end { Logits::Last } else { Logits::None };
        let mut next = 0;
        let mut first = |_: u64, logits: &[f32]| {
            next = likeliest(logits);
            Ok(())
        };
        let mut sequence = self.prefill(tokens, candidate, &wanted, &mut first, watch)?;
        sequence.set_answer(&self.engine, &candidate.policy, end)?;
        let mut answer = Vec::new();
        while answer.len() < most && !self.node.info.tokenizer.eos_ids().contains(&next) {
            answer.push(next);
            if enough(&answer) || answer.len() == most {
                break;
            }
            let mut batch = [StepInput { sequence: &mut sequence, tokens: &[next], logits: Logits::Last }];
            let logits = self.engine.step(&self.ctx, &mut batch, &mut ())?.pop();
            let logits = logits.context("a step has no output")??.context("a step has no logits")?;
            next = likeliest(&logits.into_all());
        }
        Ok(answer)
    }
}

/// Index of the largest logit, the last of equal ones.
pub(super) fn likeliest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|(_, a), (_, b)| a.total_cmp(b));
    best.map_or(0, |(token, _)| token as u32)
}
