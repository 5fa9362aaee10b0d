//! Builds services out of their parts. The same functions serve one process with all roles and a process with one.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result};
use longshore_attention::Executor;
use longshore_blocks::ShardId;
use longshore_chassis::{Metrics, Tasks};
use longshore_cluster::{ClusterView, Member};
use longshore_compute::ComputePool;
use longshore_decode::DecodeWorker;
use longshore_engine::{Engine, ShardDirectory, WorkerParts};
use longshore_fabric::{
    Connector,
    nccl::GpuLanes,
    server::{ServerOptions, Services, serve},
};
use longshore_kvstore::KvStore;
use longshore_prefill::PrefillWorker;
use longshore_router::Router;
use tokio::{net::TcpListener, sync::watch};

use crate::{config::Config, node::Node, process, reads};

/// Least time for a reader that takes nothing, whatever `kvstore.stall_ms` is: it is its connection that is closed.
const UNREAD_MIN: Duration = Duration::from_secs(10);

/// What services of one process share.
#[derive(Debug, Clone)]
pub(crate) struct Parts {
    /// Settings.
    pub(crate) config: Config,
    /// Model and shapes.
    pub(crate) node: Node,
    /// The cluster.
    pub(crate) views: watch::Receiver<Arc<ClusterView>>,
    /// Clients of the others.
    pub(crate) connector: Arc<dyn Connector>,
    /// Counters.
    pub(crate) metrics: Metrics,
    /// The compute threads of this process.
    pub(crate) pool: Arc<ComputePool>,
    /// What shards of this process answer attention with; a router has none.
    pub(crate) executor: Option<Arc<dyn Executor>>,
    /// Ends of the lane `nccl`, where this process can have some.
    pub(crate) gpu_lanes: Option<Arc<dyn GpuLanes>>,
}

/// Attention queries under way per shard and process.
const ATTEND_IN_FLIGHT_MAX: usize = 64;

impl Parts {
    /// A shard.
    pub(crate) fn kvstore(&self, this: &Member, tasks: &Tasks) -> Result<Arc<KvStore>> {
        let identity = longshore_kvstore::ShardIdentity {
            shard_id: ShardId(this.id.clone()),
            deployment: self.node.deployment,
            epoch: longshore_kvstore::epochs(self.views.clone(), tasks),
            geometry: self.node.geometry,
            tile_shape: self.node.tile_shape,
            layers: self.node.info.config.layers as u32,
        };
        let config = self.config.kvstore.clone();
        let executor = self.executor.clone().context("a shard needs an executor")?;
        let compute = longshore_kvstore::ShardCompute { pool: Arc::clone(&self.pool), executor };
        let shard = KvStore::new(config, identity, compute, tasks, &self.labelled(this))
            .context("cannot set up the shard")?;
        shard.join(longshore_kvstore::Cluster {
            views: self.views.clone(),
            connector: Arc::clone(&self.connector),
            rule: self.config.store.rule(),
        });
        shard.save_at_stop();
        Ok(shard)
    }

    /// A prefill worker.
    pub(crate) fn prefill(&self, this: &Member, engine: Arc<Engine>, tasks: &Tasks) -> Arc<PrefillWorker> {
        let metrics = longshore_prefill::PrefillMetrics::register(&self.labelled(this));
        let (config, head_plan) = (self.config.prefill.clone(), self.node.head_plan.clone());
        PrefillWorker::new(config, self.worker(this, engine, tasks), head_plan, tasks, metrics)
    }

    /// A decode worker.
    pub(crate) fn decode(&self, this: &Member, engine: Arc<Engine>, tasks: &Tasks) -> Arc<DecodeWorker> {
        let metrics = longshore_decode::DecodeMetrics::register(&self.labelled(this));
        let (config, head_plan) = (self.config.decode.clone(), self.node.head_plan.clone());
        DecodeWorker::new(config, self.worker(this, engine, tasks), head_plan, tasks, metrics)
    }

    fn worker(&self, this: &Member, engine: Arc<Engine>, tasks: &Tasks) -> WorkerParts {
        let tracker = tasks.tracker().clone();
        let shards = ShardDirectory::new(
            self.views.clone(),
            Arc::clone(&self.connector),
            tracker,
            ATTEND_IN_FLIGHT_MAX,
        );
        let shards = shards.with_copies(self.config.store.rule()).of_member(&this.id);
        reads::report(&self.labelled(this), shards.reads());
        WorkerParts { engine, shards: Arc::new(shards), limits: self.node.limits() }
    }

    /// The front door.
    pub(crate) fn router(&self, this: &Member, tasks: &Tasks) -> Result<Router> {
        Ok(Router::new(longshore_router::Parts {
            config: longshore_router::Config {
                copies: self.config.store.copies as u32,
                ..self.config.router.clone()
            },
            this: this.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            model_name: self.node.name.clone(),
            model: Arc::clone(&self.node.info),
            deployment: self.node.deployment,
            policies: self.node.policies(&self.config)?,
            geometry: self.node.geometry,
            tile_shape: self.node.wire_tile_shape(),
            max_context_tokens: self.node.context_tokens,
            cluster: self.views.clone(),
            connector: Arc::clone(&self.connector),
            tasks: tasks.clone(),
            metrics: longshore_router::RouterMetrics::register(&self.labelled(this)),
            nonce: process::incarnation(),
        }))
    }

    /// Answers `Describe` for a process that is no router.
    pub(crate) fn describer(&self, this: &Member) -> Arc<process::Process> {
        Arc::new(process::Process {
            this: this.clone(),
            views: self.views.clone(),
            model: self.node.describe_model(),
        })
    }

    fn labelled(&self, this: &Member) -> Metrics {
        self.metrics.labelled("member", &this.id)
    }

    /// Serves gRPC between processes until `tasks` is cancelled and its calls ended.
    pub(crate) fn serve_grpc(
        &self,
        listener: TcpListener,
        add: impl FnOnce(Services) -> Services,
        tasks: &Tasks,
    ) {
        let stall = Duration::from_millis(self.config.kvstore.stall_ms);
        let options = ServerOptions {
            tcp_port: self.config.listen.tiles_port,
            nccl: self.gpu_lanes.clone(),
            // A reader that comes back in time finds out from the store why its stream ended.
            unread_patience: Some((stall * 2).max(UNREAD_MIN)),
            ..ServerOptions::default()
        };
        self.serve_with(options, listener, add, tasks);
    }

    /// Serves gRPC to clients, with smaller windows.
    pub(crate) fn serve_front(&self, listener: TcpListener, router: &Router, tasks: &Tasks) {
        let add = |services| longshore_router::grpc::serve_on(services, router);
        self.serve_with(ServerOptions::front(), listener, add, tasks);
    }

    fn serve_with(
        &self,
        options: ServerOptions,
        listener: TcpListener,
        add: impl FnOnce(Services) -> Services,
        tasks: &Tasks,
    ) {
        let drain_timeout = Duration::from_millis(self.config.drain.deadline_ms);
        let services = add(Services::new(ServerOptions { drain_timeout, ..options }));
        tasks.spawn_critical("grpc", serve(listener, services, tasks.token()));
    }

    /// Serves the OpenAI API when an address is configured; returns the bound address.
    pub(crate) async fn serve_http(&self, router: &Router, tasks: &Tasks) -> Result<String> {
        if self.config.listen.http.is_empty() {
            return Ok(String::new());
        }
        let (listener, address) =
            longshore_chassis::bind(&self.config.listen.http).await.context("`listen.http`")?;
        tasks.spawn("http", longshore_router::http::serve(listener, router.clone(), tasks.clone()));
        Ok(address.to_string())
    }
}
