//! Linear layers by row count: all matrices of a model's layers, each with weights of its own, as a step goes through them.

use anyhow::{Context, Result};
use longshore_model::{Linear, LinearLayer, ModelConfig, ModelInfo, TensorType};
use serde::Serialize;

use super::{Bench, plan::Plan, timing};
use crate::bench::noise::Noise;
use crate::{
    bench::statistics::Spread,
    model::{self, ModelRef},
};

/// Types of the weights.
pub(super) const KINDS: [TensorType; 3] = [TensorType::Q4_1, TensorType::Q8_0, TensorType::F32];

/// Shapes and points of the linear layers.
#[derive(Debug, Clone, Serialize)]
pub(super) struct LinearReport {
    /// `[outputs, inputs]` of the matrices of one layer.
    pub(super) shapes: Vec<[usize; 2]>,
    /// Layers of the model.
    pub(super) layers: usize,
    /// Points.
    pub(super) points: Vec<LinearPoint>,
}

/// One point of the linear layers.
#[derive(Debug, Clone, Serialize)]
pub(super) struct LinearPoint {
    /// Type of the weights as files have them.
    pub(super) weights: String,
    /// What products are computed in.
    pub(super) computed: String,
    /// Rows that go through together.
    pub(super) rows: usize,
    /// Layers that were measured; the others would take as long.
    pub(super) layers_measured: usize,
    /// Seconds through all layers of the model.
    pub(super) seconds: Spread,
    /// Billions of operations a second; a multiplication and an addition are two.
    pub(super) gops: f64,
    /// Packed weights read, in billions of bytes a second, as if each were read once.
    pub(super) weights_gbps: f64,
    /// Rows a second through all layers, the output matrix left out.
    pub(super) tokens_per_second: f64,
}

/// Measures every type and row count at the shapes of the configured model.
pub(super) fn measure(bench: &Bench, plan: &Plan) -> Result<LinearReport> {
    let reference = ModelRef::parse(&bench.config.model.reference)?;
    let path = model::ensure(&reference).context("cannot get the model")?;
    let config = ModelInfo::open(&path).context("cannot read the model")?.config;
    let shapes = shapes(&config);
    let linear = bench.config.model.linear().context("`model.linear` must be `auto`, `int8` or `f32`")?;
    let mut points = Vec::new();
    for kind in KINDS {
        bench.bar.set_message(format!("packing {kind} weights"));
        let stack = Stack::new(bench, linear, kind, &shapes, config.layers)
            .with_context(|| format!("the model's matrices cannot be {kind}"))?;
        for &rows in &plan.rows {
            bench.next(&format!("linear layers, {kind}, {rows} rows"));
            points.push(stack.measure(bench, rows)?);
        }
    }
    Ok(LinearReport { shapes, layers: config.layers, points })
}

fn shapes(config: &ModelConfig) -> Vec<[usize; 2]> {
    let (hidden, ffn, heads) = (config.hidden, config.ffn, config.heads);
    let (q, kv) = (heads.query_heads() * heads.head_dim, heads.kv_heads * heads.head_dim);
    vec![[q, hidden], [kv, hidden], [kv, hidden], [hidden, q], [ffn, hidden], [ffn, hidden], [hidden, ffn]]
}

/// Matrices of several layers, more than caches hold where the model has as much.
struct Stack {
    kind: TensorType,
    layers: Vec<Vec<LinearLayer>>,
    /// Layers of the model for each that is here.
    scale: f64,
}

impl Stack {
    fn new(
        bench: &Bench,
        linear: Linear,
        kind: TensorType,
        shapes: &[[usize; 2]],
        all: usize,
    ) -> Result<Self> {
        let layer = |seed: usize| -> Result<Vec<LinearLayer>> {
            let matrix = |(index, shape): (usize, &[usize; 2])| {
                LinearLayer::synthetic(&bench.pool, linear, kind, *shape, (seed * 16 + index) as u64)
            };
            Ok(shapes.iter().enumerate().map(matrix).collect::<Result<_, _>>()?)
        };
        let first = layer(0)?;
        let bytes: u64 = first.iter().map(LinearLayer::bytes).sum();
        let count =
            (bench.machine.last_cache_bytes() * 8).div_ceil(bytes.max(1)).clamp(1, all as u64) as usize;
        let mut layers = vec![first];
        for seed in 1..count {
            layers.push(layer(seed)?);
        }
        Ok(Self { kind, layers, scale: all as f64 / count as f64 })
    }

    fn measure(&self, bench: &Bench, rows: usize) -> Result<LinearPoint> {
        let matrices = || self.layers.iter().flatten();
        let widest = |side: usize| matrices().map(|matrix| matrix.shape()[side]).max().unwrap_or(0);
        let (x, mut out) = (Noise(3).numbers(rows * widest(1)), vec![0.0; rows * widest(0)]);
        let seconds = timing::sample(bench.repeats, || {
            for matrix in matrices() {
                let [outputs, inputs] = matrix.shape();
                matrix.multiply(&bench.pool, &x[..rows * inputs], rows, &mut out[..rows * outputs]);
            }
            std::hint::black_box(&mut out);
            Ok(())
        })?;
        let seconds = seconds.map(|seconds| seconds * self.scale);
        let all = |of: fn(&LinearLayer) -> f64| matrices().map(of).sum::<f64>() * self.scale;
        let products = all(|matrix| (matrix.shape()[0] * matrix.shape()[1]) as f64);
        Ok(LinearPoint {
            weights: self.kind.to_string(),
            // Without the type of the weights, which is a column of its own.
            computed: self.layers[0][0].describe().trim_start_matches(&format!("{}: ", self.kind)).to_owned(),
            rows,
            layers_measured: self.layers.len(),
            gops: 2.0 * rows as f64 * products / seconds.median / 1e9,
            weights_gbps: all(|matrix| matrix.bytes() as f64) / seconds.median / 1e9,
            tokens_per_second: rows as f64 / seconds.median,
            seconds,
        })
    }
}
