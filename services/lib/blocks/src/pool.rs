//! What a shard holds: blocks being written, sealed blocks, the views that pin them, and what goes when room is needed.
//! Generic over the tile payload; owns the bookkeeping, never looks into a payload, never reads a clock.

mod evict;
mod journal;
mod leases;
mod list;
mod notes;
mod sealed;
mod shares;
mod stats;
#[cfg(test)]
mod tests;
mod tiers;
mod view;
mod write;

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use crate::{BlockKey, Error, Namespace, tier::Tier};

use evict::{Ghosts, Uses};

pub use evict::{Candidate, Eviction, EvictionPolicy, Fifo, Lfu, Lru, Lru2, Reuse, S3Fifo, UsedAgain};
pub use journal::{Departure, PoolEvent};
pub use list::{Listed, Moving};
pub use notes::Noted;
pub use sealed::{Generation, Note, Page, Pages, Payload, SealedBlock};
pub use shares::{Resource, ResourceStats};
pub use stats::{DiskStats, PoolStats};
pub use tiers::{DiskConfig, Promote, Promotion, Spill};
pub use view::{Opened, ViewBlock, ViewId};
pub use write::{Admission, Put, WriterId};

/// Evicted blocks whose uses are remembered, for each block that fits the budget: blocks are megabytes, what is remembered of
/// one is 200 bytes.
const GHOSTS_PER_BLOCK: usize = 16;

/// Sizes and limits of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolConfig {
    /// Bytes that pages, those of open blocks included, and notes may occupy.
    pub budget_bytes: u64,
    /// Bytes of one page: the body of one tile.
    pub tile_bytes: u64,
    /// Pages of a block, one per layer.
    pub layers: u32,
    /// How long a block is kept from eviction after it was sealed or reported as held, milliseconds.
    pub retention_ms: u64,
    /// Most writers at a time.
    pub writers_max: usize,
    /// Most streams that read at a time, of each kind.
    pub readers_max: usize,
    /// What one tenant alone may take of what all share, per cent, from 1 to 100 ([`Resource`]).
    pub tenant_percent: u32,
    /// Most views at a time.
    pub views_max: usize,
    /// Most blocks of one view, and of all views together, counted with multiplicity.
    pub view_blocks_max: usize,
    /// Secret of this incarnation. View ids follow from it, so that they can be neither guessed nor mistaken for those of an
    /// earlier incarnation.
    pub view_secret: [u8; 32],
}

/// The blocks of one shard. Time is an argument, in milliseconds from any fixed start.
///
/// A block is *open* while one writer writes it (several writers may write the same block, each into its own pages) and
/// *sealed* once a writer brought all its layers. Sealed blocks are found, viewed and, unless a view pins them or their
/// retention lease runs, evicted. An open block occupies all of its pages from its first tile on, so that a block that was
/// begun can be finished.
#[derive(Debug)]
pub struct BlockPool<T> {
    config: PoolConfig,
    held: HashMap<Generation, Held<T>>,
    index: HashMap<(Namespace, BlockKey), Generation>,
    /// Unpinned blocks by the end of their retention lease; those whose lease ended move to `policy` when room is needed.
    leases: leases::Leases,
    policy: Box<dyn EvictionPolicy>,
    ghosts: Ghosts,
    /// Pinned blocks in memory, by last use: they go to the tier below when there is one and nothing else can make way.
    pinned: BTreeSet<(u64, Generation)>,
    /// Blocks with notes that no view holds, by last use; without some of those on their way between the tiers.
    noted: BTreeSet<(u64, Generation)>,
    note_bytes: u64,
    disk: Option<tiers::Disk<T>>,
    shares: shares::Shares,
    writers: HashMap<WriterId, write::Writer<T>>,
    views: HashMap<ViewId, view::View<T>>,
    /// Views that ended while they were borrowed.
    closed_views: HashMap<ViewId, view::View<T>>,
    open_blocks: u64,
    /// Sealed blocks that take memory.
    memory_blocks: u64,
    pinned_blocks: u64,
    condemned_blocks: u64,
    last_id: u64,
    last_tick: u64,
    totals: stats::Totals,
    /// Events since they were last taken; none are kept unless somebody asked for them.
    journal: Option<Vec<PoolEvent>>,
}

/// A sealed block and what keeps it.
#[derive(Debug)]
struct Held<T> {
    block: Arc<SealedBlock<T>>,
    /// Views that pin it, counted with multiplicity.
    pins: u64,
    uses: Uses,
    lease_until_ms: u64,
    /// Bytes of its notes.
    note_bytes: u64,
    /// A check of its bytes failed: nobody finds it any more, and it goes with its last pin.
    condemned: bool,
    stage: Stage,
}

/// Which tier a sealed block is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Memory,
    /// In memory, and being written to the tier below.
    Leaving,
    Disk,
    /// On the tier below, and being read into memory that is reserved for it.
    Coming,
}

impl Stage {
    fn is_moving(self) -> bool {
        matches!(self, Self::Leaving | Self::Coming)
    }

    fn takes_memory(self) -> bool {
        self != Self::Disk
    }
}

impl<T> BlockPool<T> {
    /// An empty pool with the usual order of eviction.
    pub fn new(config: PoolConfig) -> Result<Self, Error> {
        Self::with_policy(config, Eviction::default().policy())
    }

    /// An empty pool with another order of eviction.
    pub fn with_policy(config: PoolConfig, policy: Box<dyn EvictionPolicy>) -> Result<Self, Error> {
        config.validate()?;
        let blocks = usize::try_from(config.budget_bytes / config.block_bytes()).unwrap_or(usize::MAX);
        Ok(Self {
            shares: shares::Shares::new(config.tenant_percent),
            ghosts: Ghosts::new(blocks.saturating_mul(GHOSTS_PER_BLOCK)),
            config,
            held: HashMap::new(),
            index: HashMap::new(),
            leases: leases::Leases::default(),
            policy,
            pinned: BTreeSet::new(),
            noted: BTreeSet::new(),
            note_bytes: 0,
            disk: None,
            writers: HashMap::new(),
            views: HashMap::new(),
            closed_views: HashMap::new(),
            open_blocks: 0,
            memory_blocks: 0,
            pinned_blocks: 0,
            condemned_blocks: 0,
            last_id: 0,
            last_tick: 0,
            totals: stats::Totals::default(),
            journal: None,
        })
    }

    /// Sizes and limits.
    pub fn config(&self) -> &PoolConfig {
        &self.config
    }

    /// Says which blocks are held sealed. A hit is a promise: the block is kept for the retention time.
    pub fn lookup(&mut self, namespace: Namespace, keys: &[BlockKey], now_ms: u64) -> Vec<bool> {
        let found: Vec<_> = keys.iter().map(|key| self.index.get(&(namespace, *key)).copied()).collect();
        self.count_hits(&found);
        // Last key first: of one prefix, the tail then goes before the head, without which it is worth nothing.
        found.iter().rev().flatten().for_each(|&generation| self.renew(generation, now_ms));
        found.iter().map(Option::is_some).collect()
    }

    /// Counts a use of blocks that are about to be read, and keeps them for the retention time.
    pub fn touch_all(&mut self, namespace: Namespace, keys: &[BlockKey], now_ms: u64) {
        // Last key first, as in a lookup.
        for key in keys.iter().rev() {
            if let Some(&generation) = self.index.get(&(namespace, *key)) {
                self.renew(generation, now_ms);
            }
        }
    }

    /// A sealed block, to be read at once; counts as a use. It may be evicted while the caller still reads its copy.
    pub fn get(&mut self, namespace: Namespace, key: BlockKey, now_ms: u64) -> Option<Arc<SealedBlock<T>>> {
        let generation = *self.index.get(&(namespace, key))?;
        self.renew(generation, now_ms);
        self.held.get(&generation).map(|held| held.block.clone())
    }

    /// Withdraws a block whose bytes failed a check: it is no longer found, views that hold it fail, and its pages are freed
    /// with the last of them. Unknown generations are no error: somebody else was faster.
    pub fn condemn(&mut self, generation: Generation) {
        if self.held.get(&generation).is_none_or(|held| held.condemned) {
            return;
        }
        self.unqueue(generation);
        self.forget(generation);
        self.drop_notes(generation);
        let held = self.held.get_mut(&generation).expect("it was found");
        held.condemned = true;
        let name = (held.block.namespace(), held.block.key());
        let (pinned, moving) = (held.pins > 0, held.stage.is_moving());
        self.totals.condemned += 1;
        self.condemned_blocks += 1;
        self.index.remove(&name);
        self.note(name.0, name.1, Some(Departure::Condemned));
        if pinned {
            self.pinned_blocks -= 1;
            self.views.values_mut().for_each(|view| view.condemn(generation));
        } else if !moving {
            self.take_out(generation);
        }
    }

    /// Ends the leases of views that nobody used in time; returns how many.
    pub fn expire(&mut self, now_ms: u64) -> usize {
        let late: Vec<ViewId> =
            self.views.iter().filter(|(_, view)| view.expires_at_ms <= now_ms).map(|(id, _)| *id).collect();
        late.iter().for_each(|id| self.close_view(*id));
        self.totals.expired_views += late.len() as u64;
        late.len()
    }

    /// Puts another payload in the place of a sealed block's page, keeping its checksum: stands for memory that rots. True
    /// when the block was held.
    #[doc(hidden)]
    pub fn rot_for_test(&mut self, key: BlockKey, layer: u32, rot: impl Fn(&T) -> T) -> bool
    where
        T: Clone,
    {
        let mut found = false;
        for held in self.held.values().filter(|held| held.block.key() == key && !held.condemned) {
            found |= held.block.rot(layer, &rot);
        }
        found
    }

    fn fits(&self, bytes: u64) -> bool {
        self.used_bytes().saturating_add(bytes) <= self.config.budget_bytes
    }

    /// Drops a block that is in no queue and nothing keeps, and remembers that it was here.
    fn evict(&mut self, victim: Generation) {
        let held = self.held.get(&victim).expect("only held blocks are queued");
        let (name, uses) = ((held.block.namespace(), held.block.key()), held.uses);
        debug_assert!(!held.condemned, "condemned blocks are in no queue");
        self.take_out(victim);
        self.ghosts.remember(name, uses);
        self.totals.evicted += 1;
        self.note(name.0, name.1, Some(Departure::Evicted));
    }

    /// Takes an unpinned block out of everything.
    fn remove(&mut self, generation: Generation) {
        self.unqueue(generation);
        self.forget(generation);
        self.take_out(generation);
    }

    /// Tells the policies that a block in no queue does not come back.
    fn forget(&mut self, generation: Generation) {
        self.policy.forget(generation);
        if let Some(disk) = &mut self.disk {
            disk.policy.forget(generation);
        }
    }

    /// Takes an unpinned block that is in no queue out of everything else.
    fn take_out(&mut self, generation: Generation) {
        self.drop_notes(generation);
        if let Some(disk) = &mut self.disk {
            disk.saved.remove(&generation);
        }
        let held = self.held.remove(&generation).expect("only held blocks are removed");
        debug_assert_eq!(held.pins, 0, "pinned blocks stay");
        debug_assert!(!held.stage.is_moving(), "blocks on their way stay");
        self.memory_blocks -= u64::from(held.stage.takes_memory());
        if held.condemned {
            self.condemned_blocks -= 1;
        } else {
            self.index.remove(&(held.block.namespace(), held.block.key()));
        }
        let extent = held.block.extent();
        // Its own handle is not to count as a reader of the place.
        drop(held);
        if let (Some(disk), Some(extent)) = (&mut self.disk, extent) {
            disk.copies.remove(&generation);
            disk.extents.retire(extent);
        }
    }

    /// Takes a block out of the queue that it is in, if any. Which one that is follows from what keeps the block.
    fn unqueue(&mut self, generation: Generation) {
        let held = self.held.get(&generation).expect("only held blocks are queued");
        let lease = (held.lease_until_ms, generation);
        self.noted.remove(&(held.uses.last, generation));
        match (held.stage, held.pins > 0) {
            _ if held.condemned => {}
            (Stage::Memory, true) => _ = self.pinned.remove(&(held.uses.last, generation)),
            (Stage::Memory, false) => {
                let tenant = held.block.namespace();
                if self.leases.remove(tenant, lease) {
                    self.shares.give(tenant, Resource::PromisedBlocks);
                } else {
                    self.policy.remove(generation);
                }
            }
            (Stage::Disk, false) => {
                let disk = self.disk.as_mut().expect("blocks on disk have one");
                if !disk.leases.remove(&lease) {
                    disk.policy.remove(generation);
                }
            }
            _ => {}
        }
    }

    /// Queues a block towards eviction from its tier, first by its lease. Pinned blocks are kept, though not always in memory.
    fn queue(&mut self, generation: Generation) {
        let held = self.held.get(&generation).expect("only held blocks are queued");
        let lease = (held.lease_until_ms, generation);
        if held.pins == 0 && held.note_bytes > 0 {
            self.noted.insert((held.uses.last, generation));
        }
        match (held.stage, held.pins > 0, &mut self.disk) {
            _ if held.condemned => {}
            (Stage::Memory, true, _) => _ = self.pinned.insert((held.uses.last, generation)),
            (Stage::Memory, false, _) => {
                let tenant = held.block.namespace();
                self.leases.insert(tenant, lease);
                self.shares.take(tenant, Resource::PromisedBlocks);
            }
            // What a stop saved makes way for nothing, so nothing has to look past it.
            (Stage::Disk, false, Some(disk)) if !disk.saved.contains(&generation) => {
                disk.leases.insert(lease);
            }
            _ => {}
        }
    }

    /// A use: the block becomes the most recently used one and its lease starts again.
    fn renew(&mut self, generation: Generation, now_ms: u64) {
        self.unqueue(generation);
        self.touch(generation, now_ms);
        let held = self.held.get_mut(&generation).expect("the index names held blocks only");
        held.lease_until_ms = held.lease_until_ms.max(now_ms.saturating_add(self.config.retention_ms));
        self.queue(generation);
    }

    /// Counts a touch of a block in no queue. A block that a view pins is in use all the time.
    fn touch(&mut self, generation: Generation, now_ms: u64) {
        let tick = self.next_tick();
        let held = self.held.get_mut(&generation).expect("only held blocks are used");
        let quiet_ms = if held.pins > 0 { u64::MAX } else { self.config.retention_ms };
        if let Some(again) = held.uses.touch(tick, now_ms, quiet_ms) {
            self.policy.used_again(again);
            if let Some(disk) = &mut self.disk {
                disk.policy.used_again(again);
                disk.filter.touch(&held.block.key());
            }
        }
    }

    fn pin(&mut self, generation: Generation, now_ms: u64) -> Arc<SealedBlock<T>> {
        self.unqueue(generation);
        self.touch(generation, now_ms);
        let held = self.held.get_mut(&generation).expect("the index names held blocks only");
        if held.pins == 0 && !held.condemned {
            self.pinned_blocks += 1;
        }
        let is_first = held.pins == 0;
        held.pins += 1;
        let block = held.block.clone();
        if is_first {
            self.shares.take(block.namespace(), Resource::KeptBlocks);
        }
        self.queue(generation);
        block
    }

    /// `used_ms` is when the view was last used.
    fn unpin(&mut self, generation: Generation, used_ms: u64) {
        self.unqueue(generation);
        self.touch(generation, used_ms);
        let held = self.held.get_mut(&generation).expect("pinned blocks are held");
        held.pins -= 1;
        let (pinned, condemned, moving) = (held.pins > 0, held.condemned, held.stage.is_moving());
        let tenant = held.block.namespace();
        if !pinned {
            self.shares.give(tenant, Resource::KeptBlocks);
        }
        if !pinned && !condemned {
            self.pinned_blocks -= 1;
        }
        if !pinned && condemned && !moving {
            self.take_out(generation);
        } else {
            self.queue(generation);
        }
    }

    /// Counts what was found, by tier, and what was not.
    fn count_hits(&mut self, found: &[Option<Generation>]) {
        let hits = found.iter().flatten();
        let below = hits.clone().filter(|generation| self.tier_of(**generation) == Some(Tier::Disk)).count();
        let hits = hits.count();
        self.totals.hits += hits as u64;
        self.totals.hits_disk += below as u64;
        self.totals.misses += (found.len() - hits) as u64;
    }

    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    fn next_tick(&mut self) -> u64 {
        self.last_tick += 1;
        self.last_tick
    }
}

impl PoolConfig {
    /// Bytes of a whole block.
    pub fn block_bytes(&self) -> u64 {
        self.tile_bytes.saturating_mul(u64::from(self.layers))
    }

    fn validate(&self) -> Result<(), Error> {
        let invalid = |field, problem: String| Err(Error::Invalid { field, problem });
        if self.tile_bytes == 0 {
            return invalid("tile_bytes", "is 0, must be at least 1".to_owned());
        }
        if !(1..=100).contains(&self.tenant_percent) {
            return invalid("tenant_percent", format!("is {}, must be from 1 to 100", self.tenant_percent));
        }
        if self.layers == 0 {
            return invalid("layers", "is 0, must be at least 1".to_owned());
        }
        if self.budget_bytes < self.block_bytes() {
            let problem = format!("is {}, one block needs {}", self.budget_bytes, self.block_bytes());
            return invalid("budget_bytes", problem);
        }
        Ok(())
    }
}
