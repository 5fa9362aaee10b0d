//! How long a prefix the cluster already holds, and where a sequence's blocks lie.

#[cfg(test)]
mod tests;

use std::ops::Range;

use longshore_blocks::{BlockKey, KeyChain, ShardId, ShardMap};

use crate::Error;

/// Keys that one lookup carries at most.
pub const KEYS_MAX: usize = 65_536;

/// A shard, and the blocks of one sequence that belong on it: (index in the sequence, key), ascending.
pub type ShardLookup = (ShardId, Vec<(u64, BlockKey)>);

/// The full blocks of a sequence by the shard that they belong on, shards sorted by id. Shards without any are left out, and
/// everything is when there are no shards.
pub fn plan_lookup(chain: &KeyChain, map: &ShardMap) -> Vec<ShardLookup> {
    group(chain, map, chain.keys().len())
}

/// KV bytes of the first `blocks` blocks by shard, every shard of the map, sorted by id. `block_bytes` is one block over all
/// layers. Blocks beyond the keys of `chain` do not count.
pub fn placement_bytes(
    chain: &KeyChain,
    map: &ShardMap,
    blocks: u64,
    block_bytes: u64,
) -> Vec<(ShardId, u64)> {
    let mut counts = vec![0u64; map.shards().len()];
    for owner in owners(chain, map, limit(chain, blocks)) {
        counts[owner] += 1;
    }
    let shards = map.shards().iter().zip(counts);
    shards.map(|(shard, count)| (shard.id.clone(), count.saturating_mul(block_bytes))).collect()
}

/// Asks shards for a sequence's blocks and finds the prefix that they hold together: every stripe of it whole on one shard, as
/// a view needs it. A shard that gives no answer holds nothing.
#[derive(Debug, Clone)]
pub struct PrefixPlan {
    lookups: Vec<ShardLookup>,
    /// Shards of `lookups` as positions in the map.
    asked: Vec<usize>,
    stripes: Vec<Stripe>,
    /// By block: which candidates of its stripe hold it, a bit each.
    holders: Vec<u32>,
}

/// Blocks that are placed together.
#[derive(Debug, Clone)]
struct Stripe {
    blocks: Range<usize>,
    /// Positions in the map of the shards that it may lie on.
    candidates: Vec<usize>,
}

impl PrefixPlan {
    /// A plan for the first `blocks` blocks of `chain` (at most those that have keys) of which there are `copies`, in lookups of
    /// at most `keys_max` keys; a shard with more gets several. With more than one copy, shards that take an owner's place are
    /// asked too.
    pub fn new(
        chain: &KeyChain,
        map: &ShardMap,
        blocks: u64,
        keys_max: usize,
        copies: usize,
    ) -> Result<Self, Error> {
        if keys_max == 0 {
            return Err(Error::Invalid { field: "keys_max", problem: "is 0, must be at least 1".to_owned() });
        }
        let blocks = limit(chain, blocks);
        if blocks > 0 && map.shards().is_empty() {
            return Err(Error::NoShards);
        }
        let stripes = stripes(chain, map, blocks, copies);
        let mut keys = vec![Vec::new(); map.shards().len()];
        for stripe in &stripes {
            for &shard in &stripe.candidates {
                keys[shard].extend(stripe.blocks.clone().map(|index| (index as u64, chain.keys()[index])));
            }
        }
        let (mut lookups, mut asked) = (Vec::new(), Vec::new());
        for (shard, keys) in keys.iter().enumerate() {
            for part in keys.chunks(keys_max) {
                lookups.push((map.shards()[shard].id.clone(), part.to_vec()));
                asked.push(shard);
            }
        }
        Ok(Self { lookups, asked, stripes, holders: vec![0; blocks] })
    }

    /// What to ask; an answer names its position in this slice.
    pub fn lookups(&self) -> &[ShardLookup] {
        &self.lookups
    }

    /// Notes an answer: one bool per key of lookup `position`, in their order.
    pub fn answer(&mut self, position: usize, held: &[bool]) -> Result<(), Error> {
        let Some((shard, keys)) = self.lookups.get(position) else {
            let problem = format!("is {position}, must be below {}", self.lookups.len());
            return Err(Error::Invalid { field: "position", problem });
        };
        if held.len() != keys.len() {
            let problem = format!("of `{shard}` has {} entries for {} keys", held.len(), keys.len());
            return Err(Error::Invalid { field: "held", problem });
        }
        let asked = self.asked[position];
        for ((index, _), held) in keys.iter().zip(held) {
            let index = *index as usize;
            let at = self.stripes.partition_point(|stripe| stripe.blocks.end <= index);
            let candidates = &self.stripes[at].candidates;
            let rank =
                candidates.iter().position(|&shard| shard == asked).expect("only candidates are asked");
            let bit = 1 << rank;
            self.holders[index] = if *held { self.holders[index] | bit } else { self.holders[index] & !bit };
        }
        Ok(())
    }

    /// Blocks of the plan.
    pub fn blocks(&self) -> u64 {
        self.holders.len() as u64
    }

    /// Blocks from the beginning on without a gap that shards hold, as far as they answered: of every stripe those that one
    /// shard holds.
    pub fn prefix_blocks(&self) -> u64 {
        let mut prefix = 0;
        for stripe in &self.stripes {
            let mut left = u32::MAX;
            let held = self.holders[stripe.blocks.clone()].iter().take_while(|&&holders| {
                left &= holders;
                left != 0
            });
            let held = held.count();
            prefix += held as u64;
            if held < stripe.blocks.len() {
                break;
            }
        }
        prefix
    }

    /// Blocks beyond the prefix that shards hold too: they need no second store once the gap before them is computed.
    pub fn held_beyond_prefix(&self) -> u64 {
        let beyond = &self.holders[self.prefix_blocks() as usize..];
        beyond.iter().filter(|&&holders| holders != 0).count() as u64
    }
}

/// How much of a sequence may be held, as far as somebody knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Likely {
    /// Blocks from the beginning on that may be held without a gap.
    pub blocks: u64,
    /// Blocks that are worth asking for: those, and what is left of the stripe in which they end, or the whole next one. When all of
    /// these are held, more may be.
    pub ask: u64,
}

/// How much of the first `blocks` blocks of `chain`, of which there are `copies`, may be held, where `may_hold` says whether a shard
/// may hold a block.
pub fn likely_prefix(
    chain: &KeyChain,
    map: &ShardMap,
    blocks: u64,
    copies: usize,
    may_hold: impl Fn(&ShardId, &BlockKey) -> bool,
) -> Likely {
    let mut likely = 0;
    for stripe in stripes(chain, map, limit(chain, blocks), copies) {
        let mut left = u32::MAX;
        let held = chain.keys()[stripe.blocks.clone()].iter().take_while(|key| {
            let holders = stripe.candidates.iter().enumerate().fold(0u32, |bits, (rank, &shard)| {
                bits | u32::from(may_hold(&map.shards()[shard].id, key)) << rank
            });
            left &= holders;
            left != 0
        });
        let held = held.count();
        likely += held;
        if held < stripe.blocks.len() {
            return Likely { blocks: likely as u64, ask: stripe.blocks.end as u64 };
        }
    }
    Likely { blocks: likely as u64, ask: likely as u64 }
}

/// The stripes of the first `blocks` blocks. Nothing when there are no shards.
fn stripes(chain: &KeyChain, map: &ShardMap, blocks: usize, copies: usize) -> Vec<Stripe> {
    let mut stripes: Vec<Stripe> = Vec::new();
    let mut last = None;
    for index in 0..blocks {
        let seed = chain.stripe_seed(index as u64);
        if last == Some(seed)
            && let Some(stripe) = stripes.last_mut()
        {
            stripe.blocks.end = index + 1;
            continue;
        }
        last = Some(seed);
        let mut candidates = if copies > 1 { map.candidates(&seed, copies) } else { map.owners(&seed, 1) };
        candidates.truncate(u32::BITS as usize);
        stripes.push(Stripe { blocks: index..index + 1, candidates });
    }
    stripes
}

fn limit(chain: &KeyChain, blocks: u64) -> usize {
    usize::try_from(blocks).unwrap_or(usize::MAX).min(chain.keys().len())
}

fn group(chain: &KeyChain, map: &ShardMap, blocks: usize) -> Vec<ShardLookup> {
    let mut groups = vec![Vec::new(); map.shards().len()];
    for (index, owner) in owners(chain, map, blocks).enumerate() {
        groups[owner].push((index as u64, chain.keys()[index]));
    }
    let shards = map.shards().iter().zip(groups).filter(|(_, keys)| !keys.is_empty());
    shards.map(|(shard, keys)| (shard.id.clone(), keys)).collect()
}

/// Position in the map of the owner of each of the first `blocks` blocks; nothing when there are no shards.
fn owners<'a>(chain: &'a KeyChain, map: &'a ShardMap, blocks: usize) -> impl Iterator<Item = usize> + 'a {
    let mut last: Option<([u8; 32], usize)> = None;
    (0..blocks).map_while(move |index| {
        let seed = chain.stripe_seed(index as u64);
        // Blocks of one stripe have one seed, and scoring every shard is the dear part.
        if let Some((_, owner)) = last.filter(|(known, _)| *known == seed) {
            return Some(owner);
        }
        let id = &map.owner(&seed)?.id;
        let owner = map.shards().iter().position(|shard| shard.id == *id)?;
        last = Some((seed, owner));
        Some(owner)
    })
}
