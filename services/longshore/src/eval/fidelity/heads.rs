//! Each sampled row of each layer and KV head: mass on visited keys, and distance of the output from exact attention over the
//! same keys, both computed in f32 by the dense executor.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::{Context, Result};
use longshore_attention::{AttendItem, Column, CpuExecutor, Executor, Queries, SparseWork, Visit, WorkList};
use longshore_compute::ComputePool;
use longshore_engine::AttentionProbe;
use serde::Serialize;

use crate::eval::{
    pairs::Pairs,
    rows::{everything, relative_distance, share},
    samples::Quantiles,
};

/// One KV head of one layer.
#[derive(Debug, Clone, Serialize)]
pub(super) struct HeadReport {
    pub(super) layer: usize,
    pub(super) kv_head: usize,
    /// Of all rows.
    pub(super) density: f64,
    /// Of sampled rows that were sparse.
    pub(super) mass: Quantiles,
    pub(super) output: Quantiles,
}

/// Samples of all heads.
#[derive(Debug)]
pub(super) struct Heads<'a> {
    executor: CpuExecutor,
    rows: &'a [u64],
    /// First position with a row that was sparse in some head.
    pub(super) first_sparse: Option<u64>,
    /// What rows visited where they were sparse.
    pub(super) sparse: Pairs,
    /// Mass and distance by (layer, KV head).
    samples: BTreeMap<(usize, usize), (Vec<f64>, Vec<f64>)>,
}

impl<'a> Heads<'a> {
    /// Looks at the rows at these positions, ascending.
    pub(super) fn new(pool: &Arc<ComputePool>, rows: &'a [u64]) -> Self {
        let executor = CpuExecutor::new(Arc::clone(pool));
        Self { executor, rows, first_sparse: None, sparse: Pairs::default(), samples: BTreeMap::new() }
    }

    /// Takes in one layer of one step.
    pub(super) fn look(&mut self, probe: &AttentionProbe<'_>) -> Result<()> {
        let (work, plan) = (probe.work, &probe.plan);
        for tile in 0..work.tiles() {
            let rows = work.rows(tile);
            let first = plan.queries.first_position;
            let (from, to) = (first + rows.start as u64, first + rows.end as u64);
            let mut sparse = Vec::new();
            for kv_head in 0..work.kv_heads() {
                let pairs = Pairs::of(work, plan, kv_head, tile);
                if pairs.keys < pairs.causal {
                    sparse.push(kv_head);
                    self.sparse.add(pairs);
                }
            }
            if sparse.is_empty() {
                continue;
            }
            self.first_sparse = Some(self.first_sparse.map_or(from, |first| first.min(from)));
            let all = self.rows;
            for &position in all.iter().filter(|row| (from..to).contains(*row)) {
                self.row(probe, tile, (position - first) as usize, &sparse)?;
            }
        }
        Ok(())
    }

    /// One row: exact attention once, then the visited keys of each head.
    fn row(&mut self, probe: &AttentionProbe<'_>, tile: usize, row: usize, heads: &[usize]) -> Result<()> {
        let plan = &probe.plan;
        let position = plan.queries.first_position + row as u64;
        let block_tokens = plan.kv.shape().block_tokens as u64;
        let mut lists = vec![everything(position + 1, block_tokens)];
        lists.extend(heads.iter().map(|head| visited(probe.work, *head, tile)));
        let queries = one_row(&plan.queries, row);
        let item = |work| AttendItem { queries, kv: plan.kv, work, initial: None };
        let items: Vec<AttendItem<'_>> = lists.iter().map(item).collect();
        let mut found = self.executor.attend(&items)?.into_iter();
        let exact = found.next().context("an executor answers every item")?;
        let shape = plan.queries.shape;
        let width = shape.query_heads() * shape.head_dim;
        let output = &probe.output[row * width..][..width];
        for (&kv_head, part) in heads.iter().zip(found) {
            let group = kv_head * shape.group..(kv_head + 1) * shape.group;
            let (mass, distance) = self.samples.entry((probe.layer, kv_head)).or_default();
            mass.extend(group.clone().map(|head| share(&part, &exact, 0, head)));
            distance.push(relative_distance(output, &exact, 0, group));
        }
        Ok(())
    }

    /// Over all heads.
    pub(super) fn mass(&self) -> Quantiles {
        Quantiles::of(self.samples.values().flat_map(|(mass, _)| mass))
    }

    /// Over all heads.
    pub(super) fn output(&self) -> Quantiles {
        Quantiles::of(self.samples.values().flat_map(|(_, distance)| distance))
    }

    /// Head by head, with what was visited in `pairs` (`[layers][kv_heads]`).
    pub(super) fn reports(&self, pairs: &[Vec<Pairs>]) -> Vec<HeadReport> {
        let mut reports = Vec::new();
        for (layer, heads) in pairs.iter().enumerate() {
            for (kv_head, pairs) in heads.iter().enumerate() {
                let (mass, output) = match self.samples.get(&(layer, kv_head)) {
                    Some((mass, distance)) => (Quantiles::of(mass), Quantiles::of(distance)),
                    None => Default::default(),
                };
                reports.push(HeadReport { layer, kv_head, density: pairs.density(), mass, output });
            }
        }
        reports
    }
}

/// One row of some.
pub(super) fn one_row<'q>(queries: &Queries<'q>, row: usize) -> Queries<'q> {
    let width = queries.shape.query_heads() * queries.shape.head_dim;
    let data = &queries.data[row * width..][..width];
    Queries { first_position: queries.first_position + row as u64, data, ..*queries }
}

/// The keys of a list, without the means.
fn visited(work: &SparseWork, kv_head: usize, tile: usize) -> WorkList {
    let mut list = WorkList::default();
    for visit in work.list(kv_head, tile) {
        match *visit {
            Visit::Block(block) => list.exact.push(block),
            Visit::Columns { first, count } => {
                let columns: &[Column] = &work.columns()[first as usize..(first + count) as usize];
                list.columns.extend_from_slice(columns);
            }
            Visit::Means { .. } | Visit::EndOfStripe => {}
        }
    }
    list
}

#[cfg(test)]
mod tests;
