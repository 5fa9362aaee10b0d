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
    /// Machine that it fails with; empty: it is alone on its own.
    pub host: String,
    /// Part of the site that its host fails with; empty: none that is known.
    pub zone: String,
}

impl ShardEntry {
    /// A shard on a machine of its own.
    pub fn new(id: ShardId, weight: u32) -> Self {
        Self { id, weight, host: String::new(), zone: String::new() }
    }

    /// The same shard with labels of the machine and zone that it fails with.
    pub fn located(self, host: &str, zone: &str) -> Self {
        Self { host: host.to_owned(), zone: zone.to_owned(), ..self }
    }

    fn host(&self) -> Label<'_> {
        if self.host.is_empty() { Label::Own(&self.id) } else { Label::Named(&self.host) }
    }

    fn zone(&self) -> Label<'_> {
        if self.zone.is_empty() { self.host() } else { Label::Named(&self.zone) }
    }
}

/// What a shard fails with: a named thing, or something of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Label<'a> {
    Named(&'a str),
    Own(&'a ShardId),
}

/// What places a block, and where it lies in its sequence. Travels and is kept with the block, so that whoever holds it can
/// compute its owners.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockPlace {
    /// [`crate::KeyChain::stripe_seed`] of its stripe.
    pub stripe_seed: [u8; 32],
    /// Index in the sequence: position of the first token / block_tokens.
    pub index: u64,
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
        self.owners(stripe_seed, 1).first().map(|&index| &self.shards[index])
    }

    /// Where the copies of a stripe belong: positions in [`Self::shards`], best first. At most `copies`, no two on one host, and
    /// no two in one zone as long as there are zones without one; fewer when there are fewer hosts.
    pub fn owners(&self, stripe_seed: &[u8; 32], copies: usize) -> Vec<usize> {
        self.owners_among(stripe_seed, copies, |_| true)
    }

    /// The same among the shards that `alive` (given a position) says yes to: what the owners are while others are down.
    pub fn owners_among(
        &self,
        stripe_seed: &[u8; 32],
        copies: usize,
        alive: impl Fn(usize) -> bool,
    ) -> Vec<usize> {
        let scored = self.by_score(stripe_seed, alive);
        self.spread(&scored, copies)
    }

    /// Where to look for a stripe: its owners, then the shards that take the place of one of them while it is away. These also
    /// are the owners from before one of the owners joined, so that what was placed one change ago is found.
    pub fn candidates(&self, stripe_seed: &[u8; 32], copies: usize) -> Vec<usize> {
        let scored = self.by_score(stripe_seed, |_| true);
        let mut found = self.spread(&scored, copies);
        for away in found.clone() {
            let others: Vec<usize> = scored.iter().copied().filter(|&index| index != away).collect();
            let instead = self.spread(&others, copies);
            found.extend(instead.into_iter().filter(|index| !found.contains(index)).collect::<Vec<_>>());
        }
        found
    }

    /// Position of the first shard on the same host as the one at `index`: equal for shards that fail together.
    pub fn host_of(&self, index: usize) -> usize {
        let host = self.shards[index].host();
        self.shards.iter().position(|shard| shard.host() == host).unwrap_or(index)
    }

    /// Positions of shards, the highest score first.
    fn by_score(&self, stripe_seed: &[u8; 32], alive: impl Fn(usize) -> bool) -> Vec<usize> {
        let alive = (0..self.shards.len()).filter(|&index| alive(index));
        let mut scored: Vec<(f64, usize)> =
            alive.map(|index| (score(&self.shards[index], stripe_seed), index)).collect();
        // Positions ascend with ids.
        scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        scored.into_iter().map(|(_, index)| index).collect()
    }

    /// The first shards on hosts of their own: first one per zone, then, when there are fewer zones than copies, the next ones.
    fn spread(&self, scored: &[usize], copies: usize) -> Vec<usize> {
        let mut owners: Vec<usize> = Vec::with_capacity(copies.min(scored.len()));
        for apart in [ShardEntry::zone, ShardEntry::host] {
            for &index in scored {
                if owners.len() >= copies {
                    return owners;
                }
                let shard = &self.shards[index];
                let is_apart = |&other: &usize| {
                    let other = &self.shards[other];
                    apart(other) != apart(shard) && other.host() != shard.host()
                };
                if owners.iter().all(is_apart) {
                    owners.push(index);
                }
            }
        }
        owners
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
