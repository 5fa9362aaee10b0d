//! Heads by plan: what the patterns of the query heads of one KV head visit together, one query tile at a time.
//!
//! A block is visited whole when a pattern touches a key of it, but for the columns of vertical-slash heads, which are
//! gathered one by one.

use longshore_compute::InstructionSet;

use crate::{CpuExecutor, Error, HeadShape};

use super::blocks::{cell_sums, score_mean_queries, with_scratch};
use super::grid::{Grid, TileRows, spans};
use super::list::{Chosen, List};
use super::scores::energies;
use super::select::heaviest;
use super::streaming::Streaming;
use super::vertical_slash::{Budget, Index, SPAN, index};
use super::{HeadPattern, Heads, invalid};

/// Plans tiles by the patterns of a layer's heads.
pub(super) struct HeadPlanner<'a> {
    grid: &'a Grid<'a>,
    set: InstructionSet,
    /// Of each query head.
    patterns: Vec<HeadPattern>,
    /// Whole spans with tiles that are not exact, ascending.
    spans: Vec<u64>,
    /// `[spans][query_heads]`, of the vertical-slash heads.
    indices: Vec<Option<Index>>,
}

impl<'a> HeadPlanner<'a> {
    /// `tiles`: those that will be planned, at least one.
    pub(super) fn new(
        grid: &'a Grid<'a>,
        heads: &Heads,
        executor: &CpuExecutor,
        tiles: &[&TileRows],
    ) -> Result<Self, Error> {
        let patterns = patterns(heads, grid.input.layer, grid.input.queries.shape)?;
        let any = |wanted: fn(&HeadPattern) -> bool| patterns.iter().any(wanted);
        let slashes = any(HeadPattern::is_vertical_slash);
        let scores = any(|pattern| matches!(pattern, HeadPattern::BlockSparse { .. }));
        if slashes || scores {
            grid.check_complete()?;
        }
        if scores {
            grid.check_summaries(tiles.iter().map(|tile| grid.before(tile)).max().unwrap_or(0))?;
        }
        let set = executor.instruction_set();
        let mut planner = Self { grid, set, patterns, spans: Vec::new(), indices: Vec::new() };
        if slashes {
            planner.spans = spans(grid, tiles);
            let end = planner.spans.last().map_or(0, |span| (span + 1) * SPAN as u64);
            grid.check_tiles((end / grid.block) as usize)?;
            planner.indices = planner.index(executor);
        }
        Ok(planner)
    }

    /// Indexes all vertical-slash heads of all spans.
    fn index(&self, executor: &CpuExecutor) -> Vec<Option<Index>> {
        let heads = self.patterns.len();
        executor.pool().map(self.spans.len() * heads, |task| {
            let HeadPattern::VerticalSlash { vertical, slash } = self.patterns[task % heads] else {
                return None;
            };
            let budget = Budget { vertical: vertical as usize, slash: slash as usize };
            Some(index(self.grid, self.set, self.spans[task / heads], task % heads, budget))
        })
    }

    /// The list of a tile.
    pub(super) fn plan(&self, tile: &TileRows, kv_head: usize) -> List {
        let group = self.grid.input.queries.shape.group;
        let heads = kv_head * group..(kv_head + 1) * group;
        let mut chosen = Chosen::diagonal(self.grid, tile);
        for query_head in heads {
            match self.patterns[query_head] {
                HeadPattern::Dense => return Chosen::all(self.grid, tile).list(self.grid, tile),
                HeadPattern::Streaming { sink, recent } => self.stream(tile, sink, recent, &mut chosen),
                HeadPattern::VerticalSlash { .. } => match self.index_of(tile, query_head) {
                    Some(index) => self.slash(tile, index, &mut chosen),
                    None => return Chosen::all(self.grid, tile).list(self.grid, tile),
                },
                HeadPattern::BlockSparse { .. } => {}
            }
        }
        self.best_blocks(tile, kv_head, &mut chosen);
        chosen.columns.sort_unstable();
        chosen.columns.dedup();
        chosen.list(self.grid, tile)
    }

    fn stream(&self, tile: &TileRows, sink: u64, recent: u64, chosen: &mut Chosen) {
        for run in (Streaming { sink, recent }).blocks(tile.first, tile.last, self.grid.block) {
            chosen.blocks[run.start as usize..run.end as usize].fill(true);
        }
    }

    /// Of the tile's span; None when the call has not all of it.
    fn index_of(&self, tile: &TileRows, query_head: usize) -> Option<&Index> {
        let span = self.spans.binary_search(&(tile.first / SPAN as u64)).ok()?;
        self.indices[span * self.patterns.len() + query_head].as_ref()
    }

    fn slash(&self, tile: &TileRows, index: &Index, chosen: &mut Chosen) {
        for &distance in index.slashes.iter().take_while(|&&distance| distance <= tile.last) {
            let oldest = tile.first.saturating_sub(distance) / self.grid.block;
            let newest = (tile.last - distance) / self.grid.block;
            chosen.blocks[oldest as usize..=newest as usize].fill(true);
        }
        let end = index.verticals.partition_point(|&column| column <= tile.last);
        chosen.columns.extend(&index.verticals[..end]);
    }

    /// The blocks of the block-sparse heads.
    fn best_blocks(&self, tile: &TileRows, kv_head: usize, chosen: &mut Chosen) {
        let (group, scored) = (self.grid.input.queries.shape.group, self.grid.before(tile));
        let top = |member: usize| match self.patterns[kv_head * group + member] {
            HeadPattern::BlockSparse { top } => Some((member, top as usize)),
            _ => None,
        };
        if scored == 0 || (0..group).all(|member| top(member).is_none()) {
            return;
        }
        with_scratch(|scratch| {
            score_mean_queries(self.grid, self.set, tile, kv_head, false, scratch);
            for (member, top) in (0..group).filter_map(top) {
                let panels = scratch.scores.len() / group;
                let sums = cell_sums(self.set, member..member + 1, panels, scratch);
                let energies = energies(sums, 1, self.grid.stripe as usize, scored);
                for block in heaviest(top, &energies) {
                    chosen.blocks[block as usize] = true;
                }
            }
        });
    }
}

/// Patterns of the query heads of a layer.
pub(super) fn patterns(heads: &Heads, layer: usize, shape: HeadShape) -> Result<Vec<HeadPattern>, Error> {
    let plan = match heads {
        Heads::Uniform(pattern) => return Ok(vec![*pattern; shape.query_heads()]),
        Heads::Planned(plan) => plan,
    };
    if layer >= plan.layers() {
        return invalid("plan", format!("has {} layers, this is layer {layer}", plan.layers()));
    }
    let found = plan.layer(layer);
    match found.len() {
        heads if heads == shape.query_heads() => Ok(found.to_vec()),
        heads if heads == shape.kv_heads => {
            Ok((0..shape.query_heads()).map(|head| found[head / shape.group]).collect())
        }
        heads => invalid(
            "plan",
            format!(
                "has {heads} heads, the model has {} query heads and {} KV heads",
                shape.query_heads(),
                shape.kv_heads
            ),
        ),
    }
}
