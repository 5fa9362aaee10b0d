//! Brings a rule to a density, and measures what it loses there.

use std::sync::Arc;

use anyhow::Result;
use longshore_attention::{CpuExecutor, Executor, Partials, PrefillPolicy, SparseItem, SparseWork};
use longshore_compute::ComputePool;
use serde::Serialize;

use super::{
    layer::{Layer, QueryTile, Truth},
    rule::{Rule, without_means},
};
use crate::eval::{
    pairs::Pairs,
    rows::{relative_distance, share},
    samples::Quantiles,
};

/// Halvings of the range of a setting.
const HALVINGS: usize = 18;

/// Layers with what is true of them.
#[derive(Debug)]
pub(super) struct Bench {
    pool: Arc<ComputePool>,
    executor: CpuExecutor,
    pub(super) layers: Vec<Layer>,
    /// `[layers][tiles]`.
    truths: Vec<Vec<Truth>>,
}

/// A rule at a density.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Measured {
    #[serde(flatten)]
    pub(super) rule: Rule,
    /// What was asked for, as a share.
    pub(super) wanted: f64,
    /// Alpha, gamma or k that comes nearest to it.
    pub(super) value: f64,
    pub(super) visited: Pairs,
    /// Relative L2 distance of the output of attention, of each row and KV head.
    pub(super) output: Quantiles,
    /// Share of the attention mass that lies on visited keys, of each row and query head.
    pub(super) mass: Quantiles,
    /// The same of each layer.
    pub(super) layers: Vec<OfLayer>,
}

/// One layer, or one kind of planted heads.
#[derive(Debug, Clone, Serialize)]
pub(super) struct OfLayer {
    pub(super) name: String,
    pub(super) visited: Pairs,
    pub(super) output: Quantiles,
    pub(super) mass: Quantiles,
}

/// Keys and means visited, over the keys of exact attention.
pub(super) fn cost(pairs: Pairs) -> f64 {
    (pairs.keys + pairs.means) as f64 / pairs.causal.max(1) as f64
}

impl Bench {
    /// Computes what is true; `done` is called with each layer that is.
    pub(super) fn new(pool: &Arc<ComputePool>, layers: Vec<Layer>, done: &dyn Fn()) -> Result<Self> {
        let executor = CpuExecutor::new(ComputePool::serial());
        let mut truths = Vec::with_capacity(layers.len());
        for layer in &layers {
            let truth = |tile: usize| layer.truth(&executor, &layer.tiles[tile]);
            let found = pool.map(layer.tiles.len(), truth);
            truths.push(found.into_iter().collect::<Result<Vec<_>>>()?);
            done();
        }
        Ok(Self { pool: Arc::clone(pool), executor, layers, truths })
    }

    /// The setting whose cost comes nearest to `wanted`, and what is lost with it.
    pub(super) fn measure(&self, rule: Rule, wanted: f64) -> Result<Measured> {
        let all = |setting: f64| -> Result<f64> {
            let value = rule.selector.value(setting);
            let policy = rule.policy(value)?;
            self.each(|layer, tile, truth| {
                let work = rule.plan(policy.as_ref(), value, &self.executor, layer, tile, truth)?;
                Ok(pairs(layer, tile, &work))
            })
            .map(|found| cost(sum(found.into_iter().flatten())))
        };
        let blocks = self.layers.iter().flat_map(|layer| layer.tiles.iter().map(|tile| layer.before(tile)));
        let (mut below, mut above) = (0.0, rule.selector.most(blocks.max().unwrap_or(0)));
        let mut best = (f64::INFINITY, below);
        for _ in 0..HALVINGS {
            let middle = (below + above) / 2.0;
            let found = all(middle)?;
            if (found - wanted).abs() < best.0 {
                best = ((found - wanted).abs(), middle);
            }
            if found < wanted { below = middle } else { above = middle }
        }
        self.at(rule, wanted, rule.selector.value(best.1))
    }

    /// What a rule loses with a value.
    fn at(&self, rule: Rule, wanted: f64, value: f64) -> Result<Measured> {
        let policy = rule.policy(value)?;
        let found =
            self.each(|layer, tile, truth| self.run(rule, policy.as_ref(), value, layer, tile, truth))?;
        let layers = self.layers.iter().zip(&found).map(|(layer, tiles)| OfLayer {
            name: layer.name.clone(),
            visited: sum(tiles.iter().map(|tile| tile.visited)),
            output: Quantiles::of(tiles.iter().flat_map(|tile| &tile.distances)),
            mass: Quantiles::of(tiles.iter().flat_map(|tile| &tile.shares)),
        });
        let tiles = || found.iter().flatten();
        Ok(Measured {
            rule,
            wanted,
            value,
            visited: sum(tiles().map(|tile| tile.visited)),
            output: Quantiles::of(tiles().flat_map(|tile| &tile.distances)),
            mass: Quantiles::of(tiles().flat_map(|tile| &tile.shares)),
            layers: layers.collect(),
        })
    }

    /// Calls `f` for each tile of each layer, side by side; `[layers][tiles]`.
    fn each<R: Send>(
        &self,
        f: impl Fn(&Layer, &QueryTile, &Truth) -> Result<R> + Sync,
    ) -> Result<Vec<Vec<R>>> {
        let places: Vec<(usize, usize)> = (0..self.layers.len())
            .flat_map(|layer| (0..self.layers[layer].tiles.len()).map(move |tile| (layer, tile)))
            .collect();
        let found = self.pool.map(places.len(), |index| {
            let (layer, tile) = places[index];
            f(&self.layers[layer], &self.layers[layer].tiles[tile], &self.truths[layer][tile])
        });
        let mut found = found.into_iter();
        let of = |layer: &Layer| found.by_ref().take(layer.tiles.len()).collect();
        self.layers.iter().map(of).collect()
    }

    fn run(
        &self,
        rule: Rule,
        policy: Option<&PrefillPolicy>,
        value: f64,
        layer: &Layer,
        tile: &QueryTile,
        truth: &Truth,
    ) -> Result<OfTile> {
        let work = rule.plan(policy, value, &self.executor, layer, tile, truth)?;
        let keys = if rule.correction { without_means(&work)? } else { work.clone() };
        let seen = attend(&self.executor, layer, tile, &keys)?;
        let with_means =
            if rule.correction { attend(&self.executor, layer, tile, &work)? } else { seen.clone() };
        let (heads, output) = (layer.heads, with_means.finish());
        let width = heads.query_heads() * heads.head_dim;
        let (mut distances, mut shares) = (Vec::new(), Vec::new());
        for (row, output) in output.chunks_exact(width).enumerate() {
            for kv_head in 0..heads.kv_heads {
                let group = kv_head * heads.group..(kv_head + 1) * heads.group;
                shares.extend(group.clone().map(|head| share(&seen, &truth.exact, row, head)));
                distances.push(relative_distance(output, &truth.exact, row, group));
            }
        }
        Ok(OfTile { visited: pairs(layer, tile, &work), distances, shares })
    }
}

/// What came of one tile.
struct OfTile {
    visited: Pairs,
    distances: Vec<f64>,
    shares: Vec<f64>,
}

fn sum(all: impl Iterator<Item = Pairs>) -> Pairs {
    let mut sum = Pairs::default();
    all.for_each(|pairs| sum.add(pairs));
    sum
}

fn pairs(layer: &Layer, tile: &QueryTile, work: &SparseWork) -> Pairs {
    layer
        .with_input(tile, |input| sum((0..work.kv_heads()).map(|kv_head| Pairs::of(work, input, kv_head, 0))))
}

fn attend(executor: &CpuExecutor, layer: &Layer, tile: &QueryTile, work: &SparseWork) -> Result<Partials> {
    layer.with_input(tile, |input| {
        let item = SparseItem {
            queries: input.queries,
            kv: input.kv,
            summaries: layer.summaries(),
            work,
            earlier: None,
            stripe: None,
            skip_below: None,
        };
        Ok(executor.attend_sparse(&[item])?.remove(0))
    })
}
