//! The report: Markdown and JSON.

mod peers;

use anyhow::{Context, Result};
use longshore_cuda::{DeviceInfo, Nvrtc, capability_name};
use serde::Serialize;

use super::super::statistics::Spread;
use crate::console;

pub(super) use peers::{Beside, Peers};

/// Under what everything was measured.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Conditions {
    version: &'static str,
    device: String,
    name: String,
    capability: String,
    multiprocessors: usize,
    memory_bytes: u64,
    nvrtc: String,
}

impl Conditions {
    pub(super) fn of(info: &DeviceInfo, nvrtc: &Nvrtc, asked: &str) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            device: asked.to_owned(),
            name: info.name.clone(),
            capability: capability_name(info.capability),
            multiprocessors: info.multiprocessors,
            memory_bytes: info.memory_bytes,
            nvrtc: nvrtc.version().to_string(),
        }
    }
}

/// What the device can do at most.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Peaks {
    /// GB/s, read and written.
    pub(super) copy_gbps: Spread,
    /// GB/s, read.
    pub(super) read_gbps: Spread,
    /// TFLOP/s of `mma.sync`, bf16 with f32 sums.
    pub(super) matrix_bf16_tflops: Spread,
}

/// A kernel, beside what the device can do.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Point {
    what: String,
    seconds: Spread,
    gbps: Option<f64>,
    tflops: Option<f64>,
    /// Of the copy rate, or of the matrix rate.
    share: f64,
    /// What other programs do that is like it, and how many tokens or keys there are.
    #[serde(skip)]
    beside: Option<(Beside, usize)>,
}

impl Point {
    /// One that reads `bytes`, beside the rate of copies.
    pub(super) fn bytes(what: String, seconds: Spread, bytes: f64, peak_gbps: &Spread) -> Self {
        let gbps = bytes / seconds.median / 1e9;
        Self { what, seconds, gbps: Some(gbps), tflops: None, share: gbps / peak_gbps.median, beside: None }
    }

    /// One that does `flops` operations, beside the rate of matrix products.
    pub(super) fn flops(what: String, seconds: Spread, flops: f64, peak_tflops: &Spread) -> Self {
        let tflops = flops / seconds.median / 1e12;
        Self {
            what,
            seconds,
            gbps: None,
            tflops: Some(tflops),
            share: tflops / peak_tflops.median,
            beside: None,
        }
    }

    /// The same, which other programs are shown beside.
    pub(super) fn beside(self, what: Beside, tokens: usize) -> Self {
        Self { beside: Some((what, tokens)), ..self }
    }

    fn line(&self) -> String {
        let rate = match (self.gbps, self.tflops) {
            (Some(gbps), _) => format!("{gbps:.1} GB/s"),
            (None, Some(tflops)) => format!("{tflops:.1} TFLOP/s"),
            (None, None) => String::new(),
        };
        let ms = |seconds: f64| seconds * 1e3;
        let s = &self.seconds;
        format!(
            "| {} | {:.3} ({:.3} to {:.3}) | {rate} | {:.0} % |",
            self.what,
            ms(s.median),
            ms(s.min),
            ms(s.max),
            self.share * 100.0
        )
    }
}

/// Everything measured.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    pub(super) conditions: Conditions,
    pub(super) peaks: Peaks,
    pub(super) points: Vec<Point>,
    /// Points of other programs, and our rate as a multiple of theirs.
    pub(super) peers: Option<Peers>,
    /// How many times as fast prompts are over lists as all of them, by tokens.
    pub(super) sparse_speedups: Vec<(usize, f64)>,
}

impl Report {
    /// The whole report for programs.
    pub(super) fn json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).context("a report is JSON")
    }

    /// The whole report for people.
    pub(super) fn tables(&self) -> String {
        let (c, p) = (&self.conditions, &self.peaks);
        let row = |what: &str, rate: &Spread, unit: &str| {
            format!("| {what} | {:.1} {unit} | {:.1} | {:.1} |", rate.median, rate.min, rate.max)
        };
        let rows = [
            row("copy (read + written)", &p.copy_gbps, "GB/s"),
            row("read", &p.read_gbps, "GB/s"),
            row("bf16 multiply-adds (mma.sync)", &p.matrix_bf16_tflops, "TFLOP/s"),
        ];
        let points: Vec<String> = self.points.iter().map(Point::line).collect();
        let speedups = self.sparse_speedups.iter().map(|(tokens, times)| {
            format!("{tokens} tokens over lists take 1 / {times:.1} of the time of all pairs\n")
        });
        let beside = self.peers.as_ref().map(Peers::table).unwrap_or_default();
        format!(
            "longshore {}, {}, compute capability {}, {} multiprocessors, {}, NVRTC {}\n\n\
             | peak | median | min | max |\n| --- | --- | --- | --- |\n{}\n\n\
             | kernel (one layer of Llama-3-8B) | ms | rate | of peak |\n| --- | --- | --- | --- |\n{}\n\n{}{beside}",
            c.version,
            c.name,
            c.capability,
            c.multiprocessors,
            console::bytes(c.memory_bytes),
            c.nvrtc,
            rows.join("\n"),
            points.join("\n"),
            speedups.collect::<String>()
        )
    }
}

/// Of each number of tokens that was measured both ways.
pub(super) fn sparse_speedups(points: &[Point]) -> Vec<(usize, f64)> {
    let of = |kind| {
        let seconds = move |point: &Point| match point.beside {
            Some((what, tokens)) if what == kind => Some((tokens, point.seconds.median)),
            _ => None,
        };
        points.iter().filter_map(seconds)
    };
    let sparse: Vec<(usize, f64)> = of(Beside::SparsePrefill).collect();
    let speedup = |(tokens, dense): (usize, f64)| {
        let (_, own) = sparse.iter().find(|(own, _)| *own == tokens)?;
        Some((tokens, dense / own))
    };
    of(Beside::DensePrefill).filter_map(speedup).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_is_a_part_of_the_peak() {
        let peak = Spread::of(vec![4000.0]);
        let point = Point::bytes("decode".to_owned(), Spread::of(vec![2e-3, 1e-3, 3e-3]), 4e9, &peak);
        assert_eq!(point.line(), "| decode | 2.000 (1.000 to 3.000) | 2000.0 GB/s | 50 % |");
        let point = Point::flops("prefill".to_owned(), Spread::of(vec![1.0]), 1e14, &Spread::of(vec![400.0]));
        assert_eq!(point.line(), "| prefill | 1000.000 (1000.000 to 1000.000) | 100.0 TFLOP/s | 25 % |");
    }

    #[test]
    fn lists_are_compared_with_all_pairs_of_as_many_tokens() {
        let peak = Spread::of(vec![400.0]);
        let point = |what, tokens, seconds| {
            Point::flops(String::new(), Spread::of(vec![seconds]), 1e12, &peak).beside(what, tokens)
        };
        let points = [
            point(Beside::DensePrefill, 8, 2.0),
            point(Beside::DensePrefill, 64, 60.0),
            point(Beside::SparsePrefill, 64, 4.0),
            point(Beside::SparsePrefill, 512, 9.0),
        ];
        assert_eq!(sparse_speedups(&points), [(64, 15.0)]);
    }
}
