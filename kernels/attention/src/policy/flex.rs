//! FlexPrefill's heads: query-aware where the pooled estimate can be trusted, vertical-slash where it cannot.
//!
//! On a grid of spans, as the index of vertical-slash heads: the attention of a query head's last 64 rows of a span, summed over the
//! keys of each block that ends before them, is compared with the softmax of their mean query over the mean keys of the same
//! blocks. Where the square root of the Jensen-Shannon divergence (natural logarithm) lies below τ, every tile of the span takes the
//! fewest blocks whose pooled shares reach γ; elsewhere columns and diagonals are counted off by their mass up to γ, and the
//! heaviest blocks of columns and of diagonals, as many as these would fill, are visited, the first of both always.
//! The paper compares once for a prompt and counts cells of all its rows together; here a decision depends on no later span.

use crate::exp2::exp2;
use crate::{CpuExecutor, Error};

use longshore_compute::InstructionSet;

use super::blocks::{cell_sums, score_mean_queries, score_mean_rows, with_scratch};
use super::grid::{Grid, TileRows, spans};
use super::list::{Chosen, List};
use super::log2::log2;
use super::scores::energies;
use super::select::{heaviest, select};
use super::vertical_slash::{LAST, SPAN, estimate};
use super::{Flex, Selector};

/// What a query head does in a span.
#[derive(Debug, Clone)]
enum Kind {
    QueryAware,
    VerticalSlash {
        /// Blocks of keys.
        columns: Vec<u32>,
        /// Of distances: `s` stands for `[s · block, (s + 1) · block)`.
        diagonals: Vec<u32>,
    },
}

/// Plans tiles of flexible heads.
pub(super) struct FlexPlanner<'a> {
    grid: &'a Grid<'a>,
    rule: Flex,
    set: InstructionSet,
    /// Whole spans with tiles that are not exact, ascending.
    spans: Vec<u64>,
    /// `[spans][query_heads]`.
    kinds: Vec<Kind>,
}

impl<'a> FlexPlanner<'a> {
    /// `tiles`: those that will be planned, at least one.
    pub(super) fn new(
        grid: &'a Grid<'a>,
        rule: Flex,
        executor: &CpuExecutor,
        tiles: &[&TileRows],
    ) -> Result<Self, Error> {
        grid.check_complete()?;
        let spans = spans(grid, tiles);
        let end = spans.last().map_or(0, |span| (span + 1) * SPAN as u64);
        let scored = tiles.iter().map(|tile| grid.before(tile)).max().unwrap_or(0);
        grid.check_summaries(scored.max(compared(grid, end)))?;
        grid.check_tiles((end / grid.block) as usize)?;
        let mut planner = Self { grid, rule, set: executor.instruction_set(), spans, kinds: Vec::new() };
        let heads = grid.input.queries.shape.query_heads();
        planner.kinds = executor
            .pool()
            .map(planner.spans.len() * heads, |task| planner.kind(planner.spans[task / heads], task % heads));
        Ok(planner)
    }

    /// The list of a tile.
    pub(super) fn plan(&self, tile: &TileRows, kv_head: usize) -> List {
        let (grid, shape) = (self.grid, self.grid.input.queries.shape);
        let Ok(span) = self.spans.binary_search(&(tile.first / SPAN as u64)) else {
            return Chosen::all(grid, tile).list(grid, tile);
        };
        let mut chosen = Chosen::diagonal(grid, tile);
        let kinds = &self.kinds[span * shape.query_heads() + kv_head * shape.group..][..shape.group];
        for kind in kinds {
            if let Kind::VerticalSlash { columns, diagonals } = kind {
                self.slash(tile, columns, diagonals, &mut chosen);
            }
        }
        self.query_aware(tile, kv_head, kinds, &mut chosen);
        chosen.list(grid, tile)
    }

    fn slash(&self, tile: &TileRows, columns: &[u32], diagonals: &[u32], chosen: &mut Chosen) {
        let (block, seen) = (self.grid.block, chosen.blocks.len());
        for &column in columns.iter().filter(|&&column| (column as usize) < seen) {
            chosen.blocks[column as usize] = true;
        }
        for &diagonal in diagonals {
            let nearest = u64::from(diagonal) * block;
            if nearest <= tile.last {
                let oldest = tile.first.saturating_sub(nearest + block - 1) / block;
                let newest = (tile.last - nearest) / block;
                chosen.blocks[oldest as usize..=newest as usize].fill(true);
            }
        }
    }

    fn query_aware(&self, tile: &TileRows, kv_head: usize, kinds: &[Kind], chosen: &mut Chosen) {
        let scored = self.grid.before(tile);
        if scored == 0 || !kinds.iter().any(|kind| matches!(kind, Kind::QueryAware)) {
            return;
        }
        with_scratch(|scratch| {
            score_mean_queries(self.grid, self.set, tile, kv_head, false, scratch);
            let panels = scratch.scores.len() / kinds.len();
            for (member, kind) in kinds.iter().enumerate() {
                if let Kind::QueryAware = kind {
                    let sums = cell_sums(self.set, member..member + 1, panels, scratch);
                    let energies = energies(sums, 1, self.grid.stripe as usize, scored);
                    select(Selector::Mass(self.rule.gamma), usize::MAX, &energies, &mut chosen.blocks);
                    select(Selector::TopK(self.least()), usize::MAX, &energies, &mut chosen.blocks);
                }
            }
        });
    }

    /// Blocks that every head visits at least.
    fn least(&self) -> usize {
        self.rule.budget.div_ceil(self.grid.block) as usize
    }

    /// What a query head does in a span.
    fn kind(&self, span: u64, query_head: usize) -> Kind {
        let block = self.grid.block as usize;
        let end = (span + 1) * SPAN as u64;
        estimate(self.grid, self.set, span, query_head, |columns, diagonals| {
            let compared = compared(self.grid, end);
            let sums = |keys: &[f32]| keys.chunks(block).map(|keys| keys.iter().sum()).collect::<Vec<f32>>();
            let truth = sums(&columns[..compared * block]);
            if divergence(&truth, &self.pooled(end, query_head, compared)).sqrt() < self.rule.tau {
                return Kind::QueryAware;
            }
            diagonals.reverse();
            let pick = |keys: &[f32]| {
                let count = needed(keys, self.rule.gamma).div_ceil(block).max(self.least());
                let mut blocks = sums(keys);
                blocks[0] = f32::INFINITY;
                let mut picked = heaviest(count.max(1), &blocks);
                picked.sort_unstable();
                picked
            };
            Kind::VerticalSlash { columns: pick(columns), diagonals: pick(diagonals) }
        })
    }

    /// Weights of the first blocks by the mean query of the last rows before `end`, of one head.
    fn pooled(&self, end: u64, query_head: usize, blocks: usize) -> Vec<f32> {
        let queries = &self.grid.input.queries;
        let row = (end - queries.first_position) as usize;
        let heads = query_head..query_head + 1;
        with_scratch(|scratch| {
            let kv_head = query_head / queries.shape.group;
            score_mean_rows(self.grid, self.set, (row - LAST..row, heads), kv_head, blocks, scratch);
            let panels = scratch.scores.len();
            let sums = cell_sums(self.set, 0..1, panels, scratch);
            let energies = energies(sums, 1, self.grid.stripe as usize, blocks);
            let top = energies.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            energies.into_iter().map(|energy| exp2(energy - top)).collect()
        })
    }
}

/// Blocks that end before the last rows of a span do.
fn compared(grid: &Grid<'_>, end: u64) -> usize {
    (end.saturating_sub(LAST as u64) / grid.block) as usize
}

/// The fewest keys, heaviest first, whose sums reach the share `gamma` of all.
fn needed(keys: &[f32], gamma: f32) -> usize {
    if gamma >= 1.0 {
        return keys.len();
    }
    let mut sorted = keys.to_vec();
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    let wanted = f64::from(gamma) * sorted.iter().map(|&x| f64::from(x)).sum::<f64>();
    let mut reached = 0.0;
    let enough = sorted.iter().position(|&x| {
        reached += f64::from(x);
        reached >= wanted
    });
    enough.map_or(keys.len(), |last| last + 1)
}

/// Jensen-Shannon divergence in nats of two distributions, given as weights; 0 of none.
fn divergence(p: &[f32], q: &[f32]) -> f32 {
    let total = |weights: &[f32]| weights.iter().map(|&x| f64::from(x)).sum::<f64>();
    let (p_total, q_total) = (total(p), total(q));
    let mut sum = 0.0;
    for (&p, &q) in p.iter().zip(q) {
        let (p, q) = (f64::from(p) / p_total, f64::from(q) / q_total);
        let middle = 0.5 * (p + q);
        for x in [p, q] {
            if x > 0.0 {
                sum += 0.5 * x * f64::from(log2((x / middle) as f32)) * std::f64::consts::LN_2;
            }
        }
    }
    sum.max(0.0) as f32
}

#[cfg(test)]
mod tests {
    use super::{divergence, needed};

    #[test]
    fn divergences_are_those_of_the_definition() {
        assert_eq!(divergence(&[1.0, 3.0], &[2.0, 6.0]), 0.0);
        assert!((divergence(&[1.0, 0.0], &[0.0, 5.0]) - std::f32::consts::LN_2).abs() < 1e-6);
        // Of (1/4, 3/4) and (3/4, 1/4): the middle is (1/2, 1/2).
        let same = 0.5 * 2.0 * (0.25 * (0.5f32).ln() + 0.75 * (1.5f32).ln());
        assert!((divergence(&[1.0, 3.0], &[3.0, 1.0]) - same).abs() < 1e-6);
        assert_eq!(divergence(&[], &[]), 0.0);
    }

    #[test]
    fn the_fewest_keys_reach_the_share() {
        let keys = [1.0, 8.0, 2.0, 4.0];
        assert_eq!([0.0, 0.5, 0.6, 0.75, 0.95, 1.0].map(|gamma| needed(&keys, gamma)), [1, 1, 2, 2, 4, 4]);
    }
}
