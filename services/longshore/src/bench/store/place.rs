//! Where the shard of a measurement runs: in this process, or in one of its own.

use std::{
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use longshore_attention::TileShape;
use longshore_blocks::{Geometry, ShardId};
use longshore_chassis::{Metrics, Tasks};
use longshore_compute::ComputePool;
use longshore_fabric::{
    Connector, GrpcConnector, GrpcOptions, LocalConnector, Shard, baseline,
    server::{ServerOptions, Services, serve},
};
use longshore_kvstore::{Config, KvStore, ShardIdentity};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::TcpListener,
    process::{Child, Command},
    sync::watch,
};

use super::{
    BLOCK_TOKENS, crosses,
    gpu::{self, Lanes, Side},
    load::{Source, deployment},
    slab::SlabShard,
    usage,
};
use crate::{
    cli::{BenchStoreArgs, StoreEnd, StoreLane},
    console,
};

/// Bytes of tiles that a shard holds: more than is read, so that stores evict what was stored before.
const CAPACITY_BYTES: u64 = 512 << 20;
/// Bytes of tiles that the slab end gives.
const SLAB_SOURCE_BYTES: usize = 64 << 20;
/// Most streams at the same time, by the flag.
const STREAMS_MAX: usize = 64;
/// How long a child may take to start or to end.
const CHILD_PATIENCE: Duration = Duration::from_secs(60);
/// How long a shard may take to listen on its socket, and how often that is tried.
const LISTEN_PATIENCE: Duration = Duration::from_secs(5);
const LISTEN_PAUSE: Duration = Duration::from_millis(10);

/// What to serve and how to reach it.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) shape: TileShape,
    pub(super) layers: u32,
    pub(super) end: StoreEnd,
    pub(super) shards: usize,
    pub(super) args: BenchStoreArgs,
}

impl Plan {
    /// One shard.
    pub(super) fn new(args: &BenchStoreArgs, shape: TileShape, end: StoreEnd) -> Self {
        Self { shape, layers: args.layers, end, shards: 1, args: args.clone() }
    }

    fn server_options(&self) -> ServerOptions {
        let window = self.args.window_bytes;
        ServerOptions {
            frame_bytes_max: self.args.frame_bytes,
            stream_window_bytes: window,
            connection_window_bytes: window.saturating_mul(2).min((1 << 31) - 1),
            drain_timeout: Duration::from_secs(1),
            ..ServerOptions::default()
        }
    }

    /// For clients over `shm`, or over `tcp` with so many connections, or else over `grpc`.
    fn grpc_options(&self, shm: bool, tcp_connections_max: usize) -> GrpcOptions {
        let server = self.server_options();
        GrpcOptions {
            frame_bytes_max: server.frame_bytes_max,
            stream_window_bytes: server.stream_window_bytes,
            connection_window_bytes: server.connection_window_bytes,
            tile_connections: self.args.connections as usize,
            shm_arena_bytes: if shm { GrpcOptions::default().shm_arena_bytes } else { 0 },
            tcp_connections_max,
            ..GrpcOptions::default()
        }
    }

    /// Arguments of the child that serves this.
    fn arguments(&self) -> Vec<String> {
        let end = match self.end {
            StoreEnd::Slab => "slab",
            StoreEnd::Store => "store",
        };
        let mut all = vec!["bench".to_owned(), "store".to_owned(), "--child".to_owned()];
        let flags = [
            ("--ends", end.to_owned()),
            ("--tile-bytes", self.shape.bytes().to_string()),
            ("--layers", self.layers.to_string()),
            ("--concurrency", self.shards.to_string()),
            ("--frame-bytes", self.args.frame_bytes.to_string()),
            ("--window-bytes", self.args.window_bytes.to_string()),
            // All that a shard needs to know of lanes.
            ("--lanes", if self.args.lanes.contains(&StoreLane::Nccl) { "nccl" } else { "grpc" }.to_owned()),
        ];
        let folders = self.args.library_path.iter().map(|folder| folder.display().to_string());
        all.extend(folders.flat_map(|folder| ["--library-path".to_owned(), folder]));
        all.extend(flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
        all.extend(self.args.unverified.then(|| "--unverified".to_owned()));
        all
    }
}

/// Where one shard is reached.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Addresses {
    grpc: String,
    stock: String,
    /// Why the shard has no lane `nccl`, where it has none.
    no_nccl: Option<String>,
}

/// Shards of this process with what keeps them going.
#[derive(Debug)]
struct Hosts {
    tasks: Tasks,
    shards: Vec<Arc<dyn Shard>>,
    addresses: Vec<Addresses>,
    _epoch: watch::Sender<u64>,
}

impl Hosts {
    async fn start(plan: &Plan) -> Result<Self> {
        let tasks = Tasks::new();
        let (epoch, epochs) = watch::channel(0);
        let (mut shards, mut addresses) = (Vec::new(), Vec::new());
        let lanes = gpu::lanes(&plan.args, Side::Shard).await;
        for index in 0..plan.shards {
            let shard = shard(plan, index, &epochs, &tasks)?;
            addresses.push(listen(plan, &shard, &lanes, &tasks).await?);
            shards.push(shard);
        }
        Ok(Self { tasks, shards, addresses, _epoch: epoch })
    }
}

fn shard(plan: &Plan, index: usize, epochs: &watch::Receiver<u64>, tasks: &Tasks) -> Result<Arc<dyn Shard>> {
    if plan.end == StoreEnd::Slab {
        let source = Arc::new(Source::new(plan.shape, SLAB_SOURCE_BYTES));
        return Ok(Arc::new(SlabShard::new(source, plan.layers, !plan.args.unverified)));
    }
    // One tenant, who may have all of it.
    let config =
        Config { capacity_bytes: CAPACITY_BYTES, retention_ms: 0, tenant_percent: 100, ..Config::default() };
    let identity = ShardIdentity {
        shard_id: ShardId(format!("kv-{index}")),
        deployment: deployment(),
        epoch: epochs.clone(),
        geometry: Geometry::new(BLOCK_TOKENS as u32, 32)?,
        tile_shape: plan.shape,
        layers: plan.layers,
    };
    Ok(KvStore::new(config, identity, &ComputePool::serial(), tasks, &Metrics::new())?)
}

async fn listen(plan: &Plan, shard: &Arc<dyn Shard>, lanes: &Lanes, tasks: &Tasks) -> Result<Addresses> {
    let bind = || TcpListener::bind("127.0.0.1:0");
    let (ours, stock) = (bind().await?, bind().await?);
    let url = |listener: &TcpListener| anyhow::Ok(format!("http://{}", listener.local_addr()?));
    let no_nccl = lanes.as_ref().err().cloned();
    let addresses = Addresses { grpc: url(&ours)?, stock: url(&stock)?, no_nccl };
    // As many ends as streams, and as many again for those whose epoch broke.
    let nccl_members_max = 2 * 2 * STREAMS_MAX;
    let options =
        ServerOptions { nccl: lanes.as_ref().ok().cloned(), nccl_members_max, ..plan.server_options() };
    let services = Services::new(options).shard(Arc::clone(shard));
    tasks.spawn_critical("grpc", serve(ours, services, tasks.token()));
    tasks.spawn_critical("stock", baseline::serve(stock, Arc::clone(shard), tasks.token()));
    Ok(addresses)
}

/// Serves until standard input ends.
pub(super) async fn serve_child(args: &BenchStoreArgs) -> Result<()> {
    let (&bytes, &end) = args.tile_bytes.first().zip(args.ends.first()).context("a child serves one end")?;
    let shape =
        if bytes == super::lookup::TILE_BYTES { super::lookup::shape() } else { super::shape(bytes)? };
    let shards = args.concurrency.first().map_or(1, |&count| count as usize);
    let hosts = Hosts::start(&Plan { shards, ..Plan::new(args, shape, end) }).await?;
    console::say(serde_json::to_string(&hosts.addresses).context("addresses are JSON")?);
    let ended = tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
    ended.await?.context("cannot wait for standard input")?;
    hosts.tasks.drain(Duration::from_secs(5)).await;
    Ok(())
}

/// What a lane leads to.
#[derive(Debug)]
pub(super) enum Reached {
    Shard(Arc<dyn Shard>),
    /// The lane does not cross processes.
    Nowhere,
    /// The lane cannot be had here, and why.
    NotRun(String),
}

/// Shards and the ways to them.
#[derive(Debug)]
pub(super) struct Place {
    hosts: Option<Hosts>,
    child: Option<Child>,
    addresses: Vec<Addresses>,
    local: LocalConnector,
    ways: Ways,
}

/// Clients of processes, by lane.
#[derive(Debug)]
struct Ways {
    grpc: GrpcConnector,
    shm: GrpcConnector,
    tcp: GrpcConnector,
    nccl: Result<GrpcConnector, String>,
}

impl Ways {
    async fn new(plan: &Plan) -> Self {
        let over = |shm, tcp| GrpcConnector::new(plan.grpc_options(shm, tcp));
        let nccl = gpu::lanes(&plan.args, Side::Client).await.map(|lanes| {
            let (nccl, nccl_ends_max) = (Some(lanes), STREAMS_MAX);
            GrpcConnector::new(GrpcOptions { nccl, nccl_ends_max, ..plan.grpc_options(false, 0) })
        });
        Self { grpc: over(false, 0), shm: over(true, 0), tcp: over(false, STREAMS_MAX), nccl }
    }
}

impl Place {
    /// Shards in this process.
    pub(super) async fn here(plan: &Plan) -> Result<Self> {
        let hosts = Hosts::start(plan).await?;
        let local = LocalConnector::new();
        for (index, shard) in hosts.shards.iter().enumerate() {
            local.add_shard(index.to_string(), Arc::clone(shard));
        }
        let addresses = hosts.addresses.clone();
        let ways = Ways::new(plan).await;
        Ok(Self { hosts: Some(hosts), child: None, addresses, local, ways })
    }

    /// Shards in a child of this process.
    pub(super) async fn child(plan: &Plan) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut command = Command::new(program);
        command.args(plan.arguments()).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().context("cannot start a process for the shard")?;
        let output = child.stdout.take().context("its output was asked for")?;
        let mut line = String::new();
        let reading = async { BufReader::new(output).read_line(&mut line).await };
        tokio::time::timeout(CHILD_PATIENCE, reading)
            .await
            .context("the shard's process did not start")??;
        let addresses: Vec<Addresses> =
            serde_json::from_str(&line).with_context(|| format!("the shard's process said `{line}`"))?;
        let (local, ways) = (LocalConnector::new(), Ways::new(plan).await);
        Ok(Self { hosts: None, child: Some(child), addresses, local, ways })
    }

    /// The first shard over a lane.
    pub(super) async fn shard(&self, lane: StoreLane) -> Result<Reached> {
        if self.child.is_some() && !crosses(lane) {
            return Ok(Reached::Nowhere);
        }
        let addresses = self.addresses.first().context("there is a shard")?;
        Ok(Reached::Shard(match lane {
            StoreLane::Local => self.local.shard("local:0")?,
            StoreLane::Grpc => self.ways.grpc.shard(&addresses.grpc)?,
            StoreLane::Tcp => self.ways.tcp.tcp_shard(&addresses.grpc)?,
            StoreLane::Stock => baseline::shard(&addresses.stock)?,
            StoreLane::Shm => self.shm_shard(&addresses.grpc).await?,
            StoreLane::Nccl => return self.nccl_shard(addresses).await,
        }))
    }

    async fn nccl_shard(&self, addresses: &Addresses) -> Result<Reached> {
        let not_run = |side: &str, why: &dyn std::fmt::Display| Ok(Reached::NotRun(format!("{side}: {why}")));
        let connector = match (&self.ways.nccl, &addresses.no_nccl) {
            (Err(why), _) => return not_run("the clients have no such lane", why),
            (_, Some(why)) => return not_run("the shard has no such lane", why),
            (Ok(connector), None) => connector,
        };
        let shard = connector.nccl_shard(&addresses.grpc)?;
        match gpu::works(&shard).await {
            Ok(()) => Ok(Reached::Shard(shard)),
            Err(error) => not_run("it does not work", &error),
        }
    }

    /// The shard's task opens its sockets some time after it was spawned.
    async fn shm_shard(&self, address: &str) -> Result<Arc<dyn Shard>> {
        let started = Instant::now();
        loop {
            match self.ways.shm.shm_shard(address).await {
                Err(_) if started.elapsed() < LISTEN_PATIENCE => tokio::time::sleep(LISTEN_PAUSE).await,
                found => return Ok(found?),
            }
        }
    }

    /// All shards over gRPC.
    pub(super) fn shards(&self) -> Result<Vec<Arc<dyn Shard>>> {
        self.addresses.iter().map(|addresses| Ok(self.ways.grpc.shard(&addresses.grpc)?)).collect()
    }

    /// Seconds of processor time of all processes so far.
    pub(super) fn usage(&self) -> f64 {
        let child = self.child.as_ref().and_then(Child::id).map_or(0.0, usage::cpu_seconds);
        usage::cpu_seconds(std::process::id()) + child
    }

    /// Ends what was started.
    pub(super) async fn end(self) -> Result<()> {
        if let Some(hosts) = self.hosts {
            hosts.tasks.drain(Duration::from_secs(5)).await;
        }
        let Some(mut child) = self.child else { return Ok(()) };
        drop(child.stdin.take());
        let status = tokio::time::timeout(CHILD_PATIENCE, child.wait()).await;
        let status = status.context("the shard's process did not end")??;
        if !status.success() {
            bail!("the shard's process failed: {status}");
        }
        Ok(())
    }
}
