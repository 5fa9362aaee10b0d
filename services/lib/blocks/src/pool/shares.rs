//! What each tenant takes of what all share, and how much more it may take: whoever takes all that it can leaves something for others.
//!
//! A tenant may grow while `taken · (100 − p) ≤ p · free`: alone it gets `p` per cent, and the more take all that they may the less each
//! gets, so that something is always free for one that has nothing yet. This is the dynamic threshold of buffers that queues share
//! (Choudhury and Hahne 1998) with the factor p / (100 − p).

use std::collections::HashMap;

use super::BlockPool;
use crate::{Error, Namespace};

/// What tenants share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Resource {
    /// Open views.
    Views,
    /// Views whose blocks are to be appended to other views.
    Additions,
    /// Put streams.
    Writers,
    /// Blocks of views, counted with multiplicity.
    ViewedBlocks,
    /// Get streams and streams of summaries.
    Readers,
    /// Streams of inventory events.
    Watchers,
    /// Blocks being written; they lie in memory.
    OpenBlocks,
    /// Blocks that nothing may evict, on all tiers: those being written and those that a view pins.
    KeptBlocks,
    /// Blocks in memory that no view pins and that were promised for a while, or are not needed as room since. Never refused: promises
    /// are broken instead.
    PromisedBlocks,
}

/// How many resources there are.
const RESOURCES: usize = 9;

impl Resource {
    /// All of them.
    pub const ALL: [Self; RESOURCES] = [
        Self::Views,
        Self::Additions,
        Self::Writers,
        Self::ViewedBlocks,
        Self::Readers,
        Self::Watchers,
        Self::OpenBlocks,
        Self::KeptBlocks,
        Self::PromisedBlocks,
    ];

    /// Name, for metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Views => "views",
            Self::Additions => "additions",
            Self::Writers => "writers",
            Self::ViewedBlocks => "viewed_blocks",
            Self::Readers => "readers",
            Self::Watchers => "watchers",
            Self::OpenBlocks => "open_blocks",
            Self::KeptBlocks => "kept_blocks",
            Self::PromisedBlocks => "promised_blocks",
        }
    }

    /// What there is too much of, in the plural, for people.
    fn plural(self) -> &'static str {
        match self {
            Self::Views => "views",
            Self::Additions => "additions to views",
            Self::Writers => "put streams",
            Self::ViewedBlocks => "blocks of views",
            Self::Readers => "streams of blocks and summaries",
            Self::Watchers => "inventory streams",
            Self::OpenBlocks => "incomplete blocks",
            Self::KeptBlocks => "blocks in views and put streams",
            Self::PromisedBlocks => "promised blocks",
        }
    }
}

/// How one resource is shared at the moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ResourceStats {
    /// What all tenants take.
    pub taken: u64,
    /// The most that one of them takes.
    pub most: u64,
    /// Refusals since start because a tenant would have taken too much.
    pub refused_total: u64,
}

type Amounts = [u64; RESOURCES];

/// What tenants take. Tenants that take nothing are forgotten.
#[derive(Debug)]
pub(super) struct Shares {
    percent: u64,
    tenants: HashMap<Namespace, Amounts>,
    taken: Amounts,
    refused: Amounts,
}

impl Shares {
    pub(super) fn new(percent: u32) -> Self {
        let percent = u64::from(percent);
        Self { percent, tenants: HashMap::new(), taken: [0; RESOURCES], refused: [0; RESOURCES] }
    }

    /// Refuses when `tenant` may not take `more` of the `limit` that there are; counts that.
    pub(super) fn ask(
        &mut self,
        tenant: Namespace,
        resource: Resource,
        more: u64,
        limit: u64,
    ) -> Result<(), Error> {
        let (own, all) = (self.of(tenant, resource) + more, self.taken[resource as usize] + more);
        // One of each is for everybody, as long as there is one: small stores have no percentages.
        let is_small = own <= 1 && all <= limit;
        // With 100 per cent it is left to the limits themselves.
        let free = limit.saturating_sub(all);
        let is_within = own.saturating_mul(100 - self.percent) <= free.saturating_mul(self.percent);
        if more == 0 || is_small || is_within {
            return Ok(());
        }
        self.refused[resource as usize] += 1;
        Err(Error::Share { what: resource.plural(), taken: own - more, limit, percent: self.percent as u32 })
    }

    pub(super) fn take(&mut self, tenant: Namespace, resource: Resource) {
        self.take_more(tenant, resource, 1);
    }

    pub(super) fn take_more(&mut self, tenant: Namespace, resource: Resource, more: u64) {
        if more > 0 {
            self.tenants.entry(tenant).or_default()[resource as usize] += more;
            self.taken[resource as usize] += more;
        }
    }

    pub(super) fn give(&mut self, tenant: Namespace, resource: Resource) {
        self.give_more(tenant, resource, 1);
    }

    pub(super) fn give_more(&mut self, tenant: Namespace, resource: Resource, more: u64) {
        if more == 0 {
            return;
        }
        self.taken[resource as usize] -= more;
        let amounts = self.tenants.get_mut(&tenant).expect("only what was taken is given back");
        amounts[resource as usize] -= more;
        if *amounts == [0; RESOURCES] {
            self.tenants.remove(&tenant);
        }
    }

    pub(super) fn of(&self, tenant: Namespace, resource: Resource) -> u64 {
        self.tenants.get(&tenant).map_or(0, |amounts| amounts[resource as usize])
    }

    /// What all tenants take.
    pub(super) fn all(&self, resource: Resource) -> u64 {
        self.taken[resource as usize]
    }

    /// The tenant that keeps most memory from others, of those with a promise that may be broken, if it keeps more than `than` would
    /// with one block more.
    pub(super) fn greediest(&self, than: Namespace) -> Option<Namespace> {
        let keeps = |amounts: &Amounts| {
            amounts[Resource::KeptBlocks as usize] + amounts[Resource::PromisedBlocks as usize]
        };
        let own = self.tenants.get(&than).map_or(0, keeps);
        let with_promises =
            self.tenants.iter().filter(|(_, amounts)| amounts[Resource::PromisedBlocks as usize] > 0);
        let most = with_promises.max_by_key(|(tenant, amounts)| (keeps(amounts), *tenant.as_bytes()))?;
        (self.percent < 100 && keeps(most.1) > own + 1).then_some(*most.0)
    }

    /// Tenants with something that is refused beyond a part: promises alone do not count, as nobody looks after those that ran out while
    /// there is room.
    pub(super) fn tenants(&self) -> u64 {
        let takes = |amounts: &&Amounts| {
            Resource::ALL.iter().any(|&one| one != Resource::PromisedBlocks && amounts[one as usize] > 0)
        };
        self.tenants.values().filter(takes).count() as u64
    }

    pub(super) fn stats(&self) -> [ResourceStats; RESOURCES] {
        Resource::ALL.map(|resource| ResourceStats {
            taken: self.taken[resource as usize],
            most: self.tenants.values().map(|amounts| amounts[resource as usize]).max().unwrap_or(0),
            refused_total: self.refused[resource as usize],
        })
    }
}

impl<T> BlockPool<T> {
    /// Room for a stream that reads for `tenant`, of which there are `readers_max` of each kind; [`Self::close_stream`] gives it back.
    ///
    /// # Panics
    /// For what is no stream that reads.
    pub fn open_stream(&mut self, tenant: Namespace, kind: Resource) -> Result<(), Error> {
        assert!(matches!(kind, Resource::Readers | Resource::Watchers), "{kind:?} are no streams that read");
        let limit = self.config.readers_max as u64;
        if self.shares.all(kind) >= limit {
            return Err(Error::Full { what: kind.plural(), limit });
        }
        self.shares.ask(tenant, kind, 1, limit)?;
        self.shares.take(tenant, kind);
        Ok(())
    }

    /// A stream ended.
    ///
    /// # Panics
    /// When `tenant` has none.
    pub fn close_stream(&mut self, tenant: Namespace, kind: Resource) {
        self.shares.give(tenant, kind);
    }

    /// Refuses when `tenant` may keep no `blocks` more from eviction.
    pub(super) fn ask_to_keep(&mut self, tenant: Namespace, blocks: u64) -> Result<(), Error> {
        let below = self.disk.as_ref().map_or(0, |disk| disk.extents.capacity());
        let limit = self.config.budget_bytes / self.config.block_bytes() + below;
        self.shares.ask(tenant, Resource::KeptBlocks, blocks, limit)
    }

    /// Refuses when `tenant` may begin no further block.
    pub(super) fn ask_to_begin(&mut self, tenant: Namespace) -> Result<(), Error> {
        let limit = self.config.budget_bytes / self.config.block_bytes();
        self.shares.ask(tenant, Resource::OpenBlocks, 1, limit)?;
        self.ask_to_keep(tenant, 1)
    }

    /// A block was begun.
    pub(super) fn begun(&mut self, tenant: Namespace) {
        self.open_blocks += 1;
        self.shares.take(tenant, Resource::OpenBlocks);
        self.shares.take(tenant, Resource::KeptBlocks);
    }

    /// An open block is no longer open.
    pub(super) fn ended(&mut self, tenant: Namespace) {
        self.open_blocks -= 1;
        self.shares.give(tenant, Resource::OpenBlocks);
        self.shares.give(tenant, Resource::KeptBlocks);
    }

    /// Takes a block out of memory that was promised to the tenant that keeps most, for one that keeps less: the one whose promise ends
    /// first. One that lies below as well is not lost. False when there is none.
    pub(super) fn break_promise(&mut self, wanting: Namespace) -> bool {
        let victim = self.shares.greediest(wanting).and_then(|greediest| self.leases.first_of(greediest));
        let Some(victim) = victim else { return false };
        if self.take_down_copied(victim) {
            return true;
        }
        self.unqueue(victim);
        self.forget(victim);
        self.evict(victim);
        self.totals.broken_promises += 1;
        true
    }
}

impl<T> BlockPool<T> {
    /// What a tenant takes, counted anew, in the order of [`Resource::ALL`] without streams that read, of which nothing else is known.
    #[cfg(test)]
    pub(super) fn count_taken(&self, tenant: Namespace) -> Amounts {
        let writers = || self.writers.values().filter(|writer| writer.namespace == tenant);
        let held = || self.held.values().filter(|held| held.block.namespace() == tenant);
        let open: u64 = writers().map(super::write::Writer::open_blocks).sum();
        let views = |share| {
            let own = self.all_views().filter(|view| view.namespace == tenant && view.share == share);
            own.count() as u64
        };
        let viewed = self.all_views().filter(|view| view.namespace == tenant).map(super::view::View::count);
        [
            views(Resource::Views),
            views(Resource::Additions),
            writers().count() as u64,
            viewed.sum(),
            0,
            0,
            open,
            open + held().filter(|held| held.pins > 0).count() as u64,
            self.leases.of(tenant) as u64,
        ]
    }
}

#[cfg(test)]
mod tests;
