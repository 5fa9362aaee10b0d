//! The whole model through the engine, without shards: prompts and decode steps.

use std::time::Instant;

use anyhow::Result;
use serde::Serialize;

use super::{Bench, plan::Plan};
use crate::{
    bench::{runner::Runner, statistics::Spread},
    cli::ComputePart,
    machine,
    node::Node,
};

/// The model and its points.
#[derive(Debug, Clone, Serialize)]
pub(super) struct ModelReport {
    /// Name.
    pub(super) model: String,
    /// Element type that takes most of the file.
    pub(super) quantization: String,
    /// Bytes of the file.
    pub(super) file_bytes: u64,
    /// Positions that the model was made for; beyond them only the time means something.
    pub(super) context_tokens: u64,
    /// Seconds to read, hash and pack the model, from a warm file cache.
    pub(super) load_seconds: f64,
    /// Most memory while loading.
    pub(super) load_peak_rss_bytes: Option<u64>,
    /// Tokens of a prefill step.
    pub(super) chunk_tokens: usize,
    /// Points.
    pub(super) points: Vec<ModelPoint>,
}

/// One point of the whole model.
#[derive(Debug, Clone, Serialize)]
pub(super) struct ModelPoint {
    /// `prefill` or `decode`.
    pub(super) kind: &'static str,
    /// Prompt tokens, or positions before the first step.
    pub(super) tokens: usize,
    /// Tokens a second.
    pub(super) rate: Spread,
    /// Most memory of the process while the point ran.
    pub(super) peak_rss_bytes: Option<u64>,
    /// Whether the model was made for so many positions.
    pub(super) within_context: bool,
}

/// Loads the model and measures what `plan` asks for.
pub(super) fn measure(bench: &Bench, plan: &Plan) -> Result<ModelReport> {
    machine::reset_peak_rss();
    let began = Instant::now();
    let (node, engine) = Node::load(&bench.config, &bench.pool)?;
    let load_seconds = began.elapsed().as_secs_f64();
    let load_peak_rss_bytes = machine::peak_rss_bytes();
    let runner = Runner::new(engine, &node, bench.config.prefill.chunk_tokens as usize)?;
    let mut points = Vec::new();
    let mut add = |kind, tokens: usize, end: usize, rate| {
        let peak_rss_bytes = machine::peak_rss_bytes();
        let within_context = end as u64 <= node.info.config.context_tokens;
        points.push(ModelPoint { kind, tokens, rate, peak_rss_bytes, within_context });
        machine::reset_peak_rss();
    };
    if plan.has(ComputePart::Prefill) {
        runner.warm_up()?;
        machine::reset_peak_rss();
        for &tokens in &plan.lengths {
            bench.next(&format!("pp{tokens}"));
            add("prefill", tokens, tokens, runner.prefill(tokens, bench.repeats)?);
        }
    }
    if plan.has(ComputePart::Decode) {
        for &depth in &plan.depths {
            bench.next(&format!("tg at depth {depth}"));
            let rate = runner.decode(depth, plan.steps, bench.repeats)?;
            add("decode", depth, depth + plan.steps * bench.repeats, rate);
        }
    }
    Ok(ModelReport {
        model: node.name,
        quantization: node.info.quantization.clone(),
        file_bytes: node.info.file_bytes,
        context_tokens: node.info.config.context_tokens,
        load_seconds,
        load_peak_rss_bytes,
        chunk_tokens: runner.chunk_tokens(),
        points,
    })
}

/// Loads the model, computes a prompt of `tokens` and says when its first token is there.
pub(super) fn first_token(
    config: &crate::config::Config,
    pool: &std::sync::Arc<longshore_compute::ComputePool>,
    tokens: usize,
) -> Result<u32> {
    let (node, engine) = Node::load(config, pool)?;
    Runner::new(engine, &node, config.prefill.chunk_tokens as usize)?.first_token(tokens)
}
