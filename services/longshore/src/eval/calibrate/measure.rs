//! Candidates beside exact attention at sampled query tiles.

use std::{ops::Range, sync::Arc};

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use longshore_attention::{
    CpuExecutor, Executor, PlanInput, PrefillPolicy, QUERY_TILE, Queries, SparseItem, SparseWork,
};
use longshore_engine::{AttentionProbe, Logits};

use super::prompts::Prompt;
use crate::eval::{candidate::Candidate, pairs::Pairs, subject::Subject, watch::Watch};

/// Visits everything, but by lists, so that the engine shows what it does; by the scorer that asks for the most.
const LOOKED_AT: &str = "blocks:scorer=second-order,selector=top-k,k=16777216,correction=off,dense_layers=0,\
                         min_positions=0,last_tiles=0";

/// What one candidate costs and loses in one KV head of one layer.
#[derive(Debug, Clone, Default)]
pub(super) struct Sampled {
    pub(super) visited: Pairs,
    /// Error of each sampled row.
    pub(super) errors: Vec<f32>,
}

/// `[layer][KV head][candidate]`.
pub(super) type Samples = Vec<Vec<Vec<Sampled>>>;

/// Error of a KV head's rows: (layer, KV head, output of the candidate, exact output), both `[query_heads * head_dim]`.
pub(super) type Distance<'a> = &'a dyn Fn(usize, usize, &[f32], &[f32]) -> f32;

/// What is measured, where.
pub(super) struct Measure<'a> {
    pub(super) subject: &'a Subject,
    pub(super) candidates: &'a [PrefillPolicy],
    /// First position whose tile may be looked at.
    pub(super) from: u64,
    /// Tiles of a prompt that are looked at.
    pub(super) tiles: u64,
    /// Positions that a candidate plans together; a multiple of [`QUERY_TILE`] that divides chunks.
    pub(super) span: usize,
    /// Of how many rows one is judged.
    pub(super) every: usize,
    pub(super) distance: Distance<'a>,
}

impl Measure<'_> {
    /// Reads all prompts and measures all candidates.
    pub(super) fn all(&self, prompts: &[Prompt]) -> Result<Samples> {
        let total = prompts.iter().map(|prompt| prompt.tokens.len() as u64).sum();
        let bar = crate::console::token_bar("calibrating", total);
        let heads = self.subject.node.info.config.heads.kv_heads;
        let mut samples =
            vec![vec![vec![Sampled::default(); self.candidates.len()]; heads]; self.subject.layers()];
        for prompt in prompts {
            self.one(prompt, &bar, &mut samples)?;
        }
        bar.finish_and_clear();
        Ok(samples)
    }

    fn one(&self, prompt: &Prompt, bar: &ProgressBar, samples: &mut Samples) -> Result<()> {
        let executor = CpuExecutor::new(Arc::clone(&self.subject.pool));
        let spans = self.spans(prompt.tokens.len() as u64);
        let mut failure = None;
        let mut look = |probe: &AttentionProbe<'_>| {
            if failure.is_none() {
                failure = self.look(&executor, &spans, probe, samples).err();
            }
        };
        let mut watch = Watch::looking(&mut look).telling(bar, self.subject.layers());
        let policy = PrefillPolicy::parse(LOOKED_AT, None)?;
        let exact = Candidate { name: "exact, by lists".to_owned(), policy: Arc::new(policy) };
        let ignore = &mut |_: u64, _: &[f32]| Ok(());
        // The last layer attends only for rows whose logits are wanted.
        let wanted = |rows: Range<u64>| match spans.iter().any(|span| rows.contains(span)) {
            true => Logits::All,
            false => Logits::None,
        };
        self.subject.prefill(&prompt.tokens, &exact, &wanted, ignore, &mut watch)?;
        drop(watch);
        failure.map_or(Ok(()), Err)
    }

    /// First positions of the spans that are looked at, evenly spread over those that are whole.
    fn spans(&self, tokens: u64) -> Vec<u64> {
        let span = self.span as u64;
        let (start, end) = (self.from.div_ceil(span), tokens / span);
        let count = end.saturating_sub(start);
        let wanted = self.tiles.div_ceil(span / QUERY_TILE as u64).min(count);
        (1..=wanted).map(|i| (start + i * count / wanted - 1) * span).collect()
    }

    /// Measures the spans that lie in a step of one layer.
    fn look(
        &self,
        executor: &CpuExecutor,
        spans: &[u64],
        probe: &AttentionProbe<'_>,
        samples: &mut Samples,
    ) -> Result<()> {
        let first = probe.plan.queries.first_position;
        let width = probe.plan.queries.shape.query_heads() * probe.plan.queries.shape.head_dim;
        let end = first + (probe.plan.queries.data.len() / width) as u64;
        for &span in spans {
            if first <= span && span + self.span as u64 <= end {
                let rows = (span - first) as usize..(span - first) as usize + self.span;
                let data = &probe.plan.queries.data[rows.start * width..rows.end * width];
                let exact = &probe.output[rows.start * width..rows.end * width];
                let queries = Queries { first_position: span, data, ..probe.plan.queries };
                let plan = PlanInput { queries, dense_from: u64::MAX, ..probe.plan };
                self.candidates(executor, &plan, exact, &mut samples[probe.layer])?;
            }
        }
        Ok(())
    }

    /// All candidates on the rows of one span.
    fn candidates(
        &self,
        executor: &CpuExecutor,
        plan: &PlanInput<'_>,
        exact: &[f32],
        samples: &mut [Vec<Sampled>],
    ) -> Result<()> {
        let works = self.candidates.iter().map(|candidate| executor.plan(candidate, plan));
        let works: Vec<SparseWork> = works.collect::<Result<_, _>>()?;
        let item = |work| SparseItem {
            queries: plan.queries,
            kv: plan.kv,
            summaries: plan.summaries,
            work,
            earlier: None,
            stripe: None,
            skip_below: None,
        };
        let items: Vec<SparseItem<'_>> = works.iter().map(item).collect();
        let width = plan.queries.shape.query_heads() * plan.queries.shape.head_dim;
        let found = executor.attend_sparse(&items)?;
        for (candidate, (work, found)) in works.iter().zip(found).enumerate() {
            let output = found.finish();
            for (kv_head, samples) in samples.iter_mut().enumerate() {
                let sampled = samples.get_mut(candidate).context("every candidate has its samples")?;
                for tile in 0..work.tiles() {
                    sampled.visited.add(Pairs::of(work, plan, kv_head, tile));
                }
                let rows = output.chunks_exact(width).zip(exact.chunks_exact(width));
                let errors = rows
                    .step_by(self.every)
                    .map(|(ours, exact)| (self.distance)(plan.layer, kv_head, ours, exact));
                sampled.errors.extend(errors);
            }
        }
        Ok(())
    }
}

/// |a − b| / |b|; |a − b| where b is 0.
pub(super) fn relative_distance(a: &[f32], b: &[f32]) -> f32 {
    let square = |x: f64| x * x;
    let distance: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let norm: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    (if norm == 0.0 { distance.sqrt() } else { (distance / norm).sqrt() }) as f32
}
