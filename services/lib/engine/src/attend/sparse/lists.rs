//! Lists of one call, cut at the border between blocks on shards and blocks here, and into waves of bounded size.

use std::ops::Range;

use longshore_attention::{ExactBlock, SparseWork, Visit};
use longshore_blocks::Geometry;

/// Queries of one wave, bytes: what a shard of the same process takes in one query.
const QUERY_BYTES_MAX: usize = 1 << 20;
/// Lists of one wave: a query may have so many items.
const LISTS_MAX: usize = 2_048;

/// What one list visits of one stripe.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct StripeVisits {
    pub(super) stripe: u64,
    /// Runs of blocks on a shard, ascending.
    pub(super) remote: Vec<Range<u64>>,
    /// Blocks here, then means; tiles of blocks are numbered from the first local one.
    pub(super) local: Vec<Visit>,
}

/// Lists of all (KV head, query tile) pairs of a call, by stripe.
#[derive(Debug)]
pub(super) struct Lists {
    tiles: usize,
    /// `[kv_heads][tiles]`.
    lists: Vec<Vec<StripeVisits>>,
}

impl Lists {
    /// Cuts `work`, whose blocks are numbered from the beginning of the sequence, of which the first `remote` lie on shards.
    pub(super) fn new(work: &SparseWork, geometry: Geometry, remote: u64) -> Self {
        let pairs = (0..work.kv_heads()).flat_map(|head| (0..work.tiles()).map(move |tile| (head, tile)));
        let lists = pairs.map(|(head, tile)| cut(work.list(head, tile), geometry, remote)).collect();
        Self { tiles: work.tiles(), lists }
    }

    /// Stripes that a KV head of a query tile visits, ascending.
    pub(super) fn list(&self, kv_head: usize, tile: usize) -> &[StripeVisits] {
        &self.lists[kv_head * self.tiles + tile]
    }

    /// What a KV head of a query tile visits of one stripe.
    pub(super) fn of_stripe(&self, kv_head: usize, tile: usize, stripe: u64) -> Option<&StripeVisits> {
        let list = self.list(kv_head, tile);
        list.binary_search_by_key(&stripe, |visits| visits.stripe).ok().map(|index| &list[index])
    }
}

/// The stripes of a list, which ascend.
fn cut(visits: &[Visit], geometry: Geometry, remote: u64) -> Vec<StripeVisits> {
    let block_tokens = u64::from(geometry.block_tokens());
    let mut stripes: Vec<StripeVisits> = Vec::new();
    let mut at = |stripe: u64, put: &mut dyn FnMut(&mut StripeVisits)| match stripes.last_mut() {
        Some(last) if last.stripe == stripe => put(last),
        _ => {
            let mut visits = StripeVisits { stripe, ..StripeVisits::default() };
            put(&mut visits);
            stripes.push(visits);
        }
    };
    for visit in visits {
        match *visit {
            Visit::Block(exact) => {
                let block = exact.first_position / block_tokens;
                at(geometry.stripe_of(block), &mut |visits| match block.checked_sub(remote) {
                    Some(tile) => visits.local.push(Visit::Block(ExactBlock { tile: tile as u32, ..exact })),
                    None => extend(&mut visits.remote, block),
                });
            }
            Visit::Means { tile, .. } => at(u64::from(tile), &mut |visits| visits.local.push(*visit)),
            Visit::Columns { .. } => unreachable!("policies that visit columns are refused blocks on shards"),
            Visit::EndOfStripe => {}
        }
    }
    stripes
}

fn extend(runs: &mut Vec<Range<u64>>, block: u64) {
    match runs.last_mut().filter(|run| run.end == block) {
        Some(run) => run.end += 1,
        None => runs.push(block..block + 1),
    }
}

/// Rows of one query tile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) tile: usize,
    /// Rows of the call.
    pub(super) rows: Range<usize>,
}

/// Sizes that bound a wave.
#[derive(Debug, Clone, Copy)]
pub(super) struct WaveSizes {
    /// Bytes of partials that a wave may hold.
    pub(super) partial_bytes_max: usize,
    /// Of one row and KV head.
    pub(super) partial_bytes: usize,
    /// Of one row, all heads.
    pub(super) query_bytes: usize,
}

/// Cuts the rows so that the partials of a wave stay within the budget, and its queries within what a shard takes. Rows do not
/// depend on each other, so a tile may be cut anywhere.
pub(super) fn waves(work: &SparseWork, lists: &Lists, sizes: WaveSizes) -> Vec<Vec<Span>> {
    let (mut waves, mut wave, mut partials, mut queries) = (Vec::new(), Vec::new(), 0, 0);
    for tile in 0..work.tiles() {
        let remote =
            |head: usize| lists.list(head, tile).iter().filter(|visits| !visits.remote.is_empty()).count();
        let row_bytes = ((0..work.kv_heads()).map(remote).sum::<usize>() * sizes.partial_bytes).max(1);
        let Range { mut start, end } = work.rows(tile);
        while start < end {
            let room = sizes.partial_bytes_max.saturating_sub(partials) / row_bytes;
            let room = room.min(QUERY_BYTES_MAX.saturating_sub(queries) / sizes.query_bytes);
            let full = room == 0 || (wave.len() + 1) * work.kv_heads() > LISTS_MAX;
            if full && !wave.is_empty() {
                waves.push(std::mem::take(&mut wave));
                (partials, queries) = (0, 0);
                continue;
            }
            let rows = start..end.min(start + room.max(1));
            partials += rows.len() * row_bytes;
            queries += rows.len() * sizes.query_bytes;
            start = rows.end;
            wave.push(Span { tile, rows });
        }
    }
    if !wave.is_empty() {
        waves.push(wave);
    }
    waves
}

#[cfg(test)]
mod tests;
