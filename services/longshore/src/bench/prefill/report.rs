//! The table, the JSON and the plot.

use anyhow::{Context, Result};
use longshore_attention::PrefillPolicy;
use longshore_compute::{ComputePool, InstructionSet};
use longshore_model::ModelConfig;
use serde::Serialize;

use super::{
    meter::{LayerTimes, Meter},
    plot::{self, Line},
};
use crate::{
    cli::BenchPrefillArgs,
    console,
    machine::{self, Machine},
    node::Node,
};

/// One prompt under one policy.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Point {
    /// The policy as it was asked for.
    policy: String,
    fingerprint: String,
    tokens: usize,
    /// Seconds to the logits of the last token.
    ttft: f64,
    /// Seconds of making lists, over all layers.
    selection: f64,
    /// Seconds of attending, over all layers.
    attend: f64,
    /// Visited keys over those that exact attention visits.
    density: Option<f64>,
    /// Seconds that exact attention takes over all layers, from samples in this run.
    dense: Option<f64>,
    /// (Row, head, key) triples of exact attention.
    pairs: u64,
    /// Multiply-adds for one of them.
    fma_per_pair: u64,
    peak_rss_bytes: Option<u64>,
    layers: Vec<LayerTimes>,
}

impl Point {
    pub(super) fn of(
        (name, policy): (&str, &PrefillPolicy),
        tokens: usize,
        ttft: f64,
        meter: &Meter,
        pairs: u64,
        config: &ModelConfig,
    ) -> Self {
        let sum = |of: fn(&LayerTimes) -> f64| meter.layers.iter().map(of).sum();
        let keys: u64 = meter.layers.iter().map(|layer| layer.visited.keys).sum();
        Self {
            policy: name.to_owned(),
            fingerprint: policy.fingerprint(),
            tokens,
            ttft,
            selection: sum(|layer| layer.selection),
            attend: sum(|layer| layer.attend),
            density: (!policy.is_exact()).then(|| keys as f64 / pairs as f64),
            dense: meter.dense_rate().map(|rate| rate * pairs as f64),
            pairs,
            fma_per_pair: 2 * config.heads.head_dim as u64,
            peak_rss_bytes: machine::peak_rss_bytes(),
            layers: meter.layers.clone(),
        }
    }

    fn attention(&self) -> f64 {
        self.selection + self.attend
    }

    fn row(&self) -> String {
        let attention = self.attention();
        let gflops = |pairs: f64| pairs * self.fma_per_pair as f64 * 2.0 / attention / 1e9;
        let percent =
            |share: Option<f64>| share.map_or("-".to_owned(), |share| format!("{:.1} %", share * 100.0));
        let speedup = self.dense.map_or("-".to_owned(), |dense| format!("{:.1}×", dense / attention));
        format!(
            "| {} | {} | {:.2} | {:.0} | {:.2} | {} | {} | {} | {:.0} | {:.0} | {} |",
            console::grouped(self.tokens as u64),
            self.policy,
            self.ttft,
            self.tokens as f64 / self.ttft,
            attention,
            percent((self.density.is_some()).then(|| self.selection / attention)),
            percent(self.density),
            speedup,
            gflops(self.pairs as f64),
            gflops(self.pairs as f64 * self.density.unwrap_or(1.0)),
            self.peak_rss_bytes.map_or("-".to_owned(), console::bytes)
        )
    }
}

/// All points.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    version: &'static str,
    machine: Machine,
    instruction_set: &'static str,
    threads: usize,
    model: String,
    context_tokens: u64,
    chunk_tokens: usize,
    points: Vec<Point>,
}

impl Report {
    pub(super) fn new(node: &Node, pool: &ComputePool, chunk_tokens: usize) -> Self {
        let report = Self {
            version: env!("CARGO_PKG_VERSION"),
            machine: Machine::read(),
            instruction_set: InstructionSet::detect().name(),
            threads: pool.threads(),
            model: node.name.clone(),
            context_tokens: node.info.config.context_tokens,
            chunk_tokens,
            points: Vec::new(),
        };
        console::say(format!(
            "longshore {}, {}, {}, {} threads, {}, chunks of {chunk_tokens}\n",
            report.version, report.machine.processor, report.instruction_set, report.threads, report.model
        ));
        console::say(
            "| tokens | policy | TTFT s | tokens/s | attention s | selection | density | vs dense | dense-equivalent GFLOP/s | visited GFLOP/s | peak memory |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        );
        report
    }

    /// Adds and prints a point.
    pub(super) fn add(&mut self, point: Point) {
        console::say(point.row());
        self.points.push(point);
    }

    /// Writes the files that were asked for.
    pub(super) fn write(&self, args: &BenchPrefillArgs) -> Result<()> {
        if self.points.iter().any(|point| point.dense.is_some() && point.density.is_some()) {
            console::say(
                "\n\"vs dense\": exact attention over the same keys, sampled in this run in the middle layer, over all layers.",
            );
        }
        if let Some(path) = &args.json {
            let json = serde_json::to_string_pretty(self).context("cannot write JSON")?;
            std::fs::write(path, json + "\n")
                .with_context(|| format!("cannot write `{}`", path.display()))?;
        }
        if let (Some(path), Some(picture)) = (&args.plot, self.plot()) {
            std::fs::write(path, picture).with_context(|| format!("cannot write `{}`", path.display()))?;
        }
        Ok(())
    }

    fn plot(&self) -> Option<String> {
        let mut lines: Vec<Line> = Vec::new();
        for point in &self.points {
            for (what, seconds, dashed) in
                [("TTFT", point.ttft, false), ("attention", point.attention(), true)]
            {
                let name = format!("{} {what}", point.policy);
                let at = (point.tokens as f64, seconds);
                match lines.iter_mut().find(|line| line.name == name) {
                    Some(line) => line.points.push(at),
                    None => lines.push(Line { name, points: vec![at], dashed }),
                }
            }
        }
        plot::svg(&format!("Prefill of {}, seconds by prompt tokens", self.model), &lines)
    }
}
