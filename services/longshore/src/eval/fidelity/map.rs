//! Pictures of attention: what each part of the prompt attends to, and what the policy visited.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use longshore_attention::{
    AttendItem, CpuExecutor, ExactBlock, Executor, Partials, SparseWork, Visit, WorkList,
};
use longshore_compute::ComputePool;
use longshore_engine::AttentionProbe;

use super::heads::one_row;
use crate::eval::{rows::share, subject::Subject, svg::AttentionMap};

/// Cells of a side of a picture, at most.
const CELLS: usize = 96;

/// A head to draw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Drawn {
    layer: usize,
    kv_head: usize,
}

/// Reads `layer.head` of each; refuses what the model does not have.
pub(super) fn parse(draw: &[String], subject: &Subject) -> Result<Vec<Drawn>> {
    let (layers, kv_heads) = (subject.layers(), subject.node.info.config.heads.kv_heads);
    let read = |text: &String| {
        let (layer, head) = text.split_once('.')?;
        let drawn = Drawn { layer: layer.parse().ok()?, kv_head: head.parse().ok()? };
        (drawn.layer < layers && drawn.kv_head < kv_heads).then_some(drawn)
    };
    let all = draw.iter().map(|text| {
        read(text).with_context(|| {
            format!("`--draw` has `{text}`, must be LAYER.HEAD of {layers} layers and {kv_heads} KV heads")
        })
    });
    all.collect()
}

/// One picture under way.
#[derive(Debug)]
struct Map {
    of: Drawn,
    mass: Vec<Vec<f64>>,
    visited: Vec<Vec<bool>>,
}

/// Pictures under way.
#[derive(Debug)]
pub(super) struct Maps {
    executor: CpuExecutor,
    maps: Vec<Map>,
    tokens: usize,
    /// Positions of a cell; 0 before the first step.
    cell_tokens: usize,
}

impl Maps {
    /// Of a prompt of `tokens`.
    pub(super) fn new(pool: &Arc<ComputePool>, drawn: &[Drawn], tokens: usize) -> Self {
        let empty = |of: &Drawn| Map { of: *of, mass: Vec::new(), visited: Vec::new() };
        let executor = CpuExecutor::new(Arc::clone(pool));
        Self { executor, maps: drawn.iter().map(empty).collect(), tokens, cell_tokens: 0 }
    }

    /// Takes in one layer of one step: the last row of each cell that ends in it.
    pub(super) fn look(&mut self, probe: &AttentionProbe<'_>) -> Result<()> {
        let block_tokens = probe.plan.kv.shape().block_tokens;
        let blocks = self.tokens.div_ceil(block_tokens);
        let cell_blocks = blocks.div_ceil(CELLS);
        self.cell_tokens = cell_blocks * block_tokens;
        let cell = self.cell_tokens as u64;
        let first = probe.plan.queries.first_position;
        let rows = probe.plan.queries.rows() as u64;
        for map in self.maps.iter_mut().filter(|map| map.of.layer == probe.layer) {
            for position in (first..first + rows).filter(|position| (position + 1) % cell == 0) {
                let row = (position - first) as usize;
                let mass = block_mass(&self.executor, probe, map.of.kv_head, row)?;
                let blocks = visited_blocks(probe.work, map.of.kv_head, row, mass.len());
                map.mass.push(mass.chunks(cell_blocks).map(|cell| cell.iter().sum()).collect());
                map.visited.push(blocks.chunks(cell_blocks).map(|cell| cell.contains(&true)).collect());
            }
        }
        Ok(())
    }

    /// Titles and pictures.
    pub(super) fn drawings(&self, policy: &str) -> Vec<(String, String)> {
        let draw = |map: &Map| {
            let title = format!("attention of layer {} head {}, {policy}", map.of.layer, map.of.kv_head);
            let picture = AttentionMap {
                title: &title,
                mass: &map.mass,
                visited: &map.visited,
                cell_tokens: self.cell_tokens,
            };
            let svg = picture.svg();
            (title, svg)
        };
        self.maps.iter().filter(|map| !map.mass.is_empty()).map(draw).collect()
    }
}

/// Mass of exact attention on each block up to the row's own, the mean over the group.
fn block_mass(
    executor: &CpuExecutor,
    probe: &AttentionProbe<'_>,
    kv_head: usize,
    row: usize,
) -> Result<Vec<f64>> {
    let plan = &probe.plan;
    let queries = one_row(&plan.queries, row);
    let (end, block_tokens) = (queries.first_position + 1, plan.kv.shape().block_tokens as u64);
    let one = |tile: u64| {
        let first_position = tile * block_tokens;
        let len = (end - first_position).min(block_tokens) as u32;
        WorkList { exact: vec![ExactBlock { tile: tile as u32, first_position, len }], ..WorkList::default() }
    };
    let lists: Vec<WorkList> = (0..end.div_ceil(block_tokens)).map(one).collect();
    let item = |work| AttendItem { queries, kv: plan.kv, work, initial: None };
    let items: Vec<AttendItem<'_>> = lists.iter().map(item).collect();
    let parts = executor.attend(&items)?;
    let shape = plan.queries.shape;
    let mut whole = Partials::identity(1, shape.query_heads(), shape.head_dim);
    for part in &parts {
        whole.merge(part)?;
    }
    let group = kv_head * shape.group..(kv_head + 1) * shape.group;
    let mean = |part: &Partials| {
        group.clone().map(|head| share(part, &whole, 0, head)).sum::<f64>() / shape.group as f64
    };
    let masses: Vec<f64> = parts.iter().map(mean).collect();
    ensure!(masses.iter().all(|mass| mass.is_finite()), "attention of the row at {} is not finite", end - 1);
    Ok(masses)
}

/// Which blocks have a visited key.
fn visited_blocks(work: &SparseWork, kv_head: usize, row: usize, blocks: usize) -> Vec<bool> {
    let mut visited = vec![false; blocks];
    let Some(tile) = (0..work.tiles()).find(|tile| work.rows(*tile).contains(&row)) else { return visited };
    let mut mark = |tile: u32| {
        if let Some(block) = visited.get_mut(tile as usize) {
            *block = true;
        }
    };
    for visit in work.list(kv_head, tile) {
        match *visit {
            Visit::Block(block) => mark(block.tile),
            Visit::Columns { first, count } => {
                work.columns()[first as usize..(first + count) as usize].iter().for_each(|c| mark(c.tile));
            }
            Visit::Means { .. } | Visit::EndOfStripe => {}
        }
    }
    visited
}
