//! Rendezvous hashing of stripes over shards.

#[cfg(test)]
mod tests;

use crate::Error;

/// Name of a shard, unique in the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShardId(pub String);

impl std::fmt::Display for ShardId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// One shard of a map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardEntry {
    /// Name.
    pub id: ShardId,
    /// Share of stripes relative to other shards, at least 1.
    pub weight: u32,
}

/// The shards of one membership epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardMap {
    epoch: u64,
    shards: Vec<ShardEntry>,
}

impl ShardMap {
    /// Sorts by id, so that the order in which members are told does not matter. Refuses duplicates and zero weights.
    pub fn new(epoch: u64, mut shards: Vec<ShardEntry>) -> Result<Self, Error> {
        shards.sort_by(|a, b| a.id.cmp(&b.id));
        if let Some(pair) = shards.windows(2).find(|pair| pair[0].id == pair[1].id) {
            return Err(Error::Invalid { field: "shards", problem: format!("names `{}` twice", pair[0].id) });
        }
        if let Some(shard) = shards.iter().find(|shard| shard.weight == 0) {
            return Err(Error::Invalid { field: "weight", problem: format!("of `{}` is 0", shard.id) });
        }
        Ok(Self { epoch, shards })
    }

    /// Epoch of the membership that this map was built from.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Shards, sorted by id.
    pub fn shards(&self) -> &[ShardEntry] {
        &self.shards
    }

    /// The shard of a stripe, by [`crate::KeyChain::stripe_seed`]; `None` when there are no shards.
    pub fn owner(&self, stripe_seed: &[u8; 32]) -> Option<&ShardEntry> {
        self.shards.iter().max_by(|a, b| {
            score(a, stripe_seed).total_cmp(&score(b, stripe_seed)).then_with(|| b.id.cmp(&a.id))
        })
    }
}

/// Weighted rendezvous score (Schindelhauer and Schomaker 2005, logarithmic method): −w / ln(u), u uniform in (0, 1).
fn score(shard: &ShardEntry, stripe_seed: &[u8; 32]) -> f64 {
    let mut hasher = blake3::Hasher::new_keyed(stripe_seed);
    hasher.update(shard.id.0.as_bytes());
    let mut word = [0; 8];
    hasher.finalize_xof().fill(&mut word);
    // 52 bits, so that the half is exact and the quotient never reaches 1.
    let unit = ((u64::from_le_bytes(word) >> 12) as f64 + 0.5) / (1u64 << 52) as f64;
    -f64::from(shard.weight) / unit.ln()
}
