//! The attention executor alone, called as the engine calls it.

use anyhow::Result;
use longshore_attention::{
    AttendItem, CpuExecutor, ExactBlock, Executor, HeadShape, KvDtype, Queries, Tiles, WorkList,
};
use serde::Serialize;

use super::{Bench, plan::Plan, timing};
use crate::{
    bench::{
        noise::{Noise, tiles},
        statistics::Spread,
    },
    machine::Peaks,
};

/// Heads of a small and of a large model; two KV heads and more, so that threads have work to share.
const HEADS: [HeadShape; 2] =
    [HeadShape { kv_heads: 3, group: 3, head_dim: 64 }, HeadShape { kv_heads: 2, group: 4, head_dim: 128 }];

/// One point of attention.
#[derive(Debug, Clone, Serialize)]
pub(super) struct AttentionPoint {
    /// `prefill` or `decode`.
    pub(super) kind: &'static str,
    /// Prompt tokens, or keys of a decode step.
    pub(super) tokens: usize,
    /// Elements of a head.
    pub(super) head_dim: usize,
    /// Query heads of a KV head.
    pub(super) group: usize,
    /// KV heads.
    pub(super) kv_heads: usize,
    /// Element type of K and V.
    pub(super) kv_dtype: &'static str,
    /// Seconds of the prompt, or of one step, in one layer.
    pub(super) seconds: Spread,
    /// Billions of operations a second; only visible pairs of query and key count.
    pub(super) gflops: f64,
    /// Multiply-adds of the machine just before or after, the better of both.
    pub(super) peak_gflops: f64,
    /// Read bandwidth of the machine, likewise.
    pub(super) peak_read_gbps: f64,
    /// Its share of the machine's multiply-adds.
    pub(super) flops_share: f64,
    /// Bytes of K and V read in a decode step, in billions a second.
    pub(super) kv_gbps: Option<f64>,
    /// Its share of the machine's read bandwidth.
    pub(super) read_share: Option<f64>,
    /// What a perfect kernel would wait for: `multiply-adds` or `memory`.
    pub(super) bound: &'static str,
}

/// Work of one point.
struct Work {
    flops: f64,
    /// Bytes of K and V that a decode step reads once.
    kv_bytes: Option<f64>,
}

/// Measures every head shape and KV type.
pub(super) fn measure(bench: &Bench, plan: &Plan) -> Result<Vec<AttentionPoint>> {
    let executor = CpuExecutor::new(bench.pool.clone());
    let mut points = Vec::new();
    // What a machine that others share can do changes within seconds, so it is measured again beside each point.
    let mut before = bench.peaks;
    let mut beside = |point: AttentionPoint| {
        let after = Peaks::measure(&bench.pool, plan.array_bytes(&bench.machine), 2);
        let point = point.beside(&before.max(after));
        before = after;
        point
    };
    for heads in HEADS {
        for dtype in KvDtype::ALL {
            for &tokens in &plan.attention_lengths {
                bench.next(&name("prefill", tokens, heads, dtype));
                points.push(beside(prefill(bench, &executor, heads, dtype, tokens)?));
            }
            for &keys in &plan.attention_keys {
                bench.next(&name("decode", keys, heads, dtype));
                points.push(beside(decode(bench, &executor, heads, dtype, keys)?));
            }
        }
    }
    Ok(points)
}

impl AttentionPoint {
    /// The point beside the peaks of the moment.
    fn beside(mut self, peaks: &Peaks) -> Self {
        self.peak_gflops = peaks.gflops;
        self.peak_read_gbps = peaks.read_gbps;
        self.flops_share = self.gflops / peaks.gflops;
        self.read_share = self.kv_gbps.map(|rate| rate / peaks.read_gbps);
        if self.read_share.is_some_and(|share| share > self.flops_share) {
            self.bound = "memory";
        }
        self
    }
}

fn name(kind: &str, tokens: usize, heads: HeadShape, dtype: KvDtype) -> String {
    format!("attention {kind} {tokens}, head {} group {} {}", heads.head_dim, heads.group, dtype.name())
}

/// A whole prompt in one layer, chunk by chunk, as a prefill worker computes it.
fn prefill(
    bench: &Bench,
    executor: &CpuExecutor,
    heads: HeadShape,
    dtype: KvDtype,
    tokens: usize,
) -> Result<AttentionPoint> {
    let keys = tiles(heads, bench.config.model.block_tokens as usize, dtype, tokens);
    let chunk = bench.config.prefill.chunk_tokens as usize;
    let width = heads.query_heads() * heads.head_dim;
    let queries = Noise(1).numbers(chunk.min(tokens) * width);
    let chunks: Vec<(usize, WorkList)> =
        (0..tokens).step_by(chunk).map(|first| (first, work(&keys, (first + chunk).min(tokens)))).collect();
    let seconds = timing::sample(bench.repeats, || {
        for (first, work) in &chunks {
            let rows = chunk.min(tokens - first);
            attend(executor, heads, &keys, work, *first, &queries[..rows * width])?;
        }
        Ok(())
    })?;
    let pairs = tokens as f64 * (tokens + 1) as f64 / 2.0;
    let flops = pairs * (heads.query_heads() * heads.head_dim * 4) as f64;
    Ok(point("prefill", tokens, heads, dtype, seconds, &Work { flops, kv_bytes: None }))
}

/// One decode step in one layer. The layers of a model do not fit into caches together, so several take turns here.
fn decode(
    bench: &Bench,
    executor: &CpuExecutor,
    heads: HeadShape,
    dtype: KvDtype,
    tokens: usize,
) -> Result<AttentionPoint> {
    let make = || tiles(heads, bench.config.model.block_tokens as usize, dtype, tokens);
    let first = make();
    let kv_bytes = (first.tiles.len() * first.shape.bytes()) as u64;
    let count = (bench.machine.last_cache_bytes() * 4).div_ceil(kv_bytes).clamp(2, 64) as usize;
    let layers: Vec<Tiles> = std::iter::once(first).chain((1..count).map(|_| make())).collect();
    let queries = Noise(2).numbers(heads.query_heads() * heads.head_dim);
    let list = work(&layers[0], tokens);
    let seconds = timing::sample(bench.repeats, || {
        layers.iter().try_for_each(|keys| attend(executor, heads, keys, &list, tokens - 1, &queries))
    })?;
    let seconds = seconds.map(|all| all / count as f64);
    let flops = (tokens * heads.query_heads() * heads.head_dim * 4) as f64;
    Ok(point("decode", tokens, heads, dtype, seconds, &Work { flops, kv_bytes: Some(kv_bytes as f64) }))
}

/// The first `tokens` keys, block by block.
fn work(keys: &Tiles, tokens: usize) -> WorkList {
    let block_tokens = keys.shape.block_tokens;
    let exact = (0..tokens.div_ceil(block_tokens)).map(|tile| ExactBlock {
        tile: tile as u32,
        first_position: (tile * block_tokens) as u64,
        len: block_tokens.min(tokens - tile * block_tokens) as u32,
    });
    WorkList { exact: exact.collect(), ..WorkList::default() }
}

fn attend(
    executor: &CpuExecutor,
    heads: HeadShape,
    keys: &Tiles,
    work: &WorkList,
    first: usize,
    data: &[f32],
) -> Result<()> {
    let scale = 1.0 / (heads.head_dim as f32).sqrt();
    let queries = Queries { shape: heads, first_position: first as u64, scale, data };
    std::hint::black_box(executor.attend(&[AttendItem { queries, kv: keys, work, initial: None }])?);
    Ok(())
}

fn point(
    kind: &'static str,
    tokens: usize,
    heads: HeadShape,
    dtype: KvDtype,
    seconds: Spread,
    work: &Work,
) -> AttentionPoint {
    let gflops = work.flops / seconds.median / 1e9;
    let kv_gbps = work.kv_bytes.map(|bytes| bytes / seconds.median / 1e9);
    AttentionPoint {
        kind,
        tokens,
        head_dim: heads.head_dim,
        group: heads.group,
        kv_heads: heads.kv_heads,
        kv_dtype: dtype.name(),
        seconds,
        gflops,
        peak_gflops: 0.0,
        peak_read_gbps: 0.0,
        flops_share: 0.0,
        kv_gbps,
        read_share: None,
        bound: "multiply-adds",
    }
}
