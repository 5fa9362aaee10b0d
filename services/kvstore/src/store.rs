//! What the calls of a shard share: identity, the locked pool, the clock, the permits for compute.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, Mutex, PoisonError},
};

use longshore_attention::{Executor, KvDtype, LAYOUT_CPU_PANELS, Tile, TileShape};
use longshore_blocks::{
    BlockPool, Deployment, Geometry, PoolConfig, ShardId,
    pool::{Eviction, Generation},
};
use longshore_chassis::Tasks;
use longshore_compute::ComputePool;
use longshore_proto::types::{Dtype, Identity, WireTileShape};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use crate::{
    Config, Error, ShardCompute,
    drain::Drain,
    inventory::Inventory,
    lanes::Listeners,
    metrics::StoreMetrics,
    repair::RepairCounters,
    scrub::ScrubOrders,
    tier::{Disk, DiskSeam, open_disk},
    turns::Turns,
};

/// Most keys or blocks of one request.
pub(crate) const KEYS_MAX: usize = 65_536;
/// Lookups of more keys run off the reactor, in steps of this many.
pub(crate) const LOOKUP_STEP_KEYS: usize = 1_024;
/// Most blocks of one view, a sequence of 2^28 tokens of the smallest blocks, and of all views together: a name takes 16 bytes.
const VIEW_BLOCKS_MAX: usize = 1 << 24;

/// Put streams that take tiles at the same time. Each has a thread meanwhile, which may wait for room on a slow disk: most of the
/// threads of a process are left to those who read.
const PUTS_MAX: usize = 64;
/// Steps of streams that read at the same time.
const READS_MAX: usize = 64;

/// Who a shard is and what it holds.
#[derive(Debug, Clone)]
pub struct ShardIdentity {
    /// Name of the shard, unique in the cluster.
    pub shard_id: ShardId,
    /// What the KV of this deployment depends on.
    pub deployment: Deployment,
    /// Epoch of the shard map, as the membership tells it.
    pub epoch: watch::Receiver<u64>,
    /// Block and stripe sizes.
    pub geometry: Geometry,
    /// Shape of every tile.
    pub tile_shape: TileShape,
    /// Layers of the model, each with one tile per block.
    pub layers: u32,
}

/// Payload of the pool's pages.
pub(crate) type Pool = BlockPool<Arc<Tile>>;

/// What is held, and what is told of it.
struct Holdings {
    pool: Pool,
    inventory: Inventory,
}

/// State of a shard.
pub(crate) struct Store {
    config: Config,
    identity: ShardIdentity,
    holdings: Mutex<Holdings>,
    disk: Option<Disk>,
    started: Instant,
    compute: ShardCompute,
    turns: Turns,
    put_turns: Turns,
    read_turns: Turns,
    pub(crate) metrics: StoreMetrics,
    pub(crate) repair: RepairCounters,
    pub(crate) scrub: Arc<ScrubOrders>,
    pub(crate) drain: Drain,
    /// Who serves it.
    pub(crate) listeners: Listeners,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("shard_id", &self.identity.shard_id.0).finish_non_exhaustive()
    }
}

impl Store {
    /// A store, and the wishes for promotion that somebody has to carry out when it has a disk tier.
    pub(crate) fn new(
        config: Config,
        identity: ShardIdentity,
        compute: ShardCompute,
        metrics: StoreMetrics,
        tasks: &Tasks,
        seam: DiskSeam,
    ) -> Result<(Self, Option<mpsc::Receiver<Generation>>), Error> {
        identity.tile_shape.validate()?;
        if identity.tile_shape.block_tokens != identity.geometry.block_tokens() as usize {
            let problem = format!(
                "is {} in the tile shape, {} in the geometry",
                identity.tile_shape.block_tokens,
                identity.geometry.block_tokens()
            );
            return Err(Error::invalid("block_tokens", problem));
        }
        let pool_config = PoolConfig {
            budget_bytes: config.capacity_bytes,
            tile_bytes: identity.tile_shape.bytes() as u64,
            layers: identity.layers,
            retention_ms: config.retention_ms,
            writers_max: config.writers_max,
            readers_max: config.readers_max,
            tenant_percent: config.tenant_percent,
            views_max: config.views_max,
            view_blocks_max: VIEW_BLOCKS_MAX,
            view_secret: fresh_secret(),
        };
        let mut pool = BlockPool::with_policy(pool_config, config.eviction.parse::<Eviction>()?.policy())?;
        pool.keep_journal();
        let (mut disk, mut wishes, mut placed) = (None, None, Vec::new());
        if config.disk.is_on() {
            let opened = open_disk(&config, &identity, pool, fresh_incarnation(), seam, tasks)?;
            (disk, wishes) = (Some(opened.disk), Some(opened.promotions));
            (pool, placed) = (opened.pool, opened.placed);
        }
        let mut inventory = Inventory::new(fresh_incarnation());
        // What was found is told first: a block that a younger one replaced takes its place with it.
        inventory.apply(pool.take_events());
        for (namespace, key, place) in placed.into_iter().rev() {
            inventory.place(namespace, key, Some(place));
        }
        let store = Self {
            turns: Turns::new(config.attend_concurrency),
            put_turns: Turns::new(PUTS_MAX),
            read_turns: Turns::new(READS_MAX),
            config,
            identity,
            holdings: Mutex::new(Holdings { pool, inventory }),
            disk,
            started: Instant::now(),
            compute,
            metrics,
            repair: RepairCounters::default(),
            scrub: Arc::default(),
            drain: Drain::default(),
            listeners: Listeners::default(),
        };
        Ok((store, wishes))
    }

    /// The disk tier, when there is one.
    pub(crate) fn disk(&self) -> Option<&Disk> {
        self.disk.as_ref()
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn identity(&self) -> &ShardIdentity {
        &self.identity
    }

    pub(crate) fn executor(&self) -> &dyn Executor {
        &*self.compute.executor
    }

    pub(crate) fn compute_pool(&self) -> &ComputePool {
        &self.compute.pool
    }

    /// Turns at taking tiles, which may wait for room.
    pub(crate) fn put_turns(&self) -> &Turns {
        &self.put_turns
    }

    /// Turns at reading blocks in memory and at making summaries.
    pub(crate) fn read_turns(&self) -> &Turns {
        &self.read_turns
    }

    /// Turns at computing.
    pub(crate) fn turns(&self) -> &Turns {
        &self.turns
    }

    /// All turns by the name of their kind; those of the disk only where there is one.
    pub(crate) fn all_turns(&self) -> impl Iterator<Item = (&'static str, &Turns)> {
        let memory = [("attend", &self.turns), ("put", &self.put_turns), ("read", &self.read_turns)];
        let disk = self.disk().map(|disk| [("disk_attend", &disk.turns), ("disk_get", &disk.get_turns)]);
        memory.into_iter().chain(disk.into_iter().flatten())
    }

    /// Lends the pool and the time. Never hold it over anything slow. Threads outside of a runtime know
    /// only the real clock, not the one that a test may move.
    pub(crate) fn with_pool<T>(&self, use_pool: impl FnOnce(&mut Pool, u64) -> T) -> T {
        self.with_inventory(|pool, _, now_ms| use_pool(pool, now_ms))
    }

    /// The same with what is told of the pool.
    pub(crate) fn with_inventory<T>(&self, use_both: impl FnOnce(&mut Pool, &mut Inventory, u64) -> T) -> T {
        let now_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        // Every operation of the pool leaves it consistent before it can panic, so a poisoned lock is still good.
        let mut holdings = self.holdings.lock().unwrap_or_else(PoisonError::into_inner);
        let Holdings { pool, inventory } = &mut *holdings;
        let result = use_both(pool, inventory, now_ms);
        inventory.apply(pool.take_events());
        result
    }

    /// Shape of every tile as it travels.
    pub(crate) fn wire_shape(&self) -> WireTileShape {
        let shape = &self.identity.tile_shape;
        WireTileShape {
            block_tokens: shape.block_tokens as u32,
            kv_heads: shape.kv_heads as u32,
            head_dim: shape.head_dim as u32,
            dtype: wire_dtype(shape.dtype),
            layout: LAYOUT_CPU_PANELS,
            layers: self.identity.layers,
        }
    }

    /// Time since the start, for what keeps to a rate.
    pub(crate) fn elapsed_us(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Bytes of one block.
    pub(crate) fn block_bytes(&self) -> u64 {
        self.identity.tile_shape.bytes() as u64 * u64::from(self.identity.layers)
    }

    /// Refuses callers of another deployment or epoch.
    pub(crate) fn check_identity(&self, identity: &Identity) -> Result<(), Error> {
        let shard = || self.identity.shard_id.clone();
        if identity.deployment != self.identity.deployment {
            return Err(Error::OtherDeployment { shard: shard() });
        }
        let own = *self.identity.epoch.borrow();
        if identity.shard_map_epoch != own {
            return Err(Error::OtherEpoch { shard: shard(), theirs: identity.shard_map_epoch, own });
        }
        Ok(())
    }

    /// Refuses tiles of another shape, naming the field.
    pub(crate) fn check_shape(&self, shape: &WireTileShape) -> Result<(), Error> {
        let own = &self.identity.tile_shape;
        let own_dtype = wire_dtype(own.dtype);
        let fields = [
            ("shape.block_tokens", u64::from(shape.block_tokens), own.block_tokens as u64),
            ("shape.kv_heads", u64::from(shape.kv_heads), own.kv_heads as u64),
            ("shape.head_dim", u64::from(shape.head_dim), own.head_dim as u64),
            ("shape.layout", u64::from(shape.layout), u64::from(LAYOUT_CPU_PANELS)),
            ("shape.layers", u64::from(shape.layers), u64::from(self.identity.layers)),
        ];
        if let Some((field, theirs, own)) = fields.iter().find(|(_, theirs, own)| theirs != own) {
            return Err(Error::invalid(*field, format!("is {theirs}, this shard holds {own}")));
        }
        if shape.dtype != own_dtype {
            let problem = format!("is {:?}, this shard holds {own_dtype:?}", shape.dtype);
            return Err(Error::invalid("shape.dtype", problem));
        }
        Ok(())
    }
}

fn wire_dtype(dtype: KvDtype) -> Dtype {
    match dtype {
        KvDtype::F32 => Dtype::F32,
        KvDtype::F16 => Dtype::F16,
        KvDtype::Bf16 => Dtype::Bf16,
        KvDtype::Int8 => Dtype::Int8,
    }
}

/// Refuses requests with too many of something.
pub(crate) fn check_count(field: &str, count: usize) -> Result<(), Error> {
    if count > KEYS_MAX {
        return Err(Error::invalid(field, format!("has {count} entries, limit {KEYS_MAX}")));
    }
    Ok(())
}

/// Tells one start of a shard from another; never 0.
fn fresh_incarnation() -> u64 {
    RandomState::new().hash_one("incarnation").max(1)
}

/// 32 bytes that nobody can guess: the keys of the standard library's hasher come from the operating system.
fn fresh_secret() -> [u8; 32] {
    let mut secret = [0; 32];
    for (word, chunk) in secret.chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&RandomState::new().hash_one(word).to_le_bytes());
    }
    secret
}
