//! `longshore bench prefill`: prompts under prefill policies, side by side.

mod meter;
mod plot;
mod report;

use std::{sync::Arc, time::Instant};

use anyhow::{Context, Result, ensure};
use longshore_attention::{CpuExecutor, Executor, PrefillPolicy};
use longshore_compute::ComputePool;
use longshore_model::SpecialTokens;

use self::{
    meter::{Meter, causal},
    report::{Point, Report},
};
use super::{noise::Noise, runner::Runner};
use crate::{cli::BenchPrefillArgs, console, machine, node::Node, process};

/// Runs the command; blocks, so never on a reactor thread.
pub(crate) fn prefill(args: &BenchPrefillArgs) -> Result<()> {
    let Some(config) = process::configuration(&args.serve, args.serve.settings())? else { return Ok(()) };
    if process::only_checked(&args.serve) {
        return Ok(());
    }
    // Faults of the names before anything is loaded, but for policies that need the deployment's plan.
    for text in args.policies.iter().filter(|text| !text.is_empty() && !config.model.may_plan(text)) {
        PrefillPolicy::parse(text, None).with_context(|| format!("`--policy {text}`"))?;
    }
    let pool = process::compute_pool(&config)?;
    let (node, engine) = Node::load(&config, &pool)?;
    let policies = args.policies.iter().map(|text| {
        let policy = PrefillPolicy::parse(text, node.head_plan.as_deref());
        policy.with_context(|| format!("`--policy {text}`")).map(|policy| (text.as_str(), Arc::new(policy)))
    });
    let policies = policies.collect::<Result<Vec<_>>>()?;
    let multiple = policies.iter().map(|(_, policy)| policy.chunk_multiple()).max().unwrap_or(1);
    let chunk_tokens = (config.prefill.chunk_tokens as usize).next_multiple_of(multiple);
    let bench = Bench { runner: Runner::new(engine, &node, chunk_tokens)?, node, pool, chunk_tokens };
    let longest = args.lengths.iter().copied().max().unwrap_or(0) as usize;
    let text = bench.text(args, longest)?;
    let mut report = Report::new(&bench.node, &bench.pool, chunk_tokens);
    for &tokens in &args.lengths {
        for (name, policy) in &policies {
            let point = bench.measure(args, &text[..tokens as usize], name, policy)?;
            report.add(point);
        }
    }
    report.write(args)
}

/// A model, ready to compute prompts.
struct Bench {
    runner: Runner,
    node: Node,
    pool: Arc<ComputePool>,
    chunk_tokens: usize,
}

impl Bench {
    /// Tokens of the prompts: of the file, over and over where it is shorter; else drawn at random.
    fn text(&self, args: &BenchPrefillArgs, tokens: usize) -> Result<Vec<u32>> {
        let Some(path) = &args.file else {
            return Ok(Noise(args.seed).tokens(tokens, self.runner.vocabulary()));
        };
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))?;
        let ids = self.node.info.tokenizer.encode(&text, SpecialTokens::Add)?;
        ensure!(!ids.is_empty(), "`{}` has no tokens", path.display());
        Ok(ids.iter().copied().cycle().take(tokens).collect())
    }

    fn measure(
        &self,
        args: &BenchPrefillArgs,
        tokens: &[u32],
        name: &str,
        policy: &Arc<PrefillPolicy>,
    ) -> Result<Point> {
        let config = &self.node.info.config;
        let chunks = tokens.len().div_ceil(self.chunk_tokens);
        let every = (args.dense_samples > 0).then(|| (chunks / args.dense_samples as usize).max(1));
        let executor: Arc<dyn Executor> = Arc::new(CpuExecutor::new(Arc::clone(&self.pool)));
        let mut meter = Meter::new(executor, config.layers, every);
        let mut sequence = self.runner.sequence();
        let dense_from = policy.dense_from(tokens.len() as u64);
        sequence.set_prefill(Arc::clone(policy), dense_from)?;
        let bar = console::token_bar("computing", tokens.len() as u64);
        machine::reset_peak_rss();
        let began = Instant::now();
        self.runner.compute(sequence, tokens, &mut meter, &|done| bar.set_position(done as u64))?;
        let seconds = (began.elapsed() - meter.aside).as_secs_f64();
        bar.finish_and_clear();
        let heads = config.heads.query_heads() as u64;
        // The last layer attends for one row only.
        let whole = causal(0, tokens.len() as u64) * heads;
        let pairs = whole * (config.layers as u64 - 1) + tokens.len() as u64 * heads;
        Ok(Point::of((name, policy), tokens.len(), seconds, &meter, pairs, config))
    }
}
