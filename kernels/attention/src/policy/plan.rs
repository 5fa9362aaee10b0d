//! Plans a call: which tiles are exact, and who plans the others.

use crate::{CpuExecutor, Error, SparseWork};

use super::blocks::BlockPlanner;
use super::chooser::{self, BlockChooser, GivenPlanner, RuleCall};
use super::flex::FlexPlanner;
use super::grid::{Grid, TileRows};
use super::heads::HeadPlanner;
use super::list::{Chosen, List};
use super::{Blocks, Level, Method, PlanInput, PrefillPolicy, invalid};

/// Who plans the tiles that are not exact.
enum Planner<'a> {
    Blocks(BlockPlanner<'a>),
    Heads(HeadPlanner<'a>),
    Flex(FlexPlanner<'a>),
    Given(GivenPlanner<'a>),
}

impl Planner<'_> {
    /// How many tiles are best planned together.
    fn tiles_at_once(&self) -> usize {
        match self {
            Self::Blocks(planner) => planner.tiles_at_once(),
            Self::Heads(_) | Self::Flex(_) | Self::Given(_) => 1,
        }
    }

    /// The lists of some tiles, which ascend.
    fn plan(&self, tiles: &[&TileRows], kv_head: usize) -> Vec<List> {
        match self {
            Self::Blocks(planner) => planner.plan(tiles, kv_head),
            Self::Heads(planner) => tiles.iter().map(|tile| planner.plan(tile, kv_head)).collect(),
            Self::Flex(planner) => tiles.iter().map(|tile| planner.plan(tile, kv_head)).collect(),
            Self::Given(planner) => tiles.iter().map(|tile| planner.plan(tile, kv_head)).collect(),
        }
    }
}

pub(super) fn plan(
    policy: &PrefillPolicy,
    executor: &CpuExecutor,
    input: &PlanInput<'_>,
    chooser: Option<&dyn BlockChooser>,
) -> Result<SparseWork, Error> {
    let grid = Grid::new(input)?;
    let sparse: Vec<&TileRows> = grid.tiles.iter().filter(|tile| !grid.is_exact(policy, tile)).collect();
    let planner = planner(policy, executor, &grid, &sparse, chooser)?;
    let kv_heads = input.queries.shape.kv_heads;
    let planned = planner.map_or_else(Vec::new, |planner| {
        let runs: Vec<&[&TileRows]> = sparse.chunks(planner.tiles_at_once()).collect();
        let tasks = kv_heads * runs.len();
        // The last tiles have the most before them: they come first.
        let mut lists = executor.pool().map(tasks, |task| {
            let index = tasks - 1 - task;
            planner.plan(runs[index % runs.len()], index / runs.len())
        });
        lists.reverse();
        lists
    });
    let mut planned = planned.into_iter().flatten();
    let mut lists = Vec::with_capacity(kv_heads * grid.tiles.len());
    for _ in 0..kv_heads {
        for tile in &grid.tiles {
            let own = if grid.is_exact(policy, tile) { None } else { planned.next() };
            lists.push(own.unwrap_or_else(|| Chosen::all(&grid, tile).list(&grid, tile)));
        }
    }
    let row_ends = grid.tiles.iter().map(|tile| tile.rows.end as u32).collect();
    SparseWork::new(kv_heads, row_ends, lists)
}

/// See [`PrefillPolicy::with_rule`].
pub(super) fn with_rule<R>(
    policy: &PrefillPolicy,
    executor: &CpuExecutor,
    (input, rows): (&PlanInput<'_>, usize),
    take: impl FnOnce(&RuleCall<'_>) -> R,
) -> Result<Option<R>, Error> {
    let Method::Blocks(rule) = &policy.method else { return Ok(None) };
    let grid = Grid::of_rows(input, rows)?;
    let is_sparse = |tile: &TileRows| !grid.is_exact(policy, tile);
    // They follow each other: exact are the first ones, and the last ones.
    let sparse: Vec<&TileRows> = grid.tiles.iter().filter(|tile| is_sparse(tile)).collect();
    let (Some(first), Some(last)) = (grid.tiles.iter().position(is_sparse), sparse.last()) else {
        return Ok(None);
    };
    let rules = vec![Some(*rule); input.queries.shape.kv_heads];
    let own = BlockPlanner::new(&grid, rules, executor.instruction_set(), grid.before(last))?;
    let Some(choice) = chooser::choice(&own, rule, &sparse) else { return Ok(None) };
    let tiles = grid.tiles.iter().map(|tile| tile.rows.clone()).collect();
    let chosen = first..first + sparse.len();
    Ok(Some(take(&RuleCall { choice, tiles, chosen, correction: rule.correction })))
}

/// None when all tiles are exact.
fn planner<'a>(
    policy: &PrefillPolicy,
    executor: &CpuExecutor,
    grid: &'a Grid<'a>,
    tiles: &[&TileRows],
    chooser: Option<&dyn BlockChooser>,
) -> Result<Option<Planner<'a>>, Error> {
    let Some(last) = tiles.last() else { return Ok(None) };
    let set = executor.instruction_set();
    Ok(match &policy.method {
        Method::Exact => None,
        Method::Blocks(rule) => {
            let rules = vec![Some(*rule); grid.input.queries.shape.kv_heads];
            // Made in any case: it refuses what lacks something.
            let own = BlockPlanner::new(grid, rules, set, grid.before(last))?;
            let given = chooser.map(|chooser| GivenPlanner::ask(chooser, &own, rule, tiles)).transpose()?;
            Some(given.flatten().map_or(Planner::Blocks(own), Planner::Given))
        }
        Method::Budgets(level) => {
            Some(Planner::Blocks(BlockPlanner::new(grid, rules(grid, level)?, set, grid.before(last))?))
        }
        Method::Flex(rule) => Some(Planner::Flex(FlexPlanner::new(grid, *rule, executor, tiles)?)),
        Method::Heads(heads) => Some(Planner::Heads(HeadPlanner::new(grid, heads, executor, tiles)?)),
    })
}

/// Rules of the KV heads of the call's layer.
fn rules(grid: &Grid<'_>, level: &Level) -> Result<Vec<Option<Blocks>>, Error> {
    let (layer, kv_heads) = (grid.input.layer, grid.input.queries.shape.kv_heads);
    match level.layer(layer) {
        None => invalid("plan", format!("has {} layers, this is layer {layer}", level.layers())),
        Some(rules) if rules.len() != kv_heads => {
            invalid("plan", format!("has {} heads, the model has {kv_heads} KV heads", rules.len()))
        }
        Some(rules) => Ok(rules.to_vec()),
    }
}
