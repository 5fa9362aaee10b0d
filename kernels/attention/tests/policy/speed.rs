//! How long planning takes; run by hand, in release:
//! `cargo test --release -p longshore-attention --test policy -- --ignored --nocapture speed`.

use std::time::Instant;

use longshore_attention::{
    AttendItem, CpuExecutor, ExactBlock, Executor, HeadShape, KvDtype, SparseWork, Visit, WorkList,
};
use longshore_compute::{ComputePool, PoolOptions};

use crate::case::{Case, Shape, generator, policy};

/// Seconds of the fastest of three runs.
fn best<R>(mut f: impl FnMut() -> R) -> f64 {
    let time = |_| {
        let start = Instant::now();
        drop(f());
        start.elapsed().as_secs_f64()
    };
    (0..3).map(time).fold(f64::INFINITY, f64::min)
}

/// Share of the blocks that the lists visit.
fn density(work: &SparseWork, blocks: usize) -> f64 {
    let lists = (0..work.kv_heads()).flat_map(|kv_head| (0..work.tiles()).map(move |tile| (kv_head, tile)));
    let visited = lists.map(|(kv_head, tile)| {
        let blocks = work.list(kv_head, tile).iter().filter(|visit| matches!(visit, Visit::Block(_)));
        blocks.count()
    });
    visited.sum::<usize>() as f64 / (blocks * work.kv_heads() * work.tiles()) as f64
}

/// The last 512 rows of a sequence of SmolLM2's shape, beside dense attention of the same rows.
#[test]
#[ignore = "a measurement"]
fn speed() {
    let tokens = 131_072;
    let heads = HeadShape { kv_heads: 3, group: 3, head_dim: 64 };
    let shape = Shape { heads, block: 64, dtype: KvDtype::F16, stripe: 32, tokens: 1, size: 1.0 };
    let mut rng = generator(0);
    let few = Shape { tokens: 4096, ..shape }.case(&mut rng);
    let keys: Vec<f32> = few.keys.iter().copied().cycle().take(tokens * 3 * 64).collect();
    let q: Vec<f32> = few.q.iter().copied().cycle().take(tokens * 9 * 64).collect();
    let case = Case::new(Shape { tokens, ..shape }, &keys, q);
    let pool = ComputePool::new(&PoolOptions { threads: 2, pin: Vec::new() }).unwrap();
    let executor = CpuExecutor::new(pool);
    let input = case.input(tokens - 512, tokens);
    let exact = (0..2048).map(|tile| ExactBlock { tile, first_position: u64::from(tile) * 64, len: 64 });
    let work = WorkList { exact: exact.collect(), ..WorkList::default() };
    let item = AttendItem { queries: input.queries, kv: &case.kv, work: &work, initial: None };
    let dense = best(|| executor.attend(&[item]).unwrap());
    println!("dense attention of 512 rows at {tokens}: {:.1} ms", dense * 1e3);
    for text in [
        "blocks:selector=top-k,k=96",
        "blocks:alpha=0.1",
        "blocks:scorer=row-normalised,selector=top-k,k=96",
        "blocks:scorer=pooled-query,selector=mass,gamma=0.9",
        "blocks:scorer=antidiagonal,stride=16,selector=top-k,k=96",
        "blocks:scorer=antidiagonal,stride=8,selector=top-k,k=96",
        "streaming",
        "minference",
        "minference:vertical=30,slash=800",
    ] {
        let policy = policy(text);
        let seconds = best(|| policy.plan(&executor, &input).unwrap());
        let visited = density(&policy.plan(&executor, &input).unwrap(), 2048);
        println!(
            "{text}: {:.1} ms, density {:.1} %: {:.1} % of dense, {:.0} % of the blocks that it leaves",
            seconds * 1e3,
            visited * 100.0,
            seconds / dense * 100.0,
            seconds / dense / visited * 100.0,
        );
    }
}

/// Planning alone, far out: the last 128 rows of half a million positions of the recall model's shape.
#[test]
#[ignore = "a measurement"]
fn planning() {
    let tokens = 524_288;
    let heads = HeadShape { kv_heads: 1, group: 2, head_dim: 64 };
    let shape = Shape { heads, block: 64, dtype: KvDtype::F16, stripe: 32, tokens, size: 1.0 };
    let mut rng = generator(0);
    let few = Shape { tokens: 65_536, ..shape }.case(&mut rng);
    // Blocks repeat after a while, a little longer each time, so that none weighs what another does.
    let width = 64;
    let keys: Vec<f32> = (0..tokens * width)
        .map(|index| few.keys[index % few.keys.len()] * (1.0 + 0.01 * (index / few.keys.len()) as f32))
        .collect();
    let q: Vec<f32> = few.q.iter().copied().cycle().take(tokens * 2 * width).collect();
    let case = Case::new(shape, &keys, q);
    let executor = CpuExecutor::serial();
    let input = case.input(tokens - 128, tokens);
    for text in [
        "blocks:scorer=pooled,selector=top-k,k=96,correction=off",
        "blocks:scorer=pooled,selector=alpha,alpha=0.1",
        "blocks:scorer=row-normalised,selector=top-k,k=96",
        "blocks:scorer=row-normalised,selector=mass,gamma=0.5,peak=0.25",
        "blocks:scorer=row-normalised,selector=mass,gamma=0.9,peak=0.25",
        "blocks:scorer=row-normalised,selector=mass,gamma=0.9,peak=0.25,levels=2",
    ] {
        let policy = policy(text);
        let seconds = best(|| policy.plan(&executor, &input).unwrap());
        let visited = density(&policy.plan(&executor, &input).unwrap(), 8192);
        println!("{text}: {:.2} ms a tile, density {:.1} %", seconds * 1e3 / 4.0, visited * 100.0);
    }
}
