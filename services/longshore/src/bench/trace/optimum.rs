//! What to compare with: the plainest cache, one without limit, and one that knows the future.

use std::collections::{BTreeSet, HashMap};

use super::{read::Trace, replay::Hits};

/// Number of a request that never comes.
const NEVER: usize = usize::MAX;

/// Most hits that `capacity_blocks` can give (Belady 1966), blocks that are worth nothing not being kept at all; with a
/// capacity of the trace's unique blocks, those of a cache without limit.
///
/// Every request for a block asks for all of its prefix too, so that a block is needed again no later than those that follow it.
/// Dropping what is needed last, of equals what lies deepest, therefore keeps whole prefixes: the optimum for single blocks
/// is one for prefixes.
pub(super) fn belady(trace: &Trace, capacity_blocks: u64) -> Hits {
    let next = next_uses(trace);
    let mut held: HashMap<u64, (usize, usize)> = HashMap::new();
    let mut order: BTreeSet<(usize, usize, u64)> = BTreeSet::new();
    let mut hits = Hits::default();
    for (request, next) in trace.requests.iter().zip(&next) {
        let found = request.blocks.iter().take_while(|block| held.contains_key(block)).count();
        hits.add(request, found, trace.block_tokens);
        for (depth, (&block, &next)) in request.blocks.iter().zip(next).enumerate() {
            if let Some((needed, depth)) = held.remove(&block) {
                order.remove(&(needed, depth, block));
            }
            if next == NEVER {
                continue;
            }
            held.insert(block, (next, depth));
            order.insert((next, depth, block));
            if held.len() as u64 > capacity_blocks
                && let Some((_, _, last)) = order.pop_last()
            {
                held.remove(&last);
            }
        }
    }
    hits
}

/// For each block of each request, the next request that has it.
fn next_uses(trace: &Trace) -> Vec<Vec<usize>> {
    let mut coming: HashMap<u64, usize> = HashMap::new();
    let mut next = vec![Vec::new(); trace.requests.len()];
    for (at, request) in trace.requests.iter().enumerate().rev() {
        next[at] = request.blocks.iter().map(|block| coming.insert(*block, at).unwrap_or(NEVER)).collect();
    }
    next
}

/// LRU that uses the head of a prompt before its tail, as the replays that others publish do: it drops the head of a prefix
/// first, without which the rest is worth nothing. Its hits check the reading of a trace against theirs.
pub(super) fn first_touched_lru(trace: &Trace, capacity_blocks: u64) -> Hits {
    let mut last_use: HashMap<u64, u64> = HashMap::new();
    let mut order: BTreeSet<(u64, u64)> = BTreeSet::new();
    let mut ticks = 0;
    let mut hits = Hits::default();
    for request in &trace.requests {
        let found = request.blocks.iter().take_while(|block| last_use.contains_key(block)).count();
        hits.add(request, found, trace.block_tokens);
        for &block in &request.blocks {
            ticks += 1;
            if let Some(before) = last_use.insert(block, ticks) {
                order.remove(&(before, block));
            }
            order.insert((ticks, block));
        }
        while last_use.len() as u64 > capacity_blocks
            && let Some((_, block)) = order.pop_first()
        {
            last_use.remove(&block);
        }
    }
    hits
}
