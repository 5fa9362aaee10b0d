//! `longshore up`: all roles, in one process (`local` lanes) or as processes (`grpc` lanes).

mod processes;
mod supervisor;

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use longshore_chassis::{Signals, Tasks, bind};
use longshore_cluster::{Labels, Member, Membership, MemoryMembership, Registration, Role};
use longshore_engine::Engine;
use longshore_fabric::{AnyConnector, GrpcConnector, GrpcOptions, LocalConnector};

use crate::{cli::UpArgs, cuda, node::Node, process, ready, role::blocking, wiring::Parts};

/// Runs until Ctrl-C or SIGTERM, then drains.
pub(crate) async fn up(args: UpArgs) -> Result<()> {
    let Some(config) = process::configuration(&args.serve, args.settings())? else { return Ok(()) };
    config.store.check_started(args.shards.into())?;
    config.drain.check_save(&config.kvstore.disk)?;
    config.listen.check_distinct(true)?;
    ensure!(
        args.disk_bytes.is_none() || !config.kvstore.disk.path.is_empty(),
        "`--disk-bytes` is given and no folder; hint: pass `--disk DIR`, or set `kvstore.disk.path`"
    );
    if args.processes {
        processes::check(&config)?;
    }
    if process::only_checked(&args.serve) {
        return Ok(());
    }
    if args.processes {
        return processes::run(&args, config).await;
    }
    let (metrics, pool) = process::prepare(&config)?;
    let mut signals = Signals::install().context("cannot watch for signals")?;
    let grpc = match config.listen.grpc.as_str() {
        "" => None,
        address => Some(bind(address).await.context("`listen.grpc`")?),
    };
    let _http = process::reserved("listen.http", &config.listen.http).await?;
    let (root, outer) = (Tasks::new(), Tasks::new());
    let readiness = process::admin(&config, &metrics, &root, &outer).await?;
    let (for_node, for_engine) = (config.clone(), Arc::clone(&pool));
    let loading = blocking(move || Node::load(&for_node, &for_engine));
    let Some((node, engine)) = process::unless_signalled(&mut signals, false, loading).await? else {
        return Ok(());
    };
    process::report_weights(&metrics, &engine);
    cuda::report(&metrics, &node);
    let membership = MemoryMembership::new();
    let local = LocalConnector::new();
    let connector = Arc::new(AnyConnector::new(local.clone(), GrpcConnector::new(GrpcOptions::default())));
    let deadline = Duration::from_millis(config.drain.deadline_ms);
    // Shards and workers share the executor, and with it the budget of copies of tiles on a GPU.
    let executor = Some(Arc::clone(engine.executor()));
    // All shards are in this process.
    let gpu_lanes = None;
    let views = membership.watch();
    let parts = Parts { config, node, views, connector, metrics, pool, executor, gpu_lanes };
    let house =
        House { parts, local, membership, front: root.child(), workers: root.child(), shards: root.child() };
    let registrations = house.furnish(&args, &engine).await?;
    let router = house.parts.router(&member(Role::Router, 0), &house.front)?;
    let address = grpc.as_ref().map_or_else(String::new, |(_, address)| address.to_string());
    if let Some((listener, _)) = grpc {
        house.parts.serve_front(listener, &router, &house.front);
    }
    let http = house.parts.serve_http(&router, &house.front).await?;
    readiness.ready("model");
    ready::announce(&house.parts.node.describe_model(), &http, &address, &[]);
    // The front door first, so that streams finish while their workers still live; shards last.
    let scopes = [house.front.clone(), house.workers.clone(), house.shards.clone()];
    // Workers hold links to shards through the same registry that holds the workers: taken out of it, they end, and
    // with them their attention streams.
    let before = |stage| {
        let workers = registrations.iter().filter(|r| stage > 0 && r.member().role != Role::KvStore);
        workers.for_each(|worker| house.local.remove(&worker.member().id));
    };
    process::until_drained(&scopes, before, (&root, &readiness), &mut signals, deadline, false).await?;
    outer.drain(Duration::from_secs(1)).await;
    Ok(())
}

/// All roles of one process.
struct House {
    parts: Parts,
    local: LocalConnector,
    membership: MemoryMembership,
    front: Tasks,
    workers: Tasks,
    shards: Tasks,
}

fn member(role: Role, index: u16) -> Member {
    let id = match role {
        Role::KvStore => format!("kv-{index}"),
        other => format!("{}-{index}", other.as_str()),
    };
    let weight = u32::from(role == Role::KvStore);
    let labels = Labels::default();
    Member { address: format!("local:{id}"), id, role, incarnation: process::incarnation(), weight, labels }
}

impl House {
    /// Starts shards and workers and lets them join; shards first, so that the map is whole before anybody works.
    async fn furnish(&self, args: &UpArgs, engine: &Arc<Engine>) -> Result<Vec<Registration>> {
        let mut registrations = Vec::new();
        for (role, count) in
            [(Role::KvStore, args.shards), (Role::Prefill, args.prefill), (Role::Decode, args.decode)]
        {
            for index in 0..count {
                let this = member(role, index);
                self.start(&this, engine)?;
                self.local.add_describer(this.id.clone(), self.parts.describer(&this));
                registrations.push(self.membership.register(this).await.context("cannot join the cluster")?);
            }
        }
        Ok(registrations)
    }

    fn start(&self, this: &Member, engine: &Arc<Engine>) -> Result<()> {
        let id = this.id.clone();
        match this.role {
            Role::KvStore => self.local.add_shard(id, self.parts.kvstore(this, &self.shards)?),
            Role::Prefill => {
                self.local.add_prefiller(id, self.parts.prefill(this, Arc::clone(engine), &self.workers))
            }
            Role::Decode => {
                self.local.add_decoder(id, self.parts.decode(this, Arc::clone(engine), &self.workers))
            }
            Role::Router => {}
        }
        Ok(())
    }
}
