//! One role in one process: `longshore router|prefill|decode|kvstore`.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use longshore_chassis::{Signals, Tasks, bind};
use longshore_cluster::{Labels, Member, Membership, Role, StaticMembership};
use longshore_engine::Engine;
use longshore_fabric::{CallContext, GrpcConnector, GrpcOptions, Shard as _};
use longshore_kvstore::KvStore;

use crate::{
    cli::RoleArgs,
    config::Config,
    console, cuda,
    device::{self, Choice},
    members,
    node::Node,
    process, ready,
    wiring::Parts,
};

/// Runs until a signal, then drains.
pub(crate) async fn run(role: Role, args: RoleArgs) -> Result<()> {
    let Some(mut config) = process::settings(&args.serve, args.settings())? else { return Ok(()) };
    let attends_on = shard_device(role, &mut config)?;
    let (this, membership) = membership(role, &args, &mut config)?;
    if role == Role::KvStore {
        config.drain.check_save(&config.kvstore.disk)?;
        // Only those who choose or follow policies read the plan; machines of shards need not have the file.
        config.model.head_plan.clear();
    }
    config.listen.check_distinct(role == Role::Router)?;
    if process::only_checked(&args.serve) {
        return Ok(());
    }
    if args.supervised {
        end_with_parent()?;
    }
    let (metrics, pool) = process::prepare(&config)?;
    let mut signals = Signals::install().context("cannot watch for signals")?;
    let _grpc = process::reserved("listen.grpc", &config.listen.grpc).await?;
    let _http = match role {
        Role::Router => process::reserved("listen.http", &config.listen.http).await?,
        _ => None,
    };
    let views = membership.watch();
    let _registration = membership.register(this.clone()).await.context("cannot join the cluster")?;
    let (root, outer) = (Tasks::new(), Tasks::new());
    members::follow(&config.cluster, &this, &membership, &root);
    let readiness = process::admin(&config, &metrics, &root, &outer).await?;
    let (for_node, for_engine) = (config.clone(), Arc::clone(&pool));
    // Routers and shards need the model's shape and digest only.
    let loading = blocking(move || match role {
        Role::Prefill | Role::Decode => {
            Node::load(&for_node, &for_engine).map(|(node, engine)| (node, Some(engine), None))
        }
        Role::KvStore => Node::open_shard(&for_node, attends_on, &for_engine)
            .map(|(node, executor)| (node, None, Some(executor))),
        Role::Router => Node::open(&for_node).map(|node| (node, None, None)),
    });
    let loaded = process::unless_signalled(&mut signals, args.supervised, loading).await?;
    let Some((node, engine, executor)) = loaded else { return Ok(()) };
    if let Some(engine) = &engine {
        process::report_weights(&metrics, engine);
    }
    cuda::report(&metrics, &node);
    let gpu_lanes = cuda::lanes(&config, &node);
    let options = GrpcOptions { nccl: gpu_lanes.clone(), ..GrpcOptions::default() };
    let connector = Arc::new(GrpcConnector::new(options));
    let deadline = Duration::from_millis(config.drain.deadline_ms);
    let parts = Parts { config, node, views, connector, metrics, pool, executor, gpu_lanes };
    let scope = root.child();
    let Served { http, store } = start(&this, &parts, engine, &scope).await?;
    if !args.supervised {
        announce(role, &this, &parts, &http);
    }
    readiness.ready("model");
    process::until_drained(&[scope], |_| (), (&root, &readiness), &mut signals, deadline, args.supervised)
        .await?;
    outer.drain(Duration::from_secs(1)).await;
    if args.supervised && is_drained(store.as_deref()).await {
        bail!(process::Drained);
    }
    Ok(())
}

/// Finds the device of the role; what a shard attends on, the CPU for all others.
fn shard_device(role: Role, config: &mut Config) -> Result<Choice> {
    match role {
        Role::KvStore => return device::of_shard(config),
        Role::Prefill | Role::Decode => device::resolve(config)?,
        Role::Router => device::of_others(config)?,
    }
    Ok(Choice::Cpu)
}

/// Whether the shard of this process, if it has one, was drained.
async fn is_drained(store: Option<&KvStore>) -> bool {
    let Some(store) = store else { return false };
    let stats = store.stats(&CallContext::new("end")).await;
    stats.is_ok_and(|stats| stats.drain.drained)
}

/// What a role serves.
#[derive(Default)]
struct Served {
    /// The bound HTTP address, empty where there is none.
    http: String,
    store: Option<Arc<KvStore>>,
}

/// Starts the role's service and its listeners.
async fn start(this: &Member, parts: &Parts, engine: Option<Arc<Engine>>, tasks: &Tasks) -> Result<Served> {
    let engine = || engine.context("a worker needs an engine");
    let mut served = Served::default();
    let describer = parts.describer(this);
    match this.role {
        Role::KvStore => {
            let store = parts.kvstore(this, tasks)?;
            served.store = Some(Arc::clone(&store));
            let (listener, _) = bind(&parts.config.listen.grpc).await?;
            parts.serve_grpc(
                listener,
                |s| longshore_kvstore::grpc::serve(s, store).describer(describer),
                tasks,
            );
        }
        Role::Prefill => {
            let worker = parts.prefill(this, engine()?, tasks);
            let (listener, _) = bind(&parts.config.listen.grpc).await?;
            parts.serve_grpc(
                listener,
                |s| longshore_prefill::grpc::serve(s, worker).describer(describer),
                tasks,
            );
        }
        Role::Decode => {
            let worker = parts.decode(this, engine()?, tasks);
            let (listener, _) = bind(&parts.config.listen.grpc).await?;
            parts.serve_grpc(
                listener,
                |s| longshore_decode::grpc::serve(s, worker).describer(describer),
                tasks,
            );
        }
        Role::Router => {
            let router = parts.router(this, tasks)?;
            let (listener, _) = bind(&parts.config.listen.grpc).await?;
            parts.serve_front(listener, &router, tasks);
            served.http = parts.serve_http(&router, tasks).await?;
        }
    }
    tracing::info!(id = %this.id, role = this.role.as_str(), listen = %parts.config.listen.grpc, "serving");
    Ok(served)
}

/// Ready lines of a process that was started by hand.
fn announce(role: Role, this: &Member, parts: &Parts, http: &str) {
    let grpc = &parts.config.listen.grpc;
    if role == Role::Router {
        return ready::announce(&parts.node.describe_model(), http, grpc, &[]);
    }
    console::say(format!(
        "ready; {} `{}` of {} serves at {}",
        role.as_str(),
        this.id,
        parts.node.name,
        ready::loopback_url(grpc)
    ));
}

/// Runs long work off the reactor.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.context("a worker thread panicked")?
}

/// This process and the cluster as the configuration tells them.
fn membership(role: Role, args: &RoleArgs, config: &mut Config) -> Result<(Member, StaticMembership)> {
    let name = role.as_str();
    if config.cluster.id.is_empty() {
        config.cluster.id = format!("{name}-0");
    }
    let mut members = members::listed(&config.cluster)?;
    let known = members.iter().find(|member| member.id == config.cluster.id).cloned();
    if let Some(known) = &known {
        ensure!(
            known.role == role,
            "`--id {}` is a {} in the member list, not a {name}",
            known.id,
            known.role.as_str()
        );
        // A listed member listens where the others look for it, unless told otherwise.
        if args.listen.is_none() && role != Role::Router {
            config.listen.grpc = known.address.trim_start_matches("http://").to_owned();
        }
    }
    ensure!(
        known.is_some() || role == Role::Router,
        "`--id {}` is not in the member list; hint: add `--member {name}={}@http://HOST:PORT` to every process",
        config.cluster.id,
        config.cluster.id
    );
    for needed in [Role::KvStore, Role::Prefill, Role::Decode] {
        ensure!(
            role != Role::Router || members.iter().any(|member| member.role == needed),
            "`cluster.members` lists no {0}; hint: add `--member {0}=ID@http://HOST:PORT`",
            needed.as_str()
        );
    }
    ensure!(!config.listen.grpc.is_empty(), "`listen.grpc` is empty; hint: pass `--listen 127.0.0.1:9000`");
    let this = known.unwrap_or_else(|| {
        // Nobody calls a router by its membership, so it need not be listed.
        let address = ready::loopback_url(&config.listen.grpc);
        let (id, labels) = (config.cluster.id.clone(), Labels::default());
        let this = Member { id, role, address, incarnation: 0, weight: 0, labels };
        members.push(this.clone());
        this
    });
    let this = Member { incarnation: process::incarnation(), ..this };
    let membership = StaticMembership::new(members).context("`cluster.members`")?;
    match config.store.check_listed(&membership.view().shard_map()) {
        // Others may still be written into the file.
        Err(error) if !config.cluster.members_file.is_empty() => {
            console::note(format!("{error}; until then there are fewer copies"));
        }
        checked => checked?,
    }
    Ok((this, membership))
}

/// Ends this process when the one that started it ends, however that happens.
fn end_with_parent() -> Result<()> {
    let signal = Some(rustix::process::Signal::TERM);
    rustix::process::set_parent_process_death_signal(signal).context("cannot follow the parent process")
}
