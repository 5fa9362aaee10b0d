//! Which tasks an attention call becomes: row tiles, and runs of their blocks where there are few rows.
//!
//! A schedule changes no bit: block partials are the same wherever they are computed, and they are folded in order.

use std::ops::Range;

use super::AttendItem;
use super::output::Rows;

/// Packed rows of a tile, at most.
pub(super) const ROWS: usize = 96;
/// Row tiles of so many rows at most may be cut between blocks: each block's partial then goes through memory.
const ROWS_APART: usize = 16;
/// Multiply-adds of a task that is not worth cutting: a few microseconds.
const TASK_MIN: u64 = 1 << 17;
/// Multiply-adds of a task, at most (when the item has more than one block): about a millisecond.
pub(super) const TASK_MAX: u64 = 1 << 25;
/// Multiply-adds of a region and thread, about: some milliseconds.
pub(super) const REGION: u64 = 1 << 27;
/// Calls below so many multiply-adds are not worth waking anybody.
pub(super) const SERIAL: u64 = 1 << 16;
/// Tasks per thread that keep all busy to the end.
const TASKS_PER_THREAD: u64 = 8;

/// Blocks of a row tile, worked on by one thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Task {
    pub(super) item: usize,
    pub(super) rows: Rows,
    pub(super) blocks: Range<usize>,
    /// When blocks are taken apart: which tile's, and how many blocks of it come before this task's.
    pub(super) apart: Option<(usize, usize)>,
    /// Multiply-adds.
    cost: u64,
}

/// A row tile whose blocks several tasks of one region take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Apart {
    pub(super) item: usize,
    pub(super) rows: Rows,
    pub(super) blocks: usize,
    pub(super) tasks: usize,
}

/// Tasks that run at once.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) tasks: Vec<Task>,
    pub(super) apart: Vec<Apart>,
    cost: u64,
}

impl Region {
    /// Whether the calling thread had better do it alone.
    pub(super) fn is_small(&self) -> bool {
        self.cost < SERIAL
    }
}

/// A row tile and what is to be folded onto it.
struct Chain {
    item: usize,
    rows: Rows,
    blocks: Range<usize>,
    cost: u64,
}

/// The regions of a call, to be run one after the other.
pub(super) fn regions(items: &[AttendItem<'_>], threads: usize) -> Vec<Region> {
    let mut chains: Vec<Chain> =
        items.iter().enumerate().flat_map(|(index, item)| chains(index, item)).collect();
    let total: u64 = chains.iter().map(|chain| chain.cost).sum();
    let threads = threads.max(1) as u64;
    // The heaviest first, so that no thread ends with a long task while the others wait.
    chains.sort_by_key(|chain| std::cmp::Reverse(chain.cost));
    let whole = total < SERIAL || is_balanced(&chains, total, threads);
    let limit =
        if whole { TASK_MAX } else { (total / (threads * TASKS_PER_THREAD)).clamp(TASK_MIN, TASK_MAX) };
    let mut regions = vec![Region::default()];
    while !chains.is_empty() {
        let region = regions.last_mut().expect("there is always one");
        chains.retain_mut(
            |chain| {
                if region.is_full(threads) { true } else { region.add(chain, limit, threads) }
            },
        );
        regions.push(Region::default());
    }
    regions.pop();
    regions
}

/// Whether the threads end at about the same time when each takes one tile after the other. Cutting costs some per cent,
/// because partials of blocks then go through memory.
fn is_balanced(chains: &[Chain], total: u64, threads: u64) -> bool {
    if chains.len() as u64 >= threads * TASKS_PER_THREAD {
        return true;
    }
    let mut busy = vec![0; threads as usize];
    for chain in chains {
        *busy.iter_mut().min().expect("there is a thread") += chain.cost;
    }
    let last = busy.iter().max().expect("there is a thread");
    last * threads <= total + total / 8
}

impl Region {
    fn is_full(&self, threads: u64) -> bool {
        self.cost >= REGION * threads && (self.tasks.len() as u64).is_multiple_of(threads)
    }

    /// Takes the chain's next tasks; whether any of it remains for a later region.
    fn add(&mut self, chain: &mut Chain, limit: u64, threads: u64) -> bool {
        let blocks = chain.blocks.len() as u64;
        let apart = chain.rows.count <= ROWS_APART && threads > 1;
        // Blocks cost about the same each, but for those on the diagonal.
        let most = if apart { REGION * threads } else { TASK_MAX };
        let taken = (blocks * most / chain.cost.max(1)).clamp(1, blocks);
        let cost = chain.cost * taken / blocks;
        let parts = if apart { cost.div_ceil(limit).clamp(1, taken) } else { 1 };
        let start = chain.blocks.start;
        let number = self.apart.len();
        for part in 0..parts {
            let range = (part * taken / parts) as usize..((part + 1) * taken / parts) as usize;
            self.tasks.push(Task {
                item: chain.item,
                rows: chain.rows,
                blocks: start + range.start..start + range.end,
                apart: (parts > 1).then_some((number, range.start)),
                cost: cost / parts,
            });
        }
        if parts > 1 {
            let (blocks, tasks) = (taken as usize, parts as usize);
            self.apart.push(Apart { item: chain.item, rows: chain.rows, blocks, tasks });
        }
        self.cost += cost;
        chain.blocks.start += taken as usize;
        chain.cost -= cost;
        !chain.blocks.is_empty()
    }
}

/// The row tiles of an item that see any of its blocks.
fn chains(index: usize, item: &AttendItem<'_>) -> impl Iterator<Item = Chain> {
    let shape = item.queries.shape;
    let packed = item.queries.rows() * shape.group;
    let gathered = gathered_blocks(item);
    (0..packed.div_ceil(ROWS)).rev().flat_map(move |tile| {
        let first = tile * ROWS;
        let count = (packed - first).min(ROWS);
        let last = item.queries.first_position + ((first + count - 1) / shape.group) as u64;
        let exact = &item.work.exact;
        // What the rows do not see at the end of the list need not be visited.
        let visited = exact.iter().rposition(|block| block.first_position <= last).map_or(0, |at| at + 1);
        let seen = exact[..visited].iter().filter(|block| block.first_position <= last);
        let keys = seen.map(|block| u64::from(block.len)).sum::<u64>()
            + (gathered * item.kv.shape().block_tokens) as u64;
        let cost = keys * 2 * (count * shape.head_dim) as u64;
        let blocks = if gathered == 0 { visited } else { exact.len() + gathered };
        let kv_heads = if blocks == 0 { 0 } else { shape.kv_heads };
        (0..kv_heads).map(move |kv_head| Chain {
            item: index,
            rows: Rows { kv_head, first, count },
            blocks: 0..blocks,
            cost,
        })
    })
}

/// Blocks of columns and of summaries; heads with fewer summaries than others have empty ones at the end.
fn gathered_blocks(item: &AttendItem<'_>) -> usize {
    let block = item.kv.shape().block_tokens;
    item.work.columns.len().div_ceil(block) + item.work.summaries.len().div_ceil(block)
}

#[cfg(test)]
mod tests;
