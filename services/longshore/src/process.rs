//! What a process says of itself, and its way from start to drain.

use std::{
    io::IsTerminal,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use async_trait::async_trait;
use longshore_chassis::{
    Admin, LogCounters, Metrics, Readiness, Reserved, Signals, Sources, Tasks,
    config::{Descriptions, Setting, render_described},
    load, render, telemetry,
};
use longshore_cluster::{ClusterView, Member, Role};
use longshore_compute::ComputePool;
use longshore_engine::Engine;
use longshore_fabric::{CallContext, Describer, Error};
use longshore_proto::types::{self, Describe, ModelDescription};
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::watch;

use crate::{cli::ServeArgs, config::Config, console, device};

/// Where the configuration of this process comes from.
pub(crate) fn sources(serve: &ServeArgs, sets: Vec<Setting>) -> Sources {
    Sources::from_process(serve.config.clone(), sets)
        .reserve("LONGSHORE_URL")
        .reserve("LONGSHORE_TEST_PYTHON")
}

/// Reads the configuration, and looks for the GPU if it asks for one. `None`: it was only to be printed.
pub(crate) fn configuration(serve: &ServeArgs, sets: Vec<Setting>) -> Result<Option<Config>> {
    let mut config = settings(serve, sets)?;
    if let Some(config) = &mut config {
        device::resolve(config)?;
    }
    Ok(config)
}

/// Reads the configuration of a command that finds its device itself. `None`: it was only to be printed.
pub(crate) fn settings(serve: &ServeArgs, sets: Vec<Setting>) -> Result<Option<Config>> {
    let config: Config = load(&sources(serve, sets))?;
    if serve.print_config {
        console::say(render_described(&config, &Descriptions::of::<Config>()).trim_end());
        return Ok(None);
    }
    Ok(Some(config))
}

/// Whether the configuration was only to be checked; says so when it was. Called once everything that can be checked was.
pub(crate) fn only_checked(serve: &ServeArgs) -> bool {
    if serve.check_config {
        console::say("the configuration is valid");
    }
    serve.check_config
}

/// Logs and the compute pool; once per process, before anything computes.
pub(crate) fn prepare(config: &Config) -> Result<(Metrics, Arc<ComputePool>)> {
    let counters: LogCounters = telemetry(&config.telemetry).context("cannot set up logs")?;
    let metrics = Metrics::new();
    counters.register(&metrics);
    metrics.register_build(env!("CARGO_PKG_VERSION"));
    Ok((metrics, compute_pool(config)?))
}

/// Tells what the weights take in memory.
pub(crate) fn report_weights(metrics: &Metrics, engine: &Engine) {
    let gauge: Gauge = Gauge::default();
    gauge.set(i64::try_from(engine.backend().memory_bytes()).unwrap_or(i64::MAX));
    let help = "Bytes of the model's weights as they lie in memory";
    metrics.sub("longshore_model").register("packed_bytes", help, gauge);
}

/// The one compute pool of this process.
pub(crate) fn compute_pool(config: &Config) -> Result<Arc<ComputePool>> {
    ComputePool::new(&config.compute.pool_options()).context("cannot set up the compute threads (`compute`)")
}

/// Keeps an address for a listener that comes once the model is loaded, so that a port that is taken is told before. `None`: nothing is
/// to listen.
pub(crate) async fn reserved(field: &str, address: &str) -> Result<Option<Reserved>> {
    if address.is_empty() {
        return Ok(None);
    }
    let reserved = longshore_chassis::reserve(address).await.with_context(|| format!("`{field}`"))?;
    Ok(Some(reserved))
}

/// Serves health, metrics and configuration when an address is configured. It is not ready until the model is, nor after
/// `root` is cancelled; `outer` outlives the drain, so that probes see it.
pub(crate) async fn admin(
    config: &Config,
    metrics: &Metrics,
    root: &Tasks,
    outer: &Tasks,
) -> Result<Readiness> {
    let readiness = Readiness::new(root.token());
    readiness.wait_for("model", "loads");
    if !config.listen.admin.is_empty() {
        let (listener, address) =
            longshore_chassis::bind(&config.listen.admin).await.context("`listen.admin`")?;
        tracing::info!(%address, "admin listens");
        Admin { readiness: readiness.clone(), metrics: metrics.clone(), config: render(config) }
            .serve(listener, outer);
    }
    Ok(readiness)
}

/// Nanoseconds since 1970: tells one start of a process from another.
pub(crate) fn incarnation() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// How a shard ends that a supervisor started and that was drained: it is not to be started again, however soon it was stopped.
#[derive(Debug, thiserror::Error)]
#[error("the shard was drained")]
pub(crate) struct Drained;

impl Drained {
    /// Status of the process.
    pub(crate) const STATUS: u8 = 10;
}

/// Waits for a signal or a failed critical task, then drains the scopes in order: the front door before what it needs.
/// `before` is told the index of each scope just before its turn. Probes are told first.
pub(crate) async fn until_drained(
    scopes: &[Tasks],
    before: impl Fn(usize),
    (root, readiness): (&Tasks, &Readiness),
    signals: &mut Signals,
    deadline: Duration,
    supervised: bool,
) -> Result<()> {
    tokio::select! {
        signal = signals.next() => told(format_args!("{signal}: draining; once more ends at once"), supervised),
        () = root.cancelled() => {}
    }
    readiness.wait_for("process", "ends");
    let drain = async {
        for (index, scope) in scopes.iter().enumerate() {
            before(index);
            scope.cancel();
            let left = scope.drain(deadline).await;
            if !left.is_empty() {
                tracing::warn!(tasks = ?left, "did not end in time");
            }
        }
    };
    tokio::select! {
        () = drain => {}
        signal = signals.next() => told(format_args!("{signal}: ended without draining"), supervised),
    }
    root.cancel();
    match root.failure() {
        Some(failure) => Err(anyhow::anyhow!("{failure}")),
        None => Ok(()),
    }
}

/// Waits for a part of the start that may take minutes. `None`: a signal came first, which ends the process at once, since it has nothing to
/// drain.
pub(crate) async fn unless_signalled<T>(
    signals: &mut Signals,
    supervised: bool,
    work: impl Future<Output = Result<T>>,
) -> Result<Option<T>> {
    tokio::select! {
        done = work => done.map(Some),
        signal = signals.next() => {
            told(format_args!("{signal}: ended before it served"), supervised);
            Ok(None)
        }
    }
}

/// Says it to a person at a terminal; a supervised process has its supervisor say it once for all.
fn told(what: std::fmt::Arguments<'_>, supervised: bool) {
    if supervised {
        tracing::debug!("{what}");
    } else if std::io::stderr().is_terminal() {
        console::note(what.to_string());
    } else {
        tracing::info!("{what}");
    }
}

/// Answers `Describe` for a process that is no router.
#[derive(Debug)]
pub(crate) struct Process {
    /// This process.
    pub(crate) this: Member,
    /// The cluster.
    pub(crate) views: watch::Receiver<Arc<ClusterView>>,
    /// What it serves.
    pub(crate) model: ModelDescription,
}

#[async_trait]
impl Describer for Process {
    async fn describe(&self, _ctx: &CallContext) -> Result<Describe, Error> {
        let view = Arc::clone(&self.views.borrow());
        Ok(Describe {
            this: wire(&self.this),
            members: view.members().iter().map(wire).collect(),
            epoch: view.epoch(),
            models: vec![self.model.clone()],
            version: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }
}

fn wire(member: &Member) -> types::Member {
    types::Member {
        id: member.id.clone(),
        role: match member.role {
            Role::Router => types::Role::Router,
            Role::Prefill => types::Role::Prefill,
            Role::Decode => types::Role::Decode,
            Role::KvStore => types::Role::KvStore,
        },
        address: member.address.clone(),
        incarnation: member.incarnation,
        weight: member.weight,
        // A process without probes knows only that they are configured.
        healthy: true,
        host: member.labels.host.clone(),
        zone: member.labels.zone.clone(),
    }
}
