//! Visits that the device makes of bits, against the bits.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::material::Random;
use crate::{Buffer, Device, Error, KeyVisit, StripeMeans, VisitBuilder, VisitCall, most_visits};

/// What lists are of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) block_tokens: usize,
    /// Of a visit.
    pub(super) keys: usize,
    pub(super) means: Option<StripeMeans>,
}

const KV_HEADS: usize = 2;

/// Blocks that are chosen from, blocks of the list, and keys of its last block that rows see.
const TILES: [(usize, usize, usize); 6] =
    [(0, 1, 3), (0, 40, 16), (5, 6, 1), (64, 67, 13), (130, 131, 16), (1200, 1203, 9)];

/// One list: bits of its blocks.
struct List {
    tile: usize,
    bits: Vec<bool>,
}

impl List {
    fn row_end(&self, shape: &Shape) -> usize {
        let (_, seen, last) = TILES[self.tile];
        (seen - 1) * shape.block_tokens + last
    }

    /// Whether visits are its own: each no larger than it may be, blocks in order, then means, and together what the bits say.
    fn is_made_of(&self, visits: &[[u64; 2]], shape: &Shape) -> bool {
        let (scored, ..) = TILES[self.tile];
        let (mut keys, mut means, mut good) = (Vec::new(), BTreeSet::new(), true);
        for &[head, tail] in visits {
            let (kind, count, first) = (head >> 16 & 0xffff, head & 0xffff, head >> 32);
            good &= (1..=shape.keys as u64).contains(&count);
            if kind == 0 {
                good &= tail == first && means.is_empty();
                keys.extend(first..first + count);
                continue;
            }
            let Some(of) = shape.means.filter(|_| kind == 2) else { return false };
            good &= tail >> (count - 1) == 1;
            for place in (0..count).filter(|bit| tail >> bit & 1 == 1).map(|bit| (first + bit) as usize) {
                let within = place % of.page_keys;
                good &= within < of.stripe_blocks
                    && means.insert(place / of.page_keys * of.stripe_blocks + within);
            }
        }
        let end = self.row_end(shape);
        let wanted = (0..end).filter(|key| self.bits[key / shape.block_tokens]).map(|key| key as u64);
        let unvisited = (0..scored).filter(|&block| !self.bits[block]);
        let unvisited: BTreeSet<usize> =
            if shape.means.is_some() { unvisited.collect() } else { BTreeSet::new() };
        good && wanted.eq(keys) && means == unvisited
    }
}

fn lists(random: &mut Random) -> Vec<List> {
    let list = |number: usize| {
        let tile = number % TILES.len();
        let (scored, seen, _) = TILES[tile];
        // Few, half, and nearly all of them.
        let bits =
            (0..seen).map(|block| block >= scored || random.below(8) < [1, 4, 7][number % 3]).collect();
        List { tile, bits }
    };
    (0..KV_HEADS * TILES.len()).map(list).collect()
}

/// Lists whose visits are not what their bits say.
pub(super) fn visits(device: &Arc<dyn Device>, shape: &Shape) -> Result<f64, Error> {
    let lists = lists(&mut Random(83));
    let (tiles, count, words) = (TILES.len(), lists.len(), 1203_usize.div_ceil(32) + 1);
    let mut bits = vec![0_u32; count * words];
    for (list, words) in lists.iter().zip(bits.chunks_exact_mut(words)) {
        let set = list.bits.iter().enumerate().filter(|(_, bit)| **bit);
        set.for_each(|(block, _)| words[block / 32] |= 1 << (block % 32));
    }
    let ends: Vec<u32> = TILES.iter().flat_map(|tile| [tile.0 as u32, tile.1 as u32]).collect();
    let row_ends: Vec<u32> = lists[..tiles].iter().map(|list| list.row_end(shape) as u32).collect();
    let most = |tile: usize| {
        let (scored, seen, _) = TILES[tile];
        most_visits((seen, scored), shape.block_tokens, shape.keys, shape.means)
    };
    let room: usize = (0..count).map(|list| most(list % tiles)).sum();
    let (bits, ends) = (Buffer::from_slice(device, &bits)?, Buffer::from_slice(device, &ends)?);
    let row_ends = Buffer::from_slice(device, &row_ends)?;
    let counts = Buffer::new(device, count * size_of::<u32>())?;
    let offsets = Buffer::new(device, (count + 1) * size_of::<u64>())?;
    let visits = Buffer::from_slice(device, &vec![[u64::MAX; 2]; room])?;
    debug_assert_eq!(size_of::<KeyVisit>(), size_of::<[u64; 2]>());
    let call = VisitCall {
        bits: bits.whole(),
        ends: ends.whole(),
        row_ends: row_ends.whole(),
        lists: count,
        tiles,
        words,
        block_tokens: shape.block_tokens,
        keys: shape.keys,
        means: shape.means,
    };
    VisitBuilder::new(device).launch(&call, counts.whole(), offsets.whole(), visits.whole())?;
    let (counts, offsets) = (counts.to_vec::<u32>()?, offsets.to_vec::<u64>()?);
    let visits = visits.to_vec::<[u64; 2]>()?;
    let wrong = lists.iter().enumerate().filter(|(number, list)| {
        let (begin, end) = (offsets[*number] as usize, offsets[number + 1] as usize);
        let counted = begin + counts[*number] as usize == end && end - begin <= most(list.tile);
        !(counted && visits.get(begin..end).is_some_and(|own| list.is_made_of(own, shape)))
    });
    Ok(wrong.count() as f64)
}
