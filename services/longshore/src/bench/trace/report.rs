//! The table, the JSON and the plot.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use super::{plot, read::Trace, replay::Hits};
use crate::{cli::BenchTraceArgs, console};

/// Everything that was replayed.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    version: &'static str,
    trace: String,
    requests: usize,
    blocks: u64,
    unique_blocks: u64,
    tokens: u64,
    block_tokens: u64,
    shards: u64,
    retention_ms: u64,
    capacities: Vec<Capacity>,
    rows: Vec<Row>,
}

/// A size of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Capacity {
    pub(super) blocks: u64,
    pub(super) tokens: u64,
    /// Of the trace's unique blocks.
    pub(super) share: f64,
}

/// One policy at all capacities.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    /// Hits by capacity; where only blocks are known, tokens are left out.
    hits: Vec<Cell>,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Cell {
    blocks: u64,
    block_rate: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_rate: Option<f64>,
    /// Blocks written to the tier below memory; left out where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    written: Option<u64>,
}

impl Report {
    pub(super) fn new(name: String, trace: &Trace, capacities: Vec<Capacity>, args: &BenchTraceArgs) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            trace: name,
            requests: trace.requests.len(),
            blocks: trace.blocks,
            unique_blocks: trace.unique_blocks,
            tokens: trace.tokens,
            block_tokens: trace.block_tokens,
            shards: args.shards,
            retention_ms: args.retention_ms,
            capacities,
            rows: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, name: impl Into<String>, hits: Vec<Hits>) {
        let cells = hits.into_iter().map(|hits| Cell {
            blocks: hits.blocks,
            block_rate: hits.blocks as f64 / self.blocks as f64,
            tokens: Some(hits.tokens),
            token_rate: Some(hits.tokens as f64 / self.tokens as f64),
            written: (hits.written > 0).then_some(hits.written),
        });
        self.rows.push(Row { name: name.into(), hits: cells.collect() });
    }

    /// A row of which only blocks are known.
    pub(super) fn add_blocks(&mut self, name: impl Into<String>, hits: Vec<u64>) {
        let cell = |blocks: u64| Cell {
            blocks,
            block_rate: blocks as f64 / self.blocks as f64,
            tokens: None,
            token_rate: None,
            written: None,
        };
        self.rows.push(Row { name: name.into(), hits: hits.into_iter().map(cell).collect() });
    }

    pub(super) fn write(&self, args: &BenchTraceArgs) -> Result<()> {
        if let Some(path) = &args.plot {
            let lines: Vec<plot::Line> = self.rows.iter().map(|row| self.line(row)).collect();
            let picture = plot::svg(&format!("Blocks found: {}", self.trace), &lines);
            save(path, &picture.context("there are no points to draw")?)?;
        }
        if let Some(path) = &args.json {
            let json = serde_json::to_string_pretty(self).context("a report is JSON")?;
            if path == Path::new("-") {
                console::say(json);
                return Ok(());
            }
            save(path, &(json + "\n"))?;
        }
        console::say(self.markdown());
        Ok(())
    }

    fn line(&self, row: &Row) -> plot::Line {
        let points = self
            .capacities
            .iter()
            .zip(&row.hits)
            .map(|(capacity, cell)| (capacity.tokens as f64, cell.block_rate));
        plot::Line { name: row.name.clone(), points: points.collect() }
    }

    pub(super) fn markdown(&self) -> String {
        let count = console::grouped;
        let mut out = format!(
            "{}: {} requests, {} blocks of {} tokens, {} of them different",
            self.trace,
            count(self.requests as u64),
            count(self.blocks),
            self.block_tokens,
            count(self.unique_blocks)
        );
        if self.shards > 1 {
            out += &format!(", {} shards", self.shards);
        }
        out += "\n\nBlocks found, %:\n\n";
        out += &self.table(|cell| Some(cell.block_rate));
        out += "\nTokens found, %:\n\n";
        out += &self.table(|cell| cell.token_rate);
        if self.rows.iter().flat_map(|row| &row.hits).any(|cell| cell.written.is_some()) {
            out += "\nBlocks written to disk, % of those that were asked for:\n\n";
            // A policy that wrote at some capacity wrote nothing at those without a figure.
            let wrote: Vec<&Row> =
                self.rows.iter().filter(|row| row.hits.iter().any(|cell| cell.written.is_some())).collect();
            out += &self
                .table_of(&wrote, |cell| Some(cell.written.unwrap_or_default() as f64 / self.blocks as f64));
        }
        out
    }

    fn table(&self, rate: impl Fn(&Cell) -> Option<f64>) -> String {
        self.table_of(&self.rows.iter().collect::<Vec<_>>(), rate)
    }

    /// Rows that have a figure everywhere.
    fn table_of(&self, rows: &[&Row], rate: impl Fn(&Cell) -> Option<f64>) -> String {
        let million = |capacity: &Capacity| {
            format!(" {} % ({:.1}M) |", round(capacity.share * 100.0), capacity.tokens as f64 / 1e6)
        };
        let heads: String = self.capacities.iter().map(million).collect();
        let mut out = format!("| cache (tokens) |{heads}\n|{}\n", " --- |".repeat(self.capacities.len() + 1));
        for row in rows.iter().filter(|row| row.hits.iter().all(|cell| rate(cell).is_some())) {
            let cells = row.hits.iter().filter_map(&rate).map(|rate| format!(" {:.2} |", rate * 100.0));
            out += &format!("| {} |{}\n", row.name, cells.collect::<String>());
        }
        out
    }
}

/// At most one decimal.
fn round(percent: f64) -> String {
    let text = format!("{percent:.1}");
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}

fn save(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write `{}`", path.display()))
}
