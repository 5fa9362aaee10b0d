//! Plans a call: which tiles are exact, and who plans the others.

use crate::{CpuExecutor, Error, SparseWork};

use super::blocks::BlockPlanner;
use super::grid::{Grid, TileRows};
use super::heads::HeadPlanner;
use super::list::{Chosen, List};
use super::{Method, PlanInput, PrefillPolicy};

/// Who plans the tiles that are not exact.
enum Planner<'a> {
    Blocks(BlockPlanner<'a>),
    Heads(HeadPlanner<'a>),
}

impl Planner<'_> {
    fn plan(&self, tile: &TileRows, kv_head: usize) -> List {
        match self {
            Self::Blocks(planner) => planner.plan(tile, kv_head),
            Self::Heads(planner) => planner.plan(tile, kv_head),
        }
    }
}

pub(super) fn plan(
    policy: &PrefillPolicy,
    executor: &CpuExecutor,
    input: &PlanInput<'_>,
) -> Result<SparseWork, Error> {
    let grid = Grid::new(input)?;
    let sparse: Vec<bool> = grid.tiles.iter().map(|tile| !grid.is_exact(policy, tile)).collect();
    let planner = planner(policy, executor, &grid, &sparse)?;
    let (tiles, kv_heads) = (grid.tiles.len(), input.queries.shape.kv_heads);
    let list = |index: usize| {
        let (kv_head, number) = (index / tiles, index % tiles);
        let tile = &grid.tiles[number];
        match &planner {
            Some(planner) if sparse[number] => planner.plan(tile, kv_head),
            _ => Chosen::all(&grid, tile).list(&grid, tile),
        }
    };
    let tasks = kv_heads * tiles;
    let lists = match &planner {
        None => (0..tasks).map(list).collect(),
        Some(_) => {
            // The last tiles have the most before them: they come first.
            let mut lists = executor.pool().map(tasks, |task| list(tasks - 1 - task));
            lists.reverse();
            lists
        }
    };
    let row_ends = grid.tiles.iter().map(|tile| tile.rows.end as u32).collect();
    SparseWork::new(kv_heads, row_ends, lists)
}

/// None when all tiles are exact.
fn planner<'a>(
    policy: &PrefillPolicy,
    executor: &CpuExecutor,
    grid: &'a Grid<'a>,
    sparse: &[bool],
) -> Result<Option<Planner<'a>>, Error> {
    let tiles: Vec<&TileRows> =
        grid.tiles.iter().zip(sparse).filter(|(_, s)| **s).map(|(tile, _)| tile).collect();
    let Some(last) = tiles.last() else { return Ok(None) };
    let set = executor.instruction_set();
    Ok(match &policy.method {
        Method::Exact => None,
        Method::Blocks(rule) => {
            Some(Planner::Blocks(BlockPlanner::new(grid, *rule, set, grid.before(last))?))
        }
        Method::Heads(heads) => Some(Planner::Heads(HeadPlanner::new(grid, heads, executor, &tiles)?)),
    })
}
