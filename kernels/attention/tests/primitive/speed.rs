//! How fast the executor is; run by hand: `cargo nextest run -p longshore-attention --run-ignored only --no-capture`.

use std::time::Instant;

use longshore_attention::{CpuExecutor, Executor, HeadShape, KvDtype};

use crate::case::{Plan, generator};

#[test]
#[ignore = "a measurement"]
fn measures_speed() {
    let mut rng = generator(1);
    for (what, prefix, rows, group, head_dim, dtype) in [
        ("prefill", 2048, 512, 3, 64, KvDtype::F32),
        ("prefill", 2048, 512, 3, 64, KvDtype::F16),
        ("prefill", 2048, 512, 4, 128, KvDtype::F16),
        ("decode", 4096, 1, 3, 64, KvDtype::F32),
        ("decode", 4096, 1, 3, 64, KvDtype::F16),
        ("decode", 4096, 1, 1, 64, KvDtype::F16),
        ("decode", 4096, 1, 7, 128, KvDtype::F16),
    ] {
        let heads = HeadShape { kv_heads: 4, group, head_dim };
        let case = Plan { heads, block_tokens: 64, dtype, prefix, rows, size: 1.0 }.dense(&mut rng);
        let item = case.item(&case.work, 0, rows, None);
        let pairs = (0..rows).map(|row| prefix + row + 1).sum::<usize>() * heads.query_heads();
        let work = (pairs * head_dim * 4) as f64;
        let best = (0..10)
            .map(|_| {
                let start = Instant::now();
                CpuExecutor.attend(&[item]).unwrap();
                start.elapsed().as_secs_f64()
            })
            .fold(f64::INFINITY, f64::min);
        println!(
            "{what} rows {rows} keys {prefix} group {group} head {head_dim} {}: {:.2} ms, {:.1} GFLOP/s",
            dtype.name(),
            best * 1e3,
            work / best / 1e9
        );
    }
}
