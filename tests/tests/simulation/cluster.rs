//! The simulated processes: real shards that keep up each other's copies, real clients, and a membership that tells each of
//! them of a change in its own time.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use futures::StreamExt as _;
use longshore_attention::{CpuExecutor, KvDtype, TileShape};
use longshore_blocks::{
    BlockKey, BlockPlace, Deployment, EXACT_PREFILL, Geometry, Namespace, ShardId, quorum::CopyRule,
};
use longshore_chassis::{Metrics, Tasks};
use longshore_cluster::{ClusterView, Labels, Member, Role};
use longshore_compute::ComputePool;
use longshore_engine::{Engine, EngineOptions, ShardDirectory, testing::TinyModel};
use longshore_fabric::{CallContext, Shard as _};
use longshore_kvstore::{Config, DiskConfig, KvStore, RepairConfig, ShardIdentity};
use longshore_proto::types::{GetBlocks, Identity, Lookup};
use longshore_tests::{draws::Draws, truth};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    disks::{Disks, SimDisk, pass_time},
    drains::listed,
    lanes::{Sabotage, SimConnector},
    network::{Life, NODES, Network, Origin},
};

/// Layers of the simulated model: those of the engine's tiny one.
pub(crate) const LAYERS: u32 = 3;
/// Tiles of 1 KiB.
pub(crate) const SHAPE: TileShape =
    TileShape { block_tokens: 16, kv_heads: 2, head_dim: 8, dtype: KvDtype::F16 };
/// Processes from here on are clients.
pub(crate) const FIRST_CLIENT: usize = 6;
/// Whose sequences there are.
pub(crate) const TENANTS: [u8; 2] = [0, 1];
/// Blocks that a shard has room for: more than are written, so that none is lost for want of room.
const ROOM_BLOCKS: u64 = 400;
/// Blocks that fit in memory where there are disks below: fewer than are written, so that blocks move.
const MEMORY_BLOCKS: u64 = 8;

/// What a simulation is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) shards: usize,
    pub(crate) rule: CopyRule,
    pub(crate) labels: Labelled,
    pub(crate) sabotage: Sabotage,
    /// Shards have little memory, and disks below it.
    pub(crate) disks: bool,
}

/// What shards say of where they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Labelled {
    Nothing,
    /// Two shards on each host.
    Hosts,
    /// Two zones.
    Zones,
}

/// Bytes of one block.
fn block_bytes() -> u64 {
    SHAPE.bytes() as u64 * u64::from(LAYERS)
}

/// Block and stripe sizes: short stripes, so that a short sequence lies on several shards.
pub(crate) fn geometry() -> Geometry {
    Geometry::new(SHAPE.block_tokens as u32, 2).expect("the sizes are valid")
}

fn deployment() -> Deployment {
    Deployment::from_bytes([3; 32])
}

/// One of several tenants.
pub(crate) fn namespace(tenant: u8) -> Namespace {
    deployment().namespace(EXACT_PREFILL, &[tenant])
}

/// A process and what it was told of the others.
#[derive(Debug)]
struct Told {
    /// Number of the newest view that it was told.
    version: Arc<AtomicU64>,
    views: watch::Sender<Arc<ClusterView>>,
    epoch: watch::Sender<u64>,
}

impl Told {
    fn new(view: &Arc<ClusterView>) -> Self {
        let (views, _) = watch::channel(Arc::clone(view));
        let (epoch, _) = watch::channel(view.epoch());
        Self { version: Arc::default(), views, epoch }
    }

    /// Tells a view unless a newer one was told.
    fn tell(&self, version: u64, view: &Arc<ClusterView>) {
        if self.version.fetch_max(version, SeqCst) < version {
            self.epoch.send_replace(view.epoch());
            self.views.send_replace(Arc::clone(view));
        }
    }
}

/// A process that stores and reads.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) shards: ShardDirectory,
    pub(crate) engine: Arc<Engine>,
}

impl Client {
    pub(crate) fn identity(&self, tenant: u8) -> Identity {
        let shard_map_epoch = self.shards.epoch();
        Identity { deployment: deployment(), namespace: namespace(tenant), shard_map_epoch }
    }
}

/// All processes.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) network: Arc<Network>,
    pub(crate) plan: Plan,
    pub(crate) clients: Vec<Arc<Client>>,
    /// Shards that run and are asked to hand their blocks over.
    pub(super) draining: BTreeSet<usize>,
    told: Vec<Arc<Told>>,
    tasks: [Option<Tasks>; NODES],
    members: BTreeSet<usize>,
    view: Arc<ClusterView>,
    version: u64,
    lives: u64,
    draws: Draws,
    pool: Arc<ComputePool>,
    /// Where there are some, with the folder in which they are.
    pub(crate) disks: Option<(Arc<Disks>, tempfile::TempDir)>,
}

impl Cluster {
    /// Starts everybody; must be called on the runtime of the simulation.
    pub(crate) fn start(seed: u64, plan: Plan) -> Self {
        let network = Network::new(seed);
        let members: BTreeSet<usize> = (0..plan.shards).collect();
        let view = Arc::new(view_of(&plan, &members));
        let told: Vec<_> = (0..NODES).map(|_| Arc::new(Told::new(&view))).collect();
        let mut cluster = Self {
            clients: Vec::new(),
            draining: BTreeSet::new(),
            plan,
            told,
            tasks: [const { None }; NODES],
            members,
            view,
            version: 0,
            lives: 0,
            draws: Draws::new(&[seed, 1]),
            pool: ComputePool::serial(),
            disks: plan.disks.then(|| {
                let (disks, waits) = Disks::new(seed);
                network.tasks.spawn(pass_time(waits));
                (disks, tempfile::tempdir().expect("a temporary folder"))
            }),
            network,
        };
        (0..plan.shards).for_each(|node| cluster.start_shard(node));
        let engine = cluster.engine();
        for node in FIRST_CLIENT..NODES {
            let views = cluster.told[node].views.subscribe();
            let connector = Arc::new(cluster.connector(Origin { node, life: 0 }));
            let shards = ShardDirectory::new(views, connector, cluster.network.tasks.clone(), 4);
            let shards = shards.with_copies(plan.rule);
            cluster.clients.push(Arc::new(Client { shards, engine: Arc::clone(&engine) }));
        }
        cluster
    }

    fn engine(&self) -> Arc<Engine> {
        let options = EngineOptions { kv_dtype: SHAPE.dtype, ..EngineOptions::default() };
        let executor = Arc::new(CpuExecutor::new(Arc::clone(&self.pool)));
        let engine =
            Engine::new(Arc::new(TinyModel::new(7)), executor, Arc::clone(&self.pool), geometry(), options);
        let engine = Arc::new(engine.expect("the tiny model makes valid tiles"));
        assert_eq!(engine.tile_shape(), SHAPE, "the shape is that of the tiny model");
        engine
    }

    fn connector(&self, from: Origin) -> SimConnector {
        SimConnector { network: Arc::clone(&self.network), from, sabotage: self.plan.sabotage }
    }

    /// Starts an empty shard, which knows the newest members.
    pub(crate) fn start_shard(&mut self, node: usize) {
        self.lives += 1;
        let told = &self.told[node];
        told.tell(self.version, &self.view);
        let identity = ShardIdentity {
            shard_id: ShardId(name(node)),
            deployment: deployment(),
            epoch: told.epoch.subscribe(),
            geometry: geometry(),
            tile_shape: SHAPE,
            layers: LAYERS,
        };
        let tasks = Tasks::new();
        let (metrics, mut settings) = (Metrics::new(), settings());
        let store = match &self.disks {
            None => KvStore::new(settings, identity, &self.pool, &tasks, &metrics),
            Some((disks, folder)) => {
                // Of its own in each life: what a process held is gone with it, as without a disk.
                let path = folder.path().join(self.lives.to_string());
                put_on_disk(&mut settings, path.to_string_lossy().into_owned());
                let faults = Arc::new(SimDisk { disks: Arc::clone(disks), node });
                KvStore::with_disk_faults(settings, identity, &self.pool, &tasks, &metrics, faults)
            }
        };
        let store = store.expect("the settings are valid");
        store.join(longshore_kvstore::Cluster {
            views: told.views.subscribe(),
            connector: Arc::new(self.connector(Origin { node, life: self.lives })),
            rule: self.plan.rule,
        });
        let epoch = told.epoch.subscribe();
        let (dead, drained) = (CancellationToken::new(), Arc::default());
        let life = Life { number: self.lives, dead, store, epoch, drained };
        self.network.start(node, life);
        self.tasks[node] = Some(tasks);
    }

    /// Ends a shard as `kill -9` does: what it held is gone.
    pub(crate) fn kill(&mut self, node: usize) {
        self.network.kill(node);
        self.draining.remove(&node);
        if let Some(tasks) = self.tasks[node].take() {
            tasks.cancel();
        }
    }

    /// Shards on one machine with `node`, itself included, that run.
    pub(crate) fn fails_with(&self, node: usize) -> Vec<usize> {
        let together = |other: &usize| match self.plan.labels {
            Labelled::Hosts => other / 2 == node / 2,
            _ => *other == node,
        };
        self.running().into_iter().filter(together).collect()
    }

    pub(crate) fn running(&self) -> Vec<usize> {
        (0..FIRST_CLIENT).filter(|node| self.network.life(*node).is_some()).collect()
    }

    pub(crate) fn members(&self) -> &BTreeSet<usize> {
        &self.members
    }

    /// Lets a shard, which must run, join the members, or one leave them. Everybody hears of it in its own time.
    pub(crate) fn change(&mut self, node: usize, joins: bool) {
        if joins {
            self.members.insert(node)
        } else {
            self.members.remove(&node)
        };
        self.view = Arc::new(view_of(&self.plan, &self.members));
        self.version += 1;
        for told in &self.told {
            let (told, version, view) = (Arc::clone(told), self.version, Arc::clone(&self.view));
            let delay = Duration::from_millis(self.draws.below(6_000));
            self.network.tasks.spawn(async move {
                tokio::time::sleep(delay).await;
                told.tell(version, &view);
            });
        }
    }

    /// Tells everybody the newest members.
    pub(crate) fn inform(&self) {
        self.told.iter().for_each(|told| told.tell(self.version, &self.view));
    }

    /// Compares what the shards hold with what they should: every block where it belongs, and nothing else anywhere. The
    /// error is the first difference.
    pub(crate) async fn compare(&self, blocks: &BTreeMap<Name, BlockPlace>) -> Result<(), Unsettled> {
        let map = self.view.shard_map();
        let node = |at: usize| node_of(&map.shards()[at].id.0);
        let (held, serving) = (self.held(blocks).await?, self.serving());
        let owns = |node: &usize| serving.contains(node) && !self.draining.contains(node);
        let mut counts = BTreeMap::<usize, u64>::new();
        for (name, holders) in &held {
            let (seed, copies) = (&blocks[name].stripe_seed, self.plan.rule.copies());
            let owners = map.owners_among(seed, copies, |at| owns(&node(at)));
            let owners: BTreeSet<usize> = owners.into_iter().map(node).collect();
            // What is drained keeps its copies until it ends; they are none of those that there should be.
            let others: BTreeSet<usize> = holders.difference(&self.draining).copied().collect();
            // With fewer hosts than copies nothing is dropped: nobody can say that enough others hold theirs.
            let spared = owners.len() < copies && owners.is_subset(&others);
            if others != owners && !spared {
                return Err(Unsettled(format!("block {} is on {holders:?}, belongs on {owners:?}", name.1)));
            }
            holders.iter().for_each(|node| *counts.entry(*node).or_default() += 1);
        }
        for &node in &serving {
            self.check_owned(node, counts.get(&node).copied().unwrap_or(0)).await?;
        }
        // Reading is a use, which keeps blocks where they are, so it comes last.
        for node in self.serving() {
            self.check_readable(node, &held).await?;
        }
        Ok(())
    }

    /// Members that run.
    fn serving(&self) -> Vec<usize> {
        self.running().into_iter().filter(|node| self.members.contains(node)).collect()
    }

    fn identity(&self, tenant: u8) -> Identity {
        let shard_map_epoch = self.view.epoch();
        Identity { deployment: deployment(), namespace: namespace(tenant), shard_map_epoch }
    }

    /// Which shards say that they hold each block, past the network.
    pub(crate) async fn held(&self, blocks: &BTreeMap<Name, BlockPlace>) -> Result<Holders, Unsettled> {
        let mut held = Holders::new();
        for life in self.serving().into_iter().filter_map(|node| Some((node, self.network.life(node)?))) {
            if self.draining.contains(&life.0) {
                // It answers no such questions.
                for entry in listed(&life.1.store).await? {
                    for tenant in TENANTS.into_iter().filter(|tenant| namespace(*tenant) == entry.namespace) {
                        let name = (tenant, entry.key);
                        if blocks.contains_key(&name) {
                            held.entry(name).or_default().insert(life.0);
                        }
                    }
                }
                continue;
            }
            for tenant in TENANTS {
                let keys = keys_of(blocks, tenant);
                let lookup = Lookup { identity: self.identity(tenant), keys: keys.clone(), peek: true };
                let found = life.1.store.lookup(&CallContext::new("check"), lookup).await?;
                for (key, _) in keys.into_iter().zip(found).filter(|(_, found)| *found) {
                    held.entry((tenant, key)).or_default().insert(life.0);
                }
            }
        }
        Ok(held)
    }

    /// A shard gives out all that it says it holds, whole and right, past the network.
    async fn check_readable(&self, node: usize, held: &Holders) -> Result<(), Unsettled> {
        let Some(life) = self.network.life(node) else { return Ok(()) };
        for tenant in TENANTS {
            let here = held.iter().filter(|((of, _), holders)| *of == tenant && holders.contains(&node));
            let keys: Vec<BlockKey> = here.map(|((_, key), _)| *key).collect();
            let get = GetBlocks::whole(self.identity(tenant), keys);
            let mut tiles = life.store.get_blocks(&CallContext::new("check"), get).await?;
            while let Some(tile) = tiles.next().await {
                let Some(tile) = tile? else {
                    return Err(Unsettled(format!("shard {node} has lost a block that it held")));
                };
                if !tile.data.matches(tile.crc32c) || !truth::is_right(&tile) {
                    self.network.violated(format!("wrong byte: shard {node} holds block {}", tile.key));
                }
            }
        }
        Ok(())
    }

    /// Owned equals referenced: all memory is of blocks that are found.
    async fn check_owned(&self, node: usize, blocks: u64) -> Result<(), Unsettled> {
        let Some(life) = self.network.life(node) else { return Ok(()) };
        let stats = life.store.stats(&CallContext::new("check")).await?;
        let found = (stats.blocks, stats.used_bytes, stats.open_blocks, stats.views, stats.pinned_blocks);
        let below =
            stats.tiers.iter().filter(|tier| tier.name == "disk").map(|tier| tier.blocks).sum::<u64>();
        let in_memory = (blocks - below.min(blocks)) * block_bytes();
        let expected = (blocks, in_memory + stats.summary_bytes, 0, 0, 0);
        if self.draining.contains(&node) && !stats.drain.drained {
            return Err(Unsettled(format!("shard {node} is not drained: {:?}", stats.drain)));
        }
        if found == expected && stats.repair.backlog_blocks == 0 {
            return Ok(());
        }
        Err(Unsettled(format!("shard {node} holds {found:?} instead of {expected:?}: {:?}", stats.repair)))
    }
}

/// Why not all is as it should be.
#[derive(Debug)]
pub(crate) struct Unsettled(pub(crate) String);

impl From<longshore_fabric::Error> for Unsettled {
    fn from(error: longshore_fabric::Error) -> Self {
        Self(error.to_string())
    }
}

/// A block of a tenant.
pub(crate) type Name = (u8, BlockKey);
/// Who holds each block that somebody holds.
pub(crate) type Holders = BTreeMap<Name, BTreeSet<usize>>;

fn keys_of(blocks: &BTreeMap<Name, BlockPlace>, tenant: u8) -> Vec<BlockKey> {
    blocks.keys().filter(|(of, _)| *of == tenant).map(|(_, key)| *key).collect()
}

fn settings() -> Config {
    let repair = RepairConfig {
        ping_interval_ms: 1_000,
        down_after_ms: 4_000,
        scan_interval_ms: 10_000,
        retry_ms: 500,
        ..RepairConfig::default()
    };
    Config {
        capacity_bytes: ROOM_BLOCKS * block_bytes(),
        retention_ms: 1_000,
        reap_interval_ms: 1_000,
        scrub_bytes_per_s: 0,
        repair,
        ..Config::default()
    }
}

/// Little memory and much room below it.
fn put_on_disk(config: &mut Config, path: String) {
    config.capacity_bytes = MEMORY_BLOCKS * block_bytes();
    config.disk = DiskConfig { path, capacity_bytes: 4 << 20, pause_ms: 500, ..DiskConfig::default() };
}

fn name(node: usize) -> String {
    format!("kv-{node}")
}

fn node_of(id: &str) -> usize {
    id.strip_prefix("kv-").and_then(|node| node.parse().ok()).expect("shards are named after their node")
}

fn view_of(plan: &Plan, members: &BTreeSet<usize>) -> ClusterView {
    let member = |node: &usize| {
        let labels = match plan.labels {
            Labelled::Nothing => Labels::default(),
            Labelled::Hosts => Labels { host: format!("host-{}", node / 2), zone: String::new() },
            Labelled::Zones => Labels { host: String::new(), zone: format!("zone-{}", node % 2) },
        };
        Member {
            id: name(*node),
            role: Role::KvStore,
            address: format!("local:{}", name(*node)),
            incarnation: 0,
            weight: 1,
            labels,
        }
    };
    ClusterView::new(members.iter().map(member).collect()).expect("the members are valid")
}
