//! The report: Markdown as it comes, JSON at the end.

use anyhow::{Context, Result};
use longshore_compute::{ComputePool, InstructionSet};
use serde::Serialize;

use super::{attention::AttentionPoint, first_token::FirstToken, linear::LinearReport, model::ModelReport};
use crate::{
    config::Config,
    console,
    machine::{Machine, Peaks},
};

/// Under what everything was measured.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Conditions {
    version: &'static str,
    machine: Machine,
    instruction_set: &'static str,
    threads: usize,
    pin: String,
    kv_dtype: String,
    linear: String,
    peaks: Peaks,
}

impl Conditions {
    pub(super) fn of(
        config: &Config,
        machine: &Machine,
        pool: &ComputePool,
        set: InstructionSet,
        peaks: Peaks,
    ) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            machine: machine.clone(),
            instruction_set: set.name(),
            threads: pool.threads(),
            pin: config.compute.pin.clone(),
            kv_dtype: config.model.kv_dtype.clone(),
            linear: config.model.linear.clone(),
            peaks,
        }
    }
}

/// Everything measured.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    conditions: Conditions,
    attention: Vec<AttentionPoint>,
    linear: Option<LinearReport>,
    model: Option<ModelReport>,
    first_token: Option<FirstToken>,
    #[serde(skip)]
    tables: bool,
}

impl Report {
    /// Begins a report; `tables` says whether Markdown is printed.
    pub(super) fn new(conditions: Conditions, tables: bool) -> Self {
        let report =
            Self { conditions, attention: Vec::new(), linear: None, model: None, first_token: None, tables };
        report.say(report.conditions());
        report
    }

    /// Adds and prints attention.
    pub(super) fn attention(&mut self, points: Vec<AttentionPoint>) {
        self.attention = points;
        self.say(self.attention_tables());
    }

    /// Adds and prints linear layers.
    pub(super) fn linear(&mut self, linear: LinearReport) {
        self.say(linear_table(&linear));
        self.linear = Some(linear);
    }

    /// Adds and prints the whole model.
    pub(super) fn model(&mut self, model: ModelReport) {
        self.say(model_table(&model));
        self.model = Some(model);
    }

    /// Adds and prints the first token.
    pub(super) fn first_token(&mut self, first: FirstToken) {
        let (tokens, s) = (first.prompt_tokens, &first.seconds);
        self.say(format!(
            "First token of a {}-token prompt, from the start of the process: {:.2} s ({:.2} to {:.2})\n",
            console::grouped(tokens as u64),
            s.median,
            s.min,
            s.max
        ));
        self.first_token = Some(first);
    }

    /// The whole report.
    pub(super) fn json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).context("a report is JSON")
    }

    fn say(&self, text: String) {
        if self.tables {
            console::say(text);
        }
    }

    fn conditions(&self) -> String {
        let c = &self.conditions;
        let pinned = if c.pin.is_empty() { String::new() } else { format!(" on cores {}", c.pin) };
        format!(
            "longshore {}, {}, {}, {} threads{pinned}\n\n\
             | peak | |\n| --- | --- |\n| f32 multiply-adds | {:.0} GFLOP/s |\n| read | {:.1} GB/s |\n\
             | copy (read + written) | {:.1} GB/s |\n",
            c.version,
            c.machine.processor,
            c.instruction_set,
            c.threads,
            c.peaks.gflops,
            c.peaks.read_gbps,
            c.peaks.copy_gbps,
        )
    }

    fn attention_tables(&self) -> String {
        let mut prefill = vec![
            "Attention, prefill (one layer; visible pairs count)\n\n| tokens | head | group | KV | ms | GFLOP/s | of peak |\n\
             | --- | --- | --- | --- | --- | --- | --- |"
                .to_owned(),
        ];
        let mut decode = vec![
            "Attention, decode (one step, one layer)\n\n\
             | keys | head | group | KV | ms | GFLOP/s | of peak | KV GB/s | of read | bound |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
                .to_owned(),
        ];
        for p in &self.attention {
            let row = format!(
                "| {} | {} | {} | {} | {:.3} | {:.1} | {} |",
                console::grouped(p.tokens as u64),
                p.head_dim,
                p.group,
                p.kv_dtype,
                p.seconds.median * 1e3,
                p.gflops,
                percent(p.flops_share)
            );
            match p.kv_gbps.zip(p.read_share) {
                None => prefill.push(row),
                Some((gbps, share)) => {
                    decode.push(format!("{row} {gbps:.1} | {} | {} |", percent(share), p.bound))
                }
            }
        }
        format!("{}\n\n{}\n", prefill.join("\n"), decode.join("\n"))
    }
}

fn linear_table(linear: &LinearReport) -> String {
    let mut lines = vec![format!(
        "Linear layers ({} layers of {} matrices, the output matrix left out)\n\n\
         | weights | computed | rows | ms | GOP/s | weights GB/s | tokens/s |\n| --- | --- | --- | --- | --- | --- | --- |",
        linear.layers,
        linear.shapes.len()
    )];
    lines.extend(linear.points.iter().map(|p| {
        format!(
            "| {} | {} | {} | {:.2} | {:.0} | {:.1} | {:.0} |",
            p.weights,
            p.computed,
            p.rows,
            p.seconds.median * 1e3,
            p.gops,
            p.weights_gbps,
            p.tokens_per_second
        )
    }));
    lines.join("\n") + "\n"
}

fn model_table(model: &ModelReport) -> String {
    let rss = |bytes: Option<u64>| bytes.map_or_else(|| "unknown".to_owned(), console::bytes);
    let mut lines = vec![format!(
        "{} ({}, {}): loaded in {:.2} s, {} at most; prompts in chunks of {} tokens\n\n\
         | point | tokens/s | min | max | peak memory |\n| --- | --- | --- | --- | --- |",
        model.model,
        model.quantization,
        console::bytes(model.file_bytes),
        model.load_seconds,
        rss(model.load_peak_rss_bytes),
        model.chunk_tokens,
    )];
    for p in &model.points {
        let name = if p.kind == "prefill" { format!("pp{}", p.tokens) } else { format!("tg @ {}", p.tokens) };
        let beyond = if p.within_context { "" } else { " *" };
        lines.push(format!(
            "| {name}{beyond} | {:.1} | {:.1} | {:.1} | {} |",
            p.rate.median,
            p.rate.min,
            p.rate.max,
            rss(p.peak_rss_bytes)
        ));
    }
    if model.points.iter().any(|p| !p.within_context) {
        let context = console::grouped(model.context_tokens);
        lines.push(format!(
            "\n\\* beyond the {context} positions of the model: only the time means something"
        ));
    }
    lines.join("\n") + "\n"
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}
