//! The report: Markdown and JSON.

use anyhow::{Context, Result};
use longshore_cuda::{DeviceInfo, Nvrtc, capability_name};
use serde::Serialize;

use super::super::statistics::Spread;
use crate::console;

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

/// Everything measured.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    pub(super) conditions: Conditions,
    pub(super) peaks: Peaks,
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
        format!(
            "longshore {}, {}, compute capability {}, {} multiprocessors, {}, NVRTC {}\n\n\
             | peak | median | min | max |\n| --- | --- | --- | --- |\n{}\n",
            c.version,
            c.name,
            c.capability,
            c.multiprocessors,
            console::bytes(c.memory_bytes),
            c.nvrtc,
            rows.join("\n")
        )
    }
}
