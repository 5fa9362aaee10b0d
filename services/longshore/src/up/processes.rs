//! `longshore up --processes`: every role as a process over gRPC on loopback, the way a cluster runs.

use std::{net::TcpListener, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use longshore_chassis::{Signals, render};
use longshore_fabric::{CallContext, Connector, GrpcConnector, GrpcOptions};
use tokio::time::{Instant, sleep};

use super::supervisor::{Recipe, Supervised};
use crate::{
    cli::UpArgs, config::Config, console, model, model::ModelRef, node::Node, ready, role::blocking,
};

/// One process to be.
#[derive(Debug, Clone)]
struct Planned {
    role: &'static str,
    id: String,
    port: u16,
}

/// How long a process may take from its start to its first answer; loading a large model takes minutes.
const READY_WITHIN: Duration = Duration::from_secs(600);

/// Runs until Ctrl-C or SIGTERM.
pub(super) async fn run(args: &UpArgs, config: Config) -> Result<()> {
    let mut signals = Signals::install().context("cannot watch for signals")?;
    let reference = ModelRef::parse(&config.model.reference)?;
    // Pulled once here, not by every child at the same time.
    model::ensure(&reference).context("cannot get the model")?;
    if !config.model.head_plan.is_empty() {
        // Told once here, not by every child until it is given up.
        let config = config.clone();
        blocking(move || Node::open(&config)).await?;
    }
    let planned = plan(args)?;
    let folder = tempfile::tempdir().context("cannot create a folder for the configuration")?;
    let (http, grpc) = (chosen(&config.listen.http)?, chosen(&config.listen.grpc)?);
    ensure!(
        !grpc.is_empty(),
        "`listen.grpc` is empty; hint: processes need it, pass `--grpc 127.0.0.1:9000`"
    );
    let file = folder.path().join("longshore.toml");
    std::fs::write(&file, render(&without_addresses(&config))).context("cannot write the configuration")?;
    let deadline = Duration::from_millis(config.drain.deadline_ms);
    let mut children = Vec::new();
    let outcome = async {
        for process in &planned {
            let recipe = worker(process, &planned, &file, &config);
            children.push(Supervised::start(recipe, deadline)?);
        }
        await_ready(&planned).await?;
        children.push(Supervised::start(router(&planned, &file, &config, &http, &grpc), deadline)?);
        let url = ready::loopback_url(&grpc);
        await_answer("router", &url).await?;
        announce(&planned, &http, &grpc, &url).await
    };
    let outcome = tokio::select! {
        outcome = outcome => outcome.map(|()| None),
        signal = signals.next() => Ok(Some(signal)),
    };
    let outcome = match outcome {
        Ok(None) => Ok(signals.next().await),
        Ok(Some(signal)) => Ok(signal),
        Err(error) => Err(error),
    };
    if let Ok(signal) = &outcome {
        console::note(format!("{signal}: draining; once more ends at once"));
    }
    tokio::select! {
        () = end(children, deadline) => {}
        _ = signals.next() => console::note("ended without draining"),
    }
    outcome.map(drop)
}

/// The front door first, so that streams finish while their workers still live; shards last.
async fn end(mut children: Vec<Supervised>, deadline: Duration) {
    while let Some(child) = children.pop() {
        child.end(deadline).await;
    }
}

fn plan(args: &UpArgs) -> Result<Vec<Planned>> {
    // Held until all are chosen, so that no port is chosen twice.
    let mut held = Vec::new();
    let mut planned = Vec::new();
    for (role, count) in [("kvstore", args.shards), ("prefill", args.prefill), ("decode", args.decode)] {
        for index in 0..count {
            let listener = TcpListener::bind("127.0.0.1:0").context("no free port on loopback")?;
            let port = listener.local_addr().context("a bound socket has an address")?.port();
            let name = if role == "kvstore" { "kv" } else { role };
            planned.push(Planned { role, id: format!("{name}-{index}"), port });
            held.push(listener);
        }
    }
    Ok(planned)
}

/// The address with its port 0, which stands for any free one, replaced by one that is free now.
fn chosen(address: &str) -> Result<String> {
    match address.rsplit_once(':') {
        Some((host, "0")) => {
            let listener = TcpListener::bind(address).with_context(|| format!("no free port on {host}"))?;
            Ok(listener.local_addr().context("a bound socket has an address")?.to_string())
        }
        _ => Ok(address.to_owned()),
    }
}

/// Flags that give a process its part of the cores. Those of one role work at the same time and share the cores; prefill and
/// decode rarely compute at once for one user, and shards answer while workers wait for them.
fn compute_flags(config: &Config, planned: &[Planned], process: &Planned) -> Vec<String> {
    let same_role = || planned.iter().filter(|other| other.role == process.role);
    let index = same_role().position(|other| other.id == process.id).unwrap_or(0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let share = config.compute.share(index, same_role().count(), cores);
    [format!("compute.threads={}", share.threads), format!("compute.pin={:?}", share.pin)]
        .into_iter()
        .flat_map(|set| ["--set".to_owned(), set])
        .collect()
}

fn without_addresses(config: &Config) -> Config {
    let mut config = config.clone();
    config.listen.http.clear();
    config.listen.grpc.clear();
    // One port cannot be that of several shards of a host.
    config.listen.tiles_port = 0;
    config.listen.admin.clear();
    config
}

fn members(planned: &[Planned]) -> impl Iterator<Item = String> {
    planned
        .iter()
        .flat_map(|p| ["--member".to_owned(), format!("{}={}@http://127.0.0.1:{}", p.role, p.id, p.port)])
}

fn worker(process: &Planned, planned: &[Planned], file: &Path, config: &Config) -> Recipe {
    let mut arguments = vec![process.role.to_owned(), "--id".to_owned(), process.id.clone()];
    arguments.extend(["--listen".to_owned(), format!("127.0.0.1:{}", process.port)]);
    arguments.extend(["--config".to_owned(), file.display().to_string(), "--supervised".to_owned()]);
    arguments.extend(compute_flags(config, planned, process));
    arguments.extend(members(planned));
    let shard = (process.role == "kvstore").then(|| format!("http://127.0.0.1:{}", process.port));
    Recipe { name: process.id.clone(), arguments, shard }
}

fn router(planned: &[Planned], file: &Path, config: &Config, http: &str, grpc: &str) -> Recipe {
    let mut arguments: Vec<String> =
        ["router", "--id", "router-0", "--listen", grpc, "--supervised"].map(str::to_owned).to_vec();
    arguments.extend(["--set".to_owned(), format!("listen.http={http:?}")]);
    if !config.listen.admin.is_empty() {
        arguments.extend(["--admin".to_owned(), config.listen.admin.clone()]);
    }
    arguments.extend(["--config".to_owned(), file.display().to_string()]);
    arguments.extend(members(planned));
    Recipe { name: "router-0".to_owned(), arguments, shard: None }
}

async fn await_ready(planned: &[Planned]) -> Result<()> {
    for process in planned {
        await_answer(&process.id, &format!("http://127.0.0.1:{}", process.port)).await?;
    }
    Ok(())
}

async fn await_answer(name: &str, url: &str) -> Result<()> {
    let connector = GrpcConnector::new(GrpcOptions::default());
    let began = Instant::now();
    loop {
        let ctx = CallContext::new("up").with_timeout(Duration::from_secs(2));
        let client = connector.describer(url).map_err(|error| anyhow::anyhow!("{error}"))?;
        match client.describe(&ctx).await {
            Ok(_) => return Ok(()),
            Err(error) => {
                ensure!(
                    began.elapsed() < READY_WITHIN,
                    "{name} at {url} does not answer: {error}; hint: see its log above"
                );
                sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn announce(planned: &[Planned], http: &str, grpc: &str, url: &str) -> Result<()> {
    let client = GrpcConnector::new(GrpcOptions::default());
    let client = client.inference(url).map_err(|error| anyhow::anyhow!("{error}"))?;
    let models =
        client.list_models(&CallContext::new("up")).await.map_err(|error| anyhow::anyhow!("{error}"))?;
    let model = models.first().context("the router serves no model")?;
    let workers: Vec<_> = planned.iter().map(|p| format!("{} 127.0.0.1:{}", p.id, p.port)).collect();
    ready::announce(model, http, grpc, &workers);
    Ok(())
}
