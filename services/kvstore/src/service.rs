//! The shard as a service: one method per call, and the reaper of views.

use std::{
    ops::Range,
    sync::{Arc, Weak},
    time::Duration,
};

use async_trait::async_trait;
use longshore_attention::Tile;
use longshore_blocks::{BlockKey, BlockPlace, Namespace, pool::ViewId};
use longshore_chassis::{Metrics, Tasks};
use longshore_fabric::{
    BoxStream, CallContext, Error as CallError, Shard, StripePartial, TileRooms, TileTraffic,
};
use longshore_proto::types::{
    AttendAnswer, AttendQuery, BlockPage, DrainStats, GetBlocks, GetSummaries, Identity, InventoryNews,
    ListBlocks, Lookup, OpenView, OpenedView, PutAck, ScrubStarted, ShardStats, SummariesMessage, TileMemory,
    TileMessage, WatchInventory, WireTileShape,
};
use tokio::{sync::mpsc, time::MissedTickBehavior};

use crate::{
    Cluster, Config, Error, ShardCompute, ShardIdentity, attend, get, inventory, list,
    metrics::{self, StoreMetrics},
    put, repair, scrub, stats,
    store::{LOOKUP_STEP_KEYS, Store, check_count},
    summaries,
    tier::{DiskFaults, DiskSeam, FaultyTier, Reads, Tier, at_stop, promoter},
    views,
};

/// A KV shard.
#[derive(Debug)]
pub struct KvStore {
    pub(crate) store: Arc<Store>,
    tasks: Tasks,
}

impl KvStore {
    /// An empty shard that computes with `compute` (a pool: all of it on the CPU) and whose background work runs until `tasks` is cancelled. Must be called on a
    /// runtime. Fails when the shapes make no sense or the capacity does not hold one block.
    pub fn new(
        config: Config,
        identity: ShardIdentity,
        compute: impl Into<ShardCompute>,
        tasks: &Tasks,
        metrics: &Metrics,
    ) -> Result<Arc<Self>, Error> {
        Self::with_seam(config, identity, compute, tasks, metrics, DiskSeam::plain())
    }

    /// As [`Self::new`], with a disk to which `faults` happen, for simulations: no thread of the shard's own reads it.
    #[doc(hidden)]
    pub fn with_disk_faults(
        config: Config,
        identity: ShardIdentity,
        compute: impl Into<ShardCompute>,
        tasks: &Tasks,
        metrics: &Metrics,
        faults: Arc<dyn DiskFaults>,
    ) -> Result<Arc<Self>, Error> {
        let around = |inner| Arc::new(FaultyTier { inner: Arc::new(inner), faults }) as Arc<dyn Tier>;
        let seam = DiskSeam { around: Box::new(around), reads: Reads::ByWhoAsks };
        Self::with_seam(config, identity, compute, tasks, metrics, seam)
    }

    /// As [`Self::new`], with another way to use the disk.
    pub(crate) fn with_seam(
        config: Config,
        identity: ShardIdentity,
        compute: impl Into<ShardCompute>,
        tasks: &Tasks,
        metrics: &Metrics,
        seam: DiskSeam,
    ) -> Result<Arc<Self>, Error> {
        let tasks = tasks.child();
        let interval = Duration::from_millis(config.reap_interval_ms);
        let own = StoreMetrics::register(metrics);
        let (store, wishes) = Store::new(config, identity, compute.into(), own, &tasks, seam)?;
        let store = Arc::new(store);
        metrics::register_occupancy(metrics, &store);
        let (weak, scope) = (Arc::downgrade(&store), tasks.clone());
        tasks.spawn_critical("kvstore-reaper", async move {
            tokio::select! {
                () = reap(&weak, interval) => {}
                () = scope.cancelled() => {}
            }
            Ok::<(), Error>(())
        });
        if let Some(wishes) = wishes {
            let (weak, scope) = (Arc::downgrade(&store), tasks.clone());
            tasks.spawn("kvstore-promoter", async move {
                tokio::select! {
                    () = promoter(weak, wishes) => {}
                    () = scope.cancelled() => {}
                }
            });
        }
        scrub::start(&store, &tasks);
        Ok(Arc::new(Self { store, tasks }))
    }

    /// Summaries made since the start.
    #[cfg(test)]
    pub(crate) fn summaries_made_for_test(&self) -> u64 {
        self.store.metrics.summaries_made.get()
    }

    /// Keeps up the copies of the blocks together with the other shards of `cluster`, until the shard's tasks are cancelled. Must be
    /// called on a runtime, once.
    pub fn join(&self, cluster: Cluster) {
        repair::start(&self.store, &self.tasks, cluster);
    }

    /// Writes blocks that are in memory alone to disk when the shard's tasks are cancelled, within `kvstore.disk.save_ms`, so that the next
    /// start finds them. Does nothing without a disk tier. Must be called on a runtime, once.
    pub fn save_at_stop(&self) {
        if self.store.disk().is_some() {
            let saving = at_stop(Arc::clone(&self.store), self.tasks.clone());
            self.tasks.spawn("kvstore-save", saving);
        }
    }

    /// Counts the tiles of one more listener among the metrics.
    pub(crate) fn show_tiles(&self, traffic: TileTraffic) {
        self.store.listeners.add(traffic);
    }

    /// What places a held block.
    #[doc(hidden)]
    pub fn place_for_test(&self, namespace: Namespace, key: BlockKey) -> Option<BlockPlace> {
        self.store.with_inventory(|_, inventory, _| inventory.place_of(namespace, key))
    }

    /// Puts other bytes in the place of a stored tile's, without its checksum. False when no such block is held.
    #[cfg(test)]
    pub(crate) fn rot_for_test(&self, key: BlockKey, layer: u32, body: &[u8]) -> bool {
        self.store.with_pool(|pool, _| {
            pool.rot_for_test(key, layer, |tile| {
                Arc::new(Tile::from_bytes(tile.shape(), body).expect("the length is the tile's own"))
            })
        })
    }

    /// Get streams that read ahead of what goes out.
    #[cfg(test)]
    pub(crate) fn streams_reading_ahead(&self) -> usize {
        self.store.disk().map_or(0, |disk| disk.ahead.taken())
    }

    /// Flips a bit of a stored tile without its checksum, as failing memory would. False when no such block is held.
    #[doc(hidden)]
    pub fn corrupt_for_test(&self, key: BlockKey, layer: u32) -> bool {
        self.store.with_pool(|pool, _| {
            pool.rot_for_test(key, layer, |tile| {
                let mut body = tile.as_bytes().to_vec();
                body[0] ^= 1;
                Arc::new(Tile::from_bytes(tile.shape(), &body).expect("the shape is the tile's own"))
            })
        })
    }
}

/// Closes views whose lease ended, until the shard is gone.
async fn reap(store: &Weak<Store>, interval: Duration) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(store) = store.upgrade() else { return };
        let expired = store.with_pool(|pool, now| pool.expire(now));
        if expired > 0 {
            tracing::debug!(shard = %store.identity().shard_id, expired, "views expired");
        }
    }
}

#[async_trait]
impl Shard for KvStore {
    async fn lookup(&self, _ctx: &CallContext, lookup: Lookup) -> Result<Vec<bool>, CallError> {
        self.store.check_identity(&lookup.identity)?;
        check_count("keys", lookup.keys.len())?;
        if lookup.peek {
            // Other shards drop or send copies by this answer, and are not to count on one that is about to go.
            if self.store.drain.is_on() {
                return Err(Error::Draining { shard: self.store.identity().shard_id.clone() }.into());
            }
            let namespace = lookup.identity.namespace;
            return Ok(self.store.with_pool(|pool, _| pool.peek(namespace, &lookup.keys)));
        }
        if lookup.keys.len() <= LOOKUP_STEP_KEYS {
            return Ok(find(&self.store, &lookup));
        }
        let store = self.store.clone();
        Ok(self.store.off_reactor(move || find(&store, &lookup)).await?)
    }

    async fn put_blocks(
        &self,
        ctx: &CallContext,
        identity: Identity,
        shape: WireTileShape,
        tiles: mpsc::Receiver<TileMessage>,
    ) -> Result<BoxStream<PutAck>, CallError> {
        Ok(put::start(&self.store, &self.tasks, ctx, &identity, &shape, tiles)?)
    }

    async fn get_blocks(
        &self,
        ctx: &CallContext,
        get: GetBlocks,
    ) -> Result<BoxStream<Option<TileMessage>>, CallError> {
        Ok(get::start(&self.store, &self.tasks, ctx, get, None)?)
    }

    async fn get_heads(
        &self,
        ctx: &CallContext,
        get: GetBlocks,
        heads: Range<u32>,
    ) -> Result<BoxStream<Option<TileMessage>>, CallError> {
        Ok(get::start(&self.store, &self.tasks, ctx, get, Some(heads))?)
    }

    fn tile_memory(&self) -> Option<Arc<dyn TileMemory>> {
        Some(Arc::new(TileRooms::new(self.store.identity().tile_shape)))
    }

    async fn open_view(&self, _ctx: &CallContext, open: OpenView) -> Result<OpenedView, CallError> {
        Ok(views::open(&self.store, open).await?)
    }

    async fn get_summaries(
        &self,
        ctx: &CallContext,
        get: GetSummaries,
    ) -> Result<BoxStream<SummariesMessage>, CallError> {
        Ok(summaries::start(&self.store, &self.tasks, ctx, get)?)
    }

    async fn attend(
        &self,
        ctx: &CallContext,
        queries: mpsc::Receiver<AttendQuery>,
    ) -> Result<BoxStream<AttendAnswer>, CallError> {
        Ok(attend::start(&self.store, &self.tasks, ctx, queries))
    }

    fn is_here(&self) -> bool {
        true
    }

    fn attend_here(&self, query: &AttendQuery) -> Option<Result<Vec<StripePartial>, CallError>> {
        Some(attend::here(&self.store, query).map_err(CallError::from))
    }

    async fn close_view(&self, _ctx: &CallContext, view_id: u64) -> Result<(), CallError> {
        self.store.with_pool(|pool, _| pool.close_view(ViewId(view_id)));
        Ok(())
    }

    async fn stats(&self, _ctx: &CallContext) -> Result<ShardStats, CallError> {
        Ok(stats::of(&self.store))
    }

    async fn watch_inventory(
        &self,
        ctx: &CallContext,
        watch: WatchInventory,
    ) -> Result<BoxStream<InventoryNews>, CallError> {
        Ok(inventory::start(&self.store, &self.tasks, ctx, watch)?)
    }

    async fn list_blocks(&self, _ctx: &CallContext, list: ListBlocks) -> Result<BlockPage, CallError> {
        Ok(list::page(&self.store, list).await?)
    }

    async fn start_scrub(
        &self,
        _ctx: &CallContext,
        bytes_per_second: Option<u64>,
    ) -> Result<ScrubStarted, CallError> {
        Ok(scrub::ask(&self.store, bytes_per_second))
    }

    async fn drain(&self, _ctx: &CallContext, cancel: bool) -> Result<DrainStats, CallError> {
        if self.store.drain.set(!cancel) {
            let shard = &self.store.identity().shard_id;
            match cancel {
                false => tracing::info!(%shard, "asked to hand the blocks over: draining"),
                true => tracing::info!(%shard, "the drain was cancelled"),
            }
        }
        Ok(stats::of(&self.store).drain)
    }
}

/// Looks keys up a step at a time, so that the lock is never held for long. The last step comes first: uses are recorded from
/// the tail of a prefix to its head.
fn find(store: &Store, lookup: &Lookup) -> Vec<bool> {
    let mut found = vec![false; lookup.keys.len()];
    let steps = lookup.keys.chunks(LOOKUP_STEP_KEYS).zip(found.chunks_mut(LOOKUP_STEP_KEYS));
    for (keys, found) in steps.rev() {
        let namespace = lookup.identity.namespace;
        found.copy_from_slice(&store.with_pool(|pool, now| pool.lookup(namespace, keys, now)));
    }
    found
}
