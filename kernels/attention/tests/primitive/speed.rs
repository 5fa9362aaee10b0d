//! How fast the executor is; run by hand, in release:
//! `cargo test --release -p longshore-attention --test primitive -- --ignored --nocapture speed`.

use std::hint::black_box;
use std::time::Instant;

use longshore_attention::{AttendItem, CpuExecutor, ExactBlock, Executor, HeadShape, KvDtype, WorkList};
use longshore_compute::{ComputePool, PoolOptions};

use crate::case::{Case, Plan, generator};

/// Seconds of the fastest of some runs.
fn best(runs: usize, mut f: impl FnMut()) -> f64 {
    (0..runs)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

/// One item per stripe of 2,048 keys, as callers give them.
fn stripes(case: &Case) -> Vec<WorkList> {
    let lists = case.work.exact.chunks(2048 / 64);
    lists.map(|exact: &[ExactBlock]| WorkList { exact: exact.to_vec(), ..WorkList::default() }).collect()
}

/// GFLOP/s of independent fused multiply-adds on all threads.
fn multiply_add_peak(pool: &ComputePool) -> f64 {
    const STEPS: usize = 200_000;
    let seconds = best(10, || {
        pool.run(pool.threads(), |_| {
            let mut sums = [[1.0_f32; 16]; 6];
            let factor = black_box([0.999_f32; 16]);
            chain(&mut sums, &factor, STEPS);
            black_box(sums);
        });
    });
    (pool.threads() * STEPS * 6 * 16 * 2) as f64 / seconds / 1e9
}

#[cfg(target_arch = "x86_64")]
fn chain(sums: &mut [[f32; 16]; 6], factor: &[f32; 16], steps: usize) {
    #[target_feature(enable = "avx2,fma")]
    fn vectors(sums: &mut [[f32; 16]; 6], factor: &[f32; 16], steps: usize) {
        let mut local = *sums;
        for _ in 0..steps {
            for sum in &mut local {
                for i in 0..16 {
                    sum[i] = sum[i].mul_add(factor[i], factor[i]);
                }
            }
        }
        *sums = local;
    }
    assert!(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"));
    #[expect(unsafe_code, reason = "vector instructions")]
    // SAFETY: the processor was asked.
    unsafe {
        vectors(sums, factor, steps);
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn chain(sums: &mut [[f32; 16]; 6], factor: &[f32; 16], steps: usize) {
    for _ in 0..steps {
        for sum in sums.iter_mut() {
            for i in 0..16 {
                sum[i] = sum[i].mul_add(factor[i], factor[i]);
            }
        }
    }
}

/// GB/s of reading 256 MiB on all threads.
fn read_peak(pool: &ComputePool) -> f64 {
    let data: Vec<u64> = (0..32 << 20).collect();
    let seconds = best(10, || {
        let sums = pool.map(64, |part| {
            let part = &data[part * data.len() / 64..(part + 1) * data.len() / 64];
            part.iter().fold(0_u64, |sum, x| sum.wrapping_add(*x))
        });
        black_box(sums);
    });
    (data.len() * 8) as f64 / seconds / 1e9
}

#[test]
#[ignore = "a measurement"]
fn measures_speed() {
    let pool = ComputePool::new(&PoolOptions::default()).unwrap();
    let (multiply_adds, read) = (multiply_add_peak(&pool), read_peak(&pool));
    let executor = CpuExecutor::new(pool.clone());
    println!("{} threads, {}", pool.threads(), executor.instruction_set());
    println!("peaks: {multiply_adds:.0} GFLOP/s, {read:.1} GB/s read");
    let filter = std::env::args().next_back().filter(|last| last.starts_with("only="));
    for (what, prefix, rows) in [
        ("prefill", 512, 512),
        ("prefill", 7680, 512),
        ("decode", 500, 1),
        ("decode", 8191, 1),
        ("decode", 32767, 1),
        ("decode", 131_071, 1),
    ] {
        for (group, head_dim) in [(3, 64), (4, 128)] {
            for dtype in KvDtype::ALL {
                let name = format!(
                    "{what} {rows:>3} rows {:>6} keys g{group} d{head_dim} {}",
                    prefix + rows,
                    dtype.name()
                );
                if filter.as_ref().is_some_and(|filter| !name.contains(&filter[5..])) {
                    continue;
                }
                let heads = HeadShape { kv_heads: 3, group, head_dim };
                let case =
                    Plan { heads, block_tokens: 64, dtype, prefix, rows, size: 1.0 }.dense(&mut generator(1));
                let lists = stripes(&case);
                let items: Vec<AttendItem<'_>> =
                    lists.iter().map(|list| case.item(list, 0, rows, None)).collect();
                let runs = if what == "prefill" { 10 } else { 40 };
                let seconds = best(runs, || {
                    black_box(executor.attend(&items).unwrap());
                });
                let pairs = (0..rows).map(|row| prefix + row + 1).sum::<usize>() * heads.query_heads();
                let flops = (pairs * head_dim * 4) as f64 / seconds / 1e9;
                let bytes = (case.kv.tiles.len() * case.kv.shape.bytes()) as f64 / seconds / 1e9;
                println!(
                    "{name}: {:.3} ms, {flops:.1} GFLOP/s ({:.0} %), {bytes:.1} GB/s ({:.0} %)",
                    seconds * 1e3,
                    flops / multiply_adds * 100.0,
                    bytes / read * 100.0
                );
            }
        }
    }
}
