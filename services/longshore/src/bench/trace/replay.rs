//! A trace through the bookkeeping of real pools: what a shard does for a request, but with blocks of no bytes.

use anyhow::{Context, Result, bail};
use longshore_blocks::{
    AdmissionFilter, AdmissionRule, BlockKey, BlockPool, Deployment, EXACT_PREFILL, Error, Namespace,
    PoolConfig, ShardEntry, ShardId, ShardMap,
    pool::{Admission, DiskConfig, Eviction, Opened, Page, Promote, ViewId},
    tier::Tier,
};

use super::read::{Request, Trace};

/// Longer than any request is at work here: views are closed by the request that opened them.
const LEASE_MS: u64 = 1 << 40;

/// What to replay a trace on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cluster {
    pub(super) eviction: Eviction,
    /// Blocks of all shards together.
    pub(super) capacity_blocks: u64,
    /// Shards, all alike.
    pub(super) shards: u64,
    /// Consecutive blocks on one shard.
    pub(super) stripe_blocks: usize,
    /// How long blocks are kept whatever happens; 1: only during their own request.
    pub(super) retention_ms: u64,
    /// A tier below memory.
    pub(super) disk: Option<Below>,
}

/// A tier below memory whose writes are done at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Below {
    /// Its capacity, in capacities of memory.
    pub(super) times: u64,
    pub(super) rule: AdmissionRule,
}

/// What was found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub(super) struct Hits {
    /// Blocks that were held, all blocks before them too.
    pub(super) blocks: u64,
    /// Tokens of the prompts in these blocks.
    pub(super) tokens: u64,
    /// Blocks that were written to the tier below memory.
    pub(super) written: u64,
}

impl Hits {
    /// Adds the leading blocks that were found of one request.
    pub(super) fn add(&mut self, request: &Request, blocks: usize, block_tokens: u64) {
        self.blocks += blocks as u64;
        self.tokens += (blocks as u64 * block_tokens).min(request.input_tokens);
    }
}

/// Replays a trace from empty shards.
///
/// A request finds its leading blocks by lookups, pins them with views as a prefill worker does, stores the others in order,
/// and opens and closes views of all as a decode worker does. Requests follow each other: each is done before the next one
/// comes. A block that finds no room ends the storing of its request, since those after it would be worth nothing.
pub(super) fn replay(trace: &Trace, cluster: &Cluster) -> Result<Hits> {
    let mut shards = Shards::new(cluster)?;
    let mut hits = Hits::default();
    let mut now_ms = 0;
    for request in &trace.requests {
        // Two steps at least, so that what the last request used is out of its retention.
        now_ms = (now_ms + 2).max(request.timestamp_ms);
        let found = shards.serve(request, now_ms)?;
        hits.add(request, found, trace.block_tokens);
    }
    hits.written = shards.pools.iter().map(|pool| pool.stats().disk.spilled_total).sum();
    Ok(hits)
}

struct Shards {
    pools: Vec<BlockPool<()>>,
    map: ShardMap,
    stripe_blocks: usize,
    namespace: Namespace,
}

/// The block at a place of a prompt.
type Placed = (u64, BlockKey);

fn key(block: u64) -> BlockKey {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&block.to_le_bytes());
    BlockKey(bytes)
}

impl Shards {
    fn new(cluster: &Cluster) -> Result<Self> {
        let entry = |index| ShardEntry::new(ShardId(format!("{index:05}")), 1);
        let each = |index: u64| {
            let blocks = cluster.capacity_blocks / cluster.shards;
            let rest = u64::from(index < cluster.capacity_blocks % cluster.shards);
            let config = PoolConfig {
                budget_bytes: blocks + rest,
                tile_bytes: 1,
                layers: 1,
                retention_ms: cluster.retention_ms,
                writers_max: 1,
                readers_max: 1,
                tenant_percent: 100,
                views_max: 2,
                view_blocks_max: usize::MAX,
                view_secret: [0; 32],
            };
            let pool = BlockPool::with_policy(config, cluster.eviction.policy())?;
            Ok(match cluster.disk {
                None => pool,
                Some(below) => {
                    let blocks = (blocks + rest) * below.times;
                    let filter = AdmissionFilter::new(below.rule, blocks as usize, index);
                    let disk = DiskConfig { blocks, moves_max: 1, pause_ms: 0 };
                    pool.with_disk(disk, cluster.eviction.policy(), filter)
                }
            })
        };
        let pools: Result<Vec<_>, Error> = (0..cluster.shards).map(each).collect();
        Ok(Self {
            pools: pools.context("every shard must hold a block")?,
            map: ShardMap::new(0, (0..cluster.shards).map(entry).collect())?,
            stripe_blocks: cluster.stripe_blocks,
            namespace: Deployment::from_bytes([0; 32]).namespace(EXACT_PREFILL, &[]),
        })
    }

    /// Deals the blocks of a prompt to their shards. A stripe's shard follows from the block before it, as in a cluster.
    fn deal(&self, blocks: &[u64]) -> Vec<Vec<Placed>> {
        let mut dealt = vec![Vec::new(); self.pools.len()];
        for (stripe, part) in blocks.chunks(self.stripe_blocks).enumerate() {
            let first = stripe * self.stripe_blocks;
            let mut seed = [0; 32];
            if let Some(before) = first.checked_sub(1) {
                seed[..16].copy_from_slice(&key(blocks[before]).0);
            }
            let owner = self.map.owner(&seed).expect("there is a shard");
            let shard = self.map.shards().binary_search_by(|entry| entry.id.cmp(&owner.id));
            let shard = shard.expect("the owner is in its map");
            dealt[shard].extend(part.iter().zip(first as u64..).map(|(block, at)| (at, key(*block))));
        }
        dealt
    }

    /// Serves a request; the number of leading blocks that were held.
    fn serve(&mut self, request: &Request, now_ms: u64) -> Result<usize> {
        let dealt = self.deal(&request.blocks);
        let found = self.lookup(&dealt, request.blocks.len(), now_ms);
        let prefix = self.open(&dealt, 0..found as u64, now_ms)?;
        for (pool, view) in self.pools.iter_mut().zip(&prefix) {
            bring_up(pool, self.namespace, *view, now_ms)?;
        }
        let stored = self.store(&dealt, found as u64..request.blocks.len() as u64, now_ms)?;
        let whole = self.open(&dealt, 0..stored, now_ms)?;
        for (pool, (prefix, whole)) in self.pools.iter_mut().zip(prefix.into_iter().zip(whole)) {
            pool.close_view(prefix);
            pool.close_view(whole);
        }
        Ok(found)
    }

    fn lookup(&mut self, dealt: &[Vec<Placed>], blocks: usize, now_ms: u64) -> usize {
        let mut held = vec![false; blocks];
        for (pool, part) in self.pools.iter_mut().zip(dealt) {
            let keys: Vec<BlockKey> = part.iter().map(|(_, key)| *key).collect();
            let present = pool.lookup(self.namespace, &keys, now_ms);
            part.iter().zip(present).for_each(|((at, _), present)| held[*at as usize] = present);
        }
        held.iter().take_while(|held| **held).count()
    }

    /// One view a shard, of the blocks at these places.
    fn open(
        &mut self,
        dealt: &[Vec<Placed>],
        places: std::ops::Range<u64>,
        now_ms: u64,
    ) -> Result<Vec<ViewId>> {
        let mut views = Vec::with_capacity(self.pools.len());
        for (pool, part) in self.pools.iter_mut().zip(dealt) {
            let blocks: Vec<Placed> = part.iter().copied().filter(|(at, _)| places.contains(at)).collect();
            match pool.open_view(self.namespace, &blocks, LEASE_MS, now_ms)? {
                Opened::Open(view) => views.push(view),
                Opened::Missing(keys) => bail!("block `{}` went while its request was served", keys[0]),
            }
        }
        Ok(views)
    }

    /// Stores blocks in the order of the prompt; the place up to which all are held.
    fn store(&mut self, dealt: &[Vec<Placed>], places: std::ops::Range<u64>, now_ms: u64) -> Result<u64> {
        let mut order: Vec<(u64, usize, BlockKey)> = Vec::new();
        for (shard, part) in dealt.iter().enumerate() {
            order.extend(
                part.iter().filter(|(at, _)| places.contains(at)).map(|(at, key)| (*at, shard, *key)),
            );
        }
        order.sort_unstable_by_key(|(at, ..)| *at);
        let writers: Result<Vec<_>, Error> =
            self.pools.iter_mut().map(|pool| pool.open_writer(self.namespace)).collect();
        let writers = writers?;
        let mut stored = places.end;
        for (at, shard, key) in order {
            let page = Page { payload: (), crc32c: 0 };
            let (pool, writer) = (&mut self.pools[shard], writers[shard]);
            while matches!(pool.admit(writer, key, 0, now_ms), Ok(Admission::MakeRoom)) {
                write_down(pool, now_ms)?;
            }
            match pool.put(writer, key, 0, page, now_ms) {
                Ok(_) => {}
                Err(Error::NoSpace { .. }) => {
                    stored = at;
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.pools.iter_mut().zip(writers).for_each(|(pool, writer)| pool.close_writer(writer));
        Ok(stored)
    }
}

/// Carries out the writes that were ordered, of which there is at least one.
fn write_down(pool: &mut BlockPool<()>, now_ms: u64) -> Result<()> {
    let spill = pool.next_spill().context("whoever has to make room finds an order")?;
    pool.finish_spill(spill, true, now_ms);
    Ok(())
}

/// Reads the blocks of a view that lie below, as far as there is room for them.
fn bring_up(pool: &mut BlockPool<()>, namespace: Namespace, view: ViewId, now_ms: u64) -> Result<()> {
    let blocks = pool.view(namespace, view, now_ms)?;
    for entry in blocks.iter().filter(|entry| entry.block.tier() == Tier::Disk) {
        loop {
            match pool.begin_promotion(entry.block.generation(), now_ms) {
                Promote::Read(promotion) => {
                    let page = Page { payload: (), crc32c: 0 };
                    pool.finish_promotion(promotion, Some([page].into()));
                }
                Promote::MakeRoom => {
                    write_down(pool, now_ms)?;
                    continue;
                }
                Promote::No => {}
            }
            break;
        }
    }
    Ok(())
}
