//! Which tasks a sparse call becomes: runs of rows of query tiles, and runs of stripes of long lists.
//!
//! A schedule changes no bit: a row does not depend on the others, and lists are cut at the end of a stripe, when the total is
//! all there is.

use std::cmp::Reverse;

use crate::executor::output::Rows;
use crate::executor::schedule::{REGION, ROWS, SERIAL, TASK_MAX};
use crate::{SparseItem, Visit};

/// Runs of rows per thread below which runs are made shorter.
const RUNS_PER_THREAD: usize = 4;

/// Stripes of a list for some rows of its tile, worked on by one thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Task<'a> {
    pub(super) item: usize,
    pub(super) rows: Rows,
    pub(super) visits: &'a [Visit],
    /// Whether they are the list's first.
    pub(super) begins: bool,
}

/// Tasks that run at once.
#[derive(Debug, Default)]
pub(super) struct Region<'a> {
    pub(super) tasks: Vec<Task<'a>>,
    cost: u64,
}

impl Region<'_> {
    /// Whether the calling thread had better do it alone.
    pub(super) fn is_small(&self) -> bool {
        self.cost < SERIAL
    }

    fn is_full(&self, threads: u64) -> bool {
        self.cost >= REGION * threads && (self.tasks.len() as u64).is_multiple_of(threads)
    }
}

/// A run of rows and what remains of its list.
struct Chain<'a> {
    task: Task<'a>,
    /// Position of the last row.
    last: u64,
    /// Multiply-adds of a key.
    key_cost: u64,
    /// Multiply-adds.
    cost: u64,
}

/// The regions of a call, to be run one after the other.
pub(super) fn regions<'a>(items: &[SparseItem<'a>], threads: usize) -> Vec<Region<'a>> {
    let mut chains = chains(items, ROWS);
    if threads > 1 && chains.len() < threads * RUNS_PER_THREAD {
        chains = self::chains(items, ROWS / 2);
    }
    // The heaviest first, so that no thread ends with a long task while the others wait.
    chains.sort_by_key(|chain| Reverse(chain.cost));
    let threads = threads.max(1) as u64;
    let mut regions = Vec::new();
    while !chains.is_empty() {
        let mut region = Region::default();
        chains.retain_mut(|chain| {
            if region.is_full(threads) {
                return true;
            }
            let (task, cost) = chain.next();
            region.tasks.push(task);
            region.cost += cost;
            !chain.task.visits.is_empty()
        });
        regions.push(region);
    }
    regions
}

/// The runs of at most `most` packed rows that have something to fold.
fn chains<'a>(items: &[SparseItem<'a>], most: usize) -> Vec<Chain<'a>> {
    let mut chains = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let (shape, work) = (item.queries.shape, item.work);
        let tiles = (0..work.tiles()).map(|tile| (Some(tile), work.rows(tile)));
        // Rows without a list may still have a stripe to fold.
        for (tile, rows) in tiles.chain([(None, work.rows_end()..item.queries.rows())]) {
            let packed = rows.len() * shape.group;
            let runs = packed.div_ceil(most);
            for (run, kv_head) in (0..runs).flat_map(|run| (0..shape.kv_heads).map(move |head| (run, head))) {
                let range = run * packed / runs..(run + 1) * packed / runs;
                let first = rows.start * shape.group + range.start;
                let last = (rows.start * shape.group + range.end - 1) / shape.group;
                let rows = Rows { kv_head, first, count: range.len() };
                let visits = tile.map_or(&[][..], |tile| work.list(kv_head, tile));
                let mut chain = Chain {
                    task: Task { item: index, rows, visits, begins: true },
                    last: item.queries.first_position + last as u64,
                    key_cost: 2 * (rows.count * shape.head_dim) as u64,
                    cost: 0,
                };
                chain.cost = visits.iter().map(|visit| chain.cost_of(visit)).sum();
                if chain.cost > 0 || item.stripe.is_some() {
                    chains.push(chain);
                }
            }
        }
    }
    chains
}

impl<'a> Chain<'a> {
    fn cost_of(&self, visit: &Visit) -> u64 {
        let keys = match *visit {
            Visit::Block(block) if block.first_position <= self.last => block.len,
            Visit::Columns { count, .. } => count,
            Visit::Means { keys, .. } => keys.count_ones(),
            Visit::Block(_) | Visit::EndOfStripe => 0,
        };
        u64::from(keys) * self.key_cost
    }

    /// The next task, which it leaves out from now on, and its cost.
    fn next(&mut self) -> (Task<'a>, u64) {
        let (mut cost, mut taken) = (0, 0);
        for visit in self.task.visits {
            cost += self.cost_of(visit);
            taken += 1;
            if *visit == Visit::EndOfStripe && cost >= TASK_MAX {
                break;
            }
        }
        let (visits, rest) = self.task.visits.split_at(taken);
        let task = Task { visits, ..self.task.clone() };
        self.task = Task { visits: rest, begins: false, ..self.task };
        (task, cost)
    }
}

#[cfg(test)]
mod tests;
