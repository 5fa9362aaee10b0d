//! `longshore bench cuda`: what the GPU can do at most, measured, and kernels as parts of that.

mod decode;
mod linear;
mod prefill;
mod report;

use std::{sync::Arc, time::Instant};

use anyhow::{Context, Result, ensure};
use longshore_cuda::{CudaDevice, Device, Rate, Rates};

use self::report::{Conditions, Peaks, Peers, Point, Report, sparse_speedups};
use crate::{cli::BenchCudaArgs, config::Config, console, cuda, process};

use super::statistics::Spread;

/// Bytes that are copied: many times the largest cache, a small part of the memory.
const COPY_BYTES: usize = 1 << 30;
/// Smaller devices, and those in use, have at least this much to spare.
const COPY_BYTES_MIN: usize = 64 << 20;
/// So much of it is given a content: the rest is whatever lies there.
const PATTERN_BYTES: usize = 64 << 20;
/// Products in a row: about a millisecond.
const ROUNDS: u32 = 1 << 13;
/// A sample is the mean of as many launches as fill this many seconds, so that starting and waiting count for nothing.
const SAMPLE_SECONDS: f64 = 0.05;

/// Runs the command; blocks, so never on a reactor thread.
pub(crate) fn cuda(args: &BenchCudaArgs) -> Result<()> {
    let Some(config) = process::settings(&args.serve, args.serve.settings())? else { return Ok(()) };
    if process::only_checked(&args.serve) {
        return Ok(());
    }
    let device = cuda::open(&config)?;
    let bench =
        Bench { queue: Arc::clone(&device) as Arc<dyn Device>, device, repeats: args.repeats as usize };
    let tables = args.json.as_ref().is_none_or(|path| path.as_os_str() != "-");
    let peaks = bench.peaks()?;
    let mut points = prefill::measure(&bench, &peaks, &args.lengths, false)?;
    points.extend(decode::measure(&bench, &peaks, &args.lengths)?);
    points.extend(linear::measure(&bench, &peaks, &process::compute_pool(&config)?)?);
    points.extend(bench.wgmma(&peaks, &args.lengths));
    let name = bench.device.info().name.as_str();
    let peers = args.peers.as_ref().map(|path| Peers::read(path, name, &points)).transpose()?;
    let sparse_speedups = sparse_speedups(&points);
    let report = Report { conditions: bench.conditions(&config), peaks, points, peers, sparse_speedups };
    if tables {
        console::say(report.tables());
    }
    match &args.json {
        None => Ok(()),
        Some(path) if path.as_os_str() == "-" => {
            console::say(report.json()?);
            Ok(())
        }
        Some(path) => std::fs::write(path, report.json()? + "\n")
            .with_context(|| format!("cannot write `{}`", path.display())),
    }
}

/// The one compute capability whose code has warp groups.
const WGMMA_CAPABILITY: u32 = 90;

/// What every measurement needs.
struct Bench {
    device: Arc<CudaDevice>,
    queue: Arc<dyn Device>,
    repeats: usize,
}

impl Bench {
    fn conditions(&self, config: &Config) -> Conditions {
        Conditions::of(self.device.info(), self.device.compiler().nvrtc(), &config.compute.device)
    }

    /// Rates of kernels that do nothing else. Each is checked: a kernel that does nothing is fast.
    fn peaks(&self) -> Result<Peaks> {
        let (free, _) = self.device.memory()?;
        let bytes = (free / 4).min(COPY_BYTES) / 16 * 16;
        ensure!(
            bytes >= COPY_BYTES_MIN,
            "the device has {} free; hint: end what else uses it",
            console::bytes(free as u64)
        );
        let rates = Rates::new(&self.queue, bytes, ROUNDS)?;
        rates.fill(&pattern(bytes.min(PATTERN_BYTES)))?;
        Ok(Peaks {
            copy_gbps: self.rate(&rates, Rate::Copy)?.map(|rate| rate / 1e9),
            read_gbps: self.rate(&rates, Rate::Read)?.map(|rate| rate / 1e9),
            matrix_bf16_tflops: self.rate(&rates, Rate::MatrixBf16)?.map(|rate| rate / 1e12),
        })
    }

    /// Prefill by warp groups, where the device has them. Last, and no error of all: that kernel is off by default, and may lose the context.
    fn wgmma(&self, peaks: &Peaks, lengths: &[u32]) -> Vec<Point> {
        if self.device.info().capability != WGMMA_CAPABILITY {
            return Vec::new();
        }
        prefill::measure(self, peaks, lengths, true).unwrap_or_else(|error| {
            console::note(format!("warning: prefill by warp groups was not measured: {error:#}"));
            Vec::new()
        })
    }

    fn rate(&self, rates: &Rates, rate: Rate) -> Result<Spread> {
        let seconds = self.sample(|| Ok(rates.launch(rate)?))?;
        ensure!(
            rates.is_right(rate)?,
            "the kernel that measures {rate:?} gave a wrong result: its time means nothing"
        );
        let work = rates.work(rate) as f64;
        Ok(seconds.map(|seconds| work / seconds))
    }

    /// Seconds of one launch of `work`, after one that does not count: it compiles.
    fn sample(&self, work: impl Fn() -> Result<()>) -> Result<Spread> {
        self.timed(1, &work)?;
        let runs = (SAMPLE_SECONDS / self.timed(1, &work)?).ceil().clamp(1.0, 1e5) as usize;
        let samples = (0..self.repeats).map(|_| self.timed(runs, &work)).collect::<Result<Vec<_>>>()?;
        Ok(Spread::of(samples))
    }

    fn timed(&self, runs: usize, work: &impl Fn() -> Result<()>) -> Result<f64> {
        self.queue.synchronize()?;
        let began = Instant::now();
        for _ in 0..runs {
            work()?;
        }
        self.queue.synchronize()?;
        Ok((began.elapsed().as_secs_f64() / runs as f64).max(1e-9))
    }
}

/// Bytes of which no two neighbours are alike, so that nothing is compressed on the way.
fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes as u64 / 8).flat_map(|index| index.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect()
}
