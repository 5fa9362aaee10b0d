//! Who is asked first for blocks that several shards hold: who did not fail lately, then who is near, then who has little to send to
//! this process. Among equals the stripe decides, so that all who read a block ask the same shard, whose memory then serves them all.

mod counts;
#[cfg(test)]
mod tests;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use longshore_cluster::Member;
use tokio::time::Instant;

use crate::{Error, ShardLink, ShardLinks};

use counts::Decision;

pub use counts::ReadCounts;

/// Bytes under way that make no difference; each doubling of it does.
const LOAD_STEP: u64 = 16 << 20;
/// What one message with attention queries counts for: it carries about as many bytes at most.
const QUERY_BYTES: u64 = 1 << 20;

/// How far a shard is from whoever asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Distance {
    /// In this process.
    Here,
    /// On this machine.
    Host,
    /// In this part of the site.
    Zone,
    /// Elsewhere, or nobody knows.
    Far,
}

/// Where a process is, as far as its member entry tells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Site {
    host: String,
    zone: String,
    /// Host part of its address; empty where that is none.
    machine: String,
}

impl Site {
    /// The site of a member.
    pub(crate) fn of(member: &Member) -> Self {
        let address = member.address.strip_prefix("http://").and_then(|rest| rest.rsplit_once(':'));
        Self {
            host: member.labels.host.clone(),
            zone: member.labels.zone.clone(),
            machine: address.map(|(host, _)| host.to_owned()).unwrap_or_default(),
        }
    }

    /// How far `other` is. Labels say whether two are on one machine; where one has none, equal hosts in their addresses do.
    pub(crate) fn distance(&self, other: &Self) -> Distance {
        let same = |one: &str, other: &str| !one.is_empty() && one == other;
        let labelled = !self.host.is_empty() && !other.host.is_empty();
        let host = if labelled { self.host == other.host } else { same(&self.machine, &other.machine) };
        match (host, same(&self.zone, &other.zone)) {
            (true, _) => Distance::Host,
            (false, true) => Distance::Zone,
            (false, false) => Distance::Far,
        }
    }
}

/// What speaks for and against a shard; the least is asked first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Standing {
    /// It failed lately.
    pub(crate) avoided: bool,
    pub(crate) distance: Distance,
    /// See [`Load::class`].
    pub(crate) load: u32,
}

/// `ranked` shards in the order in which they are asked; equals keep their places.
pub(crate) fn in_order(mut ranked: Vec<usize>, standing: impl Fn(usize) -> Standing) -> Vec<usize> {
    ranked.sort_by_cached_key(|&shard| standing(shard));
    ranked
}

/// Bytes of tiles that one shard is to send to this process.
#[derive(Debug, Default)]
pub(crate) struct Load {
    bytes: AtomicU64,
}

impl Load {
    /// So many bytes are asked for; they are under way until they came, or the result is dropped.
    pub(crate) fn begin(self: &Arc<Self>, bytes: u64) -> UnderWay {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        UnderWay { load: Arc::clone(self), left: bytes }
    }

    /// Bytes as they are compared: coarse, or a few bytes more here and there would send the same stripe to another shard each time.
    pub(crate) fn class(bytes: u64) -> u32 {
        (bytes / LOAD_STEP).checked_ilog2().map_or(0, |doublings| doublings + 1)
    }
}

/// What is left of a call's bytes.
#[derive(Debug)]
pub(crate) struct UnderWay {
    load: Arc<Load>,
    left: u64,
}

impl UnderWay {
    /// So many came.
    pub(crate) fn came(&mut self, bytes: u64) {
        let bytes = bytes.min(self.left);
        self.left -= bytes;
        self.load.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.came(self.left);
    }
}

/// The order in which one search asks shards. It looks at their load once, and what it is about to ask for counts as under way: else
/// all stripes of a long sequence would go to the shard that has nothing to do now.
#[derive(Debug)]
pub(crate) struct ReadOrder<'a> {
    links: &'a ShardLinks,
    now: Instant,
    /// By shard.
    bytes: Vec<u64>,
    /// The stripe whose decision was counted last: blocks that are looked for one by one count once for their stripe.
    counted: Option<[u8; 32]>,
}

impl<'a> ReadOrder<'a> {
    /// An order by what is known now.
    pub(crate) fn new(links: &'a ShardLinks) -> Self {
        let bytes = links.links().iter().map(bytes_under_way).collect();
        Self { links, now: Instant::now(), bytes, counted: None }
    }

    /// Indices of the shards that the stripe named by `seed` may lie on, as they are asked.
    pub(crate) fn readers(&mut self, seed: &[u8; 32]) -> Result<Vec<usize>, Error> {
        let ranked = self.links.candidates(seed)?;
        let standing = |shard: usize| Standing {
            avoided: self.links.links()[shard].health.is_avoided(self.now),
            distance: self.links.distance(shard),
            load: Load::class(self.bytes[shard]),
        };
        let ordered = in_order(ranked, standing);
        let decision = match ordered[..] {
            [first, second, ..] => Decision::between(standing(first), standing(second)),
            _ => Decision::Only,
        };
        if self.counted.replace(*seed) != Some(*seed) {
            self.links.reads.count(decision);
        }
        Ok(ordered)
    }

    /// So many bytes are about to be read of a shard.
    pub(crate) fn plan(&mut self, shard: usize, bytes: u64) {
        self.bytes[shard] = self.bytes[shard].saturating_add(bytes);
    }
}

fn bytes_under_way(link: &ShardLink) -> u64 {
    link.load.bytes.load(Ordering::Relaxed) + link.attend.under_way() as u64 * QUERY_BYTES
}
