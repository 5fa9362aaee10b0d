//! The report: Markdown as it comes, JSON at the end.

use anyhow::{Context, Result};
use serde::Serialize;

use super::{
    floor::Floor,
    load::{Operation, Tally},
    lookup::LookupPoint,
};
use crate::{
    bench::statistics::Summary,
    cli::{BenchStoreArgs, StoreEnd, StoreLane},
    console,
    machine::Machine,
};

/// One lane, end, size and number of streams.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Point {
    lane: StoreLane,
    end: StoreEnd,
    processes: u32,
    operation: Operation,
    tile_bytes: usize,
    concurrency: u32,
    /// GB/s of tiles.
    gbps: f64,
    /// Of a block put, or of a read call of four blocks.
    milliseconds: Summary,
    /// Cores that client and shard used together.
    cores: f64,
    /// Those for each GB/s.
    cores_per_gbps: f64,
}

impl Point {
    /// Of what was counted.
    pub(super) fn new(
        (lane, end, processes, operation): (StoreLane, StoreEnd, u32, Operation),
        tile_bytes: usize,
        concurrency: u32,
        tally: &Tally,
        cpu_seconds: f64,
    ) -> Self {
        let gbps = tally.bytes as f64 / tally.seconds.max(1e-9) / 1e9;
        // The run that does not count took a fifth as long.
        let cores = cpu_seconds / (tally.seconds * 1.2).max(1e-9);
        Self {
            lane,
            end,
            processes,
            operation,
            tile_bytes,
            concurrency,
            gbps,
            milliseconds: Summary::of(tally.milliseconds.clone()),
            cores,
            cores_per_gbps: cores / gbps.max(1e-9),
        }
    }

    /// The same point over stock tonic, if it is.
    fn beside<'a>(&self, points: &'a [Self]) -> Option<&'a Self> {
        let what = |p: &Self| (p.end, p.processes, p.operation, p.tile_bytes, p.concurrency);
        points.iter().find(|other| other.lane == StoreLane::Stock && what(other) == what(self))
    }
}

/// A lane that was asked for and cannot be had here.
#[derive(Debug, Clone, Serialize)]
pub(super) struct NotRun {
    pub(super) lane: StoreLane,
    pub(super) end: StoreEnd,
    pub(super) processes: u32,
    pub(super) tile_bytes: usize,
    pub(super) why: String,
}

/// Everything measured.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    version: &'static str,
    machine: Machine,
    layers: u32,
    connections: u32,
    frame_bytes: u32,
    window_bytes: u32,
    verified: bool,
    floors: Vec<Floor>,
    points: Vec<Point>,
    not_run: Vec<NotRun>,
    lookups: Vec<LookupPoint>,
    #[serde(skip)]
    tables: bool,
}

fn lower(text: String) -> String {
    text.to_lowercase()
}

impl Report {
    /// Begins a report; `tables` says whether Markdown is printed.
    pub(super) fn new(machine: Machine, args: &BenchStoreArgs, tables: bool) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            machine,
            layers: args.layers,
            connections: args.connections,
            frame_bytes: args.frame_bytes,
            window_bytes: args.window_bytes,
            verified: !args.unverified,
            floors: Vec::new(),
            points: Vec::new(),
            not_run: Vec::new(),
            lookups: Vec::new(),
            tables,
        }
    }

    /// Adds and prints what the machine does.
    pub(super) fn floor(&mut self, floor: Floor) {
        let tcp = floor.tcp.iter().map(|tcp| {
            format!(
                "| raw TCP, {} connections | {:.2} (verified {:.2}; {:.2} cores per GB/s) |",
                tcp.connections, tcp.gbps, tcp.verified_gbps, tcp.cores_per_gbps
            )
        });
        let memory = [
            ("memcpy, one thread", floor.memcpy_gbps),
            ("memcpy, two threads", floor.memcpy_two_gbps),
            ("CRC-32C", floor.crc_gbps),
            ("copy with CRC-32C", floor.copy_crc_gbps),
        ];
        let memory = memory.iter().map(|(what, gbps)| format!("| {what} | {gbps:.2} |"));
        let lines: Vec<String> = memory.chain(tcp).collect();
        self.say(&format!(
            "\nTiles of {}\n\n| machine | GB/s |\n| --- | --- |\n{}\n",
            console::bytes(floor.tile_bytes as u64),
            lines.join("\n")
        ));
        self.floors.push(floor);
    }

    /// Adds a point.
    pub(super) fn point(&mut self, point: Point) {
        self.points.push(point);
    }

    /// Adds what was asked for and cannot be had.
    pub(super) fn not_run(&mut self, what: NotRun) {
        self.not_run.push(what);
    }

    /// Adds lookups.
    pub(super) fn lookup(&mut self, point: LookupPoint) {
        self.lookups.push(point);
    }

    /// Prints the points, beside each other.
    pub(super) fn finish(&self) {
        let head = "| lane | end | processes | | tile | streams | GB/s | p50 ms | p99 ms | cores per GB/s | of memcpy | of raw TCP | × stock |\n\
                    | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |";
        let rows: Vec<String> = self.points.iter().map(|point| self.row(point)).collect();
        self.say(&format!("{head}\n{}\n", rows.join("\n")));
        for NotRun { lane, end, processes, tile_bytes, why } in &self.not_run {
            let (lane, end) = (lower(format!("{lane:?}")), lower(format!("{end:?}")));
            let tile = console::bytes(*tile_bytes as u64);
            self.say(&format!("NOT RUN: {lane}, {end}, {processes} processes, tiles of {tile}: {why}"));
        }
        for lookup in &self.lookups {
            let (keys, ms) = (console::grouped(lookup.keys as u64), &lookup.milliseconds);
            self.say(&format!(
                "Lookup of {keys} keys over {} shards, {} processes, one call to each shard: p50 {:.2} ms, p99 {:.2} ms",
                lookup.shards, lookup.processes, ms.p50, ms.p99
            ));
        }
    }

    fn row(&self, p: &Point) -> String {
        let floor = self.floors.iter().find(|floor| floor.tile_bytes == p.tile_bytes);
        let share = |of: Option<f64>| of.map_or_else(|| "-".to_owned(), |of| format!("{:.2}", p.gbps / of));
        format!(
            "| {} | {} | {} | {} | {} | {} | {:.2} | {:.2} | {:.2} | {:.2} | {} | {} | {} |",
            lower(format!("{:?}", p.lane)),
            lower(format!("{:?}", p.end)),
            p.processes,
            lower(format!("{:?}", p.operation)),
            console::bytes(p.tile_bytes as u64),
            p.concurrency,
            p.gbps,
            p.milliseconds.p50,
            p.milliseconds.p99,
            p.cores_per_gbps,
            share(floor.map(|floor| floor.memcpy_gbps)),
            share(floor.map(Floor::tcp_gbps)),
            share(p.beside(&self.points).map(|stock| stock.gbps)),
        )
    }

    /// The whole report.
    pub(super) fn json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).context("a report is JSON")
    }

    fn say(&self, text: &str) {
        if self.tables {
            console::say(text);
        }
    }
}
