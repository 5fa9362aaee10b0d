//! What this machine can do at most: multiply-adds and memory traffic, measured with the threads that will compute.

use std::{hint::black_box, time::Instant};

use longshore_compute::{ComputePool, InstructionSet, peak};
use serde::Serialize;

/// Best of several short measurements, so that what else runs on the machine matters little.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Peaks {
    /// f32 multiply-adds out of registers, in billions of operations a second (a multiply-add is two).
    pub(crate) gflops: f64,
    /// Bytes read, in billions a second.
    pub(crate) read_gbps: f64,
    /// Bytes copied, read and written ones counted, in billions a second.
    pub(crate) copy_gbps: f64,
}

/// Seconds that one measurement of multiply-adds takes, about.
const BURST_SECONDS: f64 = 0.03;

impl Peaks {
    /// Measures with all threads of `pool` and arrays of `array_bytes`, which should be several times the last cache.
    /// `bursts` measurements of each kind.
    pub(crate) fn measure(pool: &ComputePool, array_bytes: u64, bursts: usize) -> Self {
        let (read_gbps, copy_gbps) = memory(pool, array_bytes, bursts);
        Self { gflops: multiply_adds(pool, bursts), read_gbps, copy_gbps }
    }
}

impl Peaks {
    /// The better of each.
    pub(crate) fn max(self, other: Self) -> Self {
        Self {
            gflops: self.gflops.max(other.gflops),
            read_gbps: self.read_gbps.max(other.read_gbps),
            copy_gbps: self.copy_gbps.max(other.copy_gbps),
        }
    }
}

/// Billions of operations a second.
fn multiply_adds(pool: &ComputePool, bursts: usize) -> f64 {
    let set = InstructionSet::detect();
    let run = |rounds: u64| {
        let seconds = timed(|| {
            pool.run(pool.threads(), |_| {
                black_box(peak::multiply_add(set, rounds));
            });
        });
        (rounds * peak::round_flops(set)) as f64 * pool.threads() as f64 / seconds / 1e9
    };
    let rounds = 200_000;
    let rough = run(rounds);
    let wanted = rough * 1e9 * BURST_SECONDS / pool.threads() as f64 / peak::round_flops(set) as f64;
    (0..bursts).map(|_| run(wanted.ceil() as u64)).fold(rough, f64::max)
}

/// Billions of bytes a second, read and copied.
fn memory(pool: &ComputePool, array_bytes: u64, bursts: usize) -> (f64, f64) {
    let words = (array_bytes / 8).max(1024) as usize;
    let mut array = vec![0u64; words];
    let chunk = words.div_ceil(pool.threads());
    // Written first: untouched memory is one page of zeros.
    pool.run_chunks(&mut array, chunk, |index, part| part.fill(index as u64 + 1));
    let bytes = (words * 8) as f64;
    let read = best(bursts, || {
        pool.run(pool.threads(), |thread| {
            let end = ((thread + 1) * chunk).min(words);
            black_box(peak::read(&array[(thread * chunk).min(end)..end]));
        });
    });
    let copied = best(bursts, || {
        pool.run_chunks(&mut array, chunk, |_, part| {
            let half = part.len() / 2;
            let (from, to) = part.split_at_mut(half);
            peak::copy(from, &mut to[..half]);
        });
    });
    (bytes / read / 1e9, bytes / copied / 1e9)
}

/// Seconds of the fastest run.
fn best(bursts: usize, mut work: impl FnMut()) -> f64 {
    (0..bursts.max(1)).map(|_| timed(&mut work)).fold(f64::INFINITY, f64::min)
}

fn timed(work: impl FnOnce()) -> f64 {
    let began = Instant::now();
    work();
    began.elapsed().as_secs_f64().max(1e-9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_are_numbers_that_a_machine_can_have() {
        // Large enough that a machine which is held up for some seconds is merely a slow one.
        let peaks = Peaks::measure(&ComputePool::serial(), 1 << 24, 1);
        for figure in [peaks.gflops, peaks.read_gbps, peaks.copy_gbps] {
            assert!(figure > 1e-3 && figure < 1e6, "{peaks:?}");
        }
    }
}
