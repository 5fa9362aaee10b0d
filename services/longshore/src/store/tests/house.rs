//! Some shards that keep up each other's copies, served over gRPC.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use longshore_attention::{KvDtype, LAYOUT_CPU_PANELS, Tile, TileShape};
use longshore_blocks::{
    BlockKey, BlockPlace, Deployment, EXACT_PREFILL, Geometry, ShardId, crc32c, quorum::CopyRule,
};
use longshore_chassis::{Metrics, Tasks};
use longshore_cluster::{Member, Membership, StaticMembership};
use longshore_compute::ComputePool;
use longshore_fabric::{
    GrpcConnector, GrpcOptions,
    server::{ServerOptions, Services, serve},
};
use longshore_kvstore::{Config, KvStore, RepairConfig, ShardIdentity};
use longshore_proto::types::{Dtype, ListBlocks, ModelDescription, WireTileShape};
use tokio::{net::TcpListener, sync::watch};

use crate::{
    process::Process,
    store::{
        cluster::Cluster,
        file::BlockFile,
        listing::{Listing, Row},
        put::{Placed, put_file},
    },
};

pub(super) const LAYERS: u32 = 2;
/// Nothing here takes as long.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Some shards and files for them.
pub(super) struct House {
    pub(super) shards: Vec<Arc<KvStore>>,
    pub(super) members: Vec<Member>,
    pub(super) cluster: Cluster,
    pub(super) folder: tempfile::TempDir,
    tasks: Tasks,
    /// Shards follow it for as long as it lives.
    _membership: StaticMembership,
}

impl Drop for House {
    fn drop(&mut self) {
        self.tasks.cancel();
    }
}

pub(super) fn shape() -> TileShape {
    TileShape { block_tokens: 16, kv_heads: 2, head_dim: 8, dtype: KvDtype::F16 }
}

pub(super) fn wire_shape() -> WireTileShape {
    WireTileShape {
        block_tokens: 16,
        kv_heads: 2,
        head_dim: 8,
        dtype: Dtype::F16,
        layout: LAYOUT_CPU_PANELS,
        layers: LAYERS,
    }
}

pub(super) fn deployment() -> Deployment {
    Deployment::from_bytes([3; 32])
}

pub(super) fn block_bytes() -> u64 {
    shape().bytes() as u64 * u64::from(LAYERS)
}

pub(super) fn key(name: u8) -> BlockKey {
    BlockKey([name; 16])
}

/// A block of its own stripe.
pub(super) fn block(name: u8) -> BlockFile {
    let tile = |layer: u32| {
        let mut tile = Tile::zeroed(shape());
        let values: Vec<f32> =
            (0..16 * 2 * 8).map(|at| ((at * 7 + layer as usize) % 13) as f32 - f32::from(name)).collect();
        tile.write(0, &values, &values).unwrap();
        let body = Bytes::copy_from_slice(tile.as_bytes());
        (crc32c(&body), body)
    };
    BlockFile {
        deployment: deployment(),
        namespace: deployment().namespace(EXACT_PREFILL, b""),
        key: key(name),
        place: Some(BlockPlace { stripe_seed: [name; 32], index: u64::from(name) }),
        shape: wire_shape(),
        tiles: (0..LAYERS).map(tile).collect(),
    }
}

impl House {
    /// `count` shards with so many copies of each block, all of which must be confirmed.
    pub(super) async fn new(count: usize, copies: usize) -> Self {
        let (mut listeners, mut members) = (Vec::new(), Vec::new());
        for index in 0..count {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            members.push(Member::parse(&format!("kvstore=kv-{index}@http://{address}")).unwrap());
            listeners.push(listener);
        }
        let membership = StaticMembership::new(members.clone()).unwrap();
        let tasks = Tasks::new();
        let rule = CopyRule::new(copies, copies).unwrap();
        let mut shards = Vec::new();
        for (listener, member) in listeners.into_iter().zip(&members) {
            shards.push(start(listener, member, &membership, rule, &tasks));
        }
        let connector = Arc::new(GrpcConnector::new(GrpcOptions::default()));
        let cluster = Cluster::of(members.clone(), connector).unwrap();
        Self {
            shards,
            members,
            cluster,
            folder: tempfile::tempdir().unwrap(),
            tasks,
            _membership: membership,
        }
    }

    /// A file with this block.
    pub(super) fn file(&self, block: &BlockFile) -> PathBuf {
        let path = self.folder.path().join(format!("{}.lsb", block.key));
        block.write(&path).unwrap();
        path
    }

    /// Stores a block where it belongs.
    pub(super) async fn put(&self, name: u8) -> Placed {
        put_file(&self.cluster, &self.file(&block(name)), None).await.unwrap()
    }

    /// All blocks.
    pub(super) async fn rows(&self) -> Vec<Row> {
        let (mut listing, mut rows) = (Listing::new(&self.cluster, ListBlocks::default()), Vec::new());
        while let Some(row) = listing.next().await {
            rows.push(row);
        }
        assert_eq!(listing.failures().count(), 0);
        rows
    }

    /// Which shards hold a block.
    pub(super) async fn holders(&self, name: u8) -> BTreeSet<usize> {
        let rows = self.rows().await;
        let row = rows.iter().find(|row| row.key == key(name));
        row.map(|row| row.copies.iter().map(|(at, _)| *at).collect()).unwrap_or_default()
    }

    /// Waits until every block has as many copies as wanted, all where they belong.
    pub(super) async fn settled(&self, copies: usize) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let map = self.cluster.view.shard_map();
        let is_home = |row: &Row| {
            let held: BTreeSet<usize> = row.copies.iter().map(|(at, _)| *at).collect();
            held == map.owners(&[row.key.0[0]; 32], copies).into_iter().collect()
        };
        loop {
            let rows = self.rows().await;
            if rows.iter().all(is_home) {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "{rows:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn start(
    listener: TcpListener,
    member: &Member,
    membership: &StaticMembership,
    rule: CopyRule,
    tasks: &Tasks,
) -> Arc<KvStore> {
    let (_, epoch) = watch::channel(membership.view().epoch());
    let identity = ShardIdentity {
        shard_id: ShardId(member.id.clone()),
        deployment: deployment(),
        epoch,
        geometry: Geometry::new(16, 2).unwrap(),
        tile_shape: shape(),
        layers: LAYERS,
    };
    let repair = RepairConfig {
        ping_interval_ms: 20,
        down_after_ms: 10_000,
        scan_interval_ms: 300,
        retry_ms: 30,
        drain_settle_ms: 300,
        ..RepairConfig::default()
    };
    let config = Config { retention_ms: 100, scrub_bytes_per_s: 0, repair, ..Config::default() };
    let shard = KvStore::new(config, identity, &ComputePool::serial(), tasks, &Metrics::new()).unwrap();
    shard.join(longshore_kvstore::Cluster {
        views: membership.watch(),
        connector: Arc::new(GrpcConnector::new(GrpcOptions::default())),
        rule,
    });
    let sign = Process { this: member.clone(), views: membership.watch(), model: model() };
    let services = Services::new(ServerOptions::default()).shard(shard.clone()).describer(Arc::new(sign));
    tasks.spawn_critical("grpc", serve(listener, services, tasks.token()));
    shard
}

fn model() -> ModelDescription {
    ModelDescription {
        name: "tiny".to_owned(),
        architecture: "llama".to_owned(),
        max_context_tokens: 1_000,
        vocabulary: 10,
        tile_shape: wire_shape(),
        kv_bytes_per_token: block_bytes() / 16,
        deployment: deployment(),
    }
}
