//! `longshore up --processes`: every role as a process over gRPC on loopback, the way a cluster runs.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use futures::{StreamExt, future::try_join_all, stream::FuturesUnordered};
use longshore_chassis::{Reserved, Signals, render, reserve};
use longshore_fabric::{CallContext, Connector, GrpcConnector, GrpcOptions};
use tokio::time::{sleep, timeout};

use super::supervisor::{Recipe, Supervised};
use crate::{
    cli::UpArgs, config::Config, console, model, model::ModelRef, node::Node, process, ready, role::blocking,
};

/// A process to be.
#[derive(Debug)]
struct Planned {
    role: &'static str,
    id: String,
    /// Kept from its choice to the end, so that nobody who asks for any port, and no outgoing connection, has it when the process is started
    /// again.
    reserved: Reserved,
    /// Where it tells health and metrics, if the router does.
    admin: Option<Reserved>,
}

impl Planned {
    fn url(&self) -> String {
        format!("http://{}", self.reserved.address())
    }

    /// For people: who it is and where it listens.
    fn line(&self) -> String {
        let admin = self.admin.as_ref().map(|admin| format!(" (admin {})", admin.address()));
        format!("{} {}{}", self.id, self.reserved.address(), admin.unwrap_or_default())
    }
}

/// The router's addresses, kept as those of workers are.
#[derive(Debug)]
struct Doors {
    grpc: Reserved,
    http: Option<Reserved>,
    admin: Option<Reserved>,
}

impl Doors {
    async fn open(config: &Config) -> Result<Self> {
        let listen = &config.listen;
        let grpc = reserve(&listen.grpc).await.context("`listen.grpc`")?;
        let http = process::reserved("listen.http", &listen.http).await?;
        let admin = process::reserved("listen.admin", &listen.admin).await?;
        Ok(Self { grpc, http, admin })
    }

    fn http(&self) -> String {
        self.http.as_ref().map(|door| door.address().to_string()).unwrap_or_default()
    }
}

/// Workers and shards are for this machine.
const ANY_PORT: &str = "127.0.0.1:0";

/// Refuses what processes of one host cannot have.
pub(super) fn check(config: &Config) -> Result<()> {
    let listen = &config.listen;
    ensure!(
        listen.tiles_port == 0,
        "`listen.tiles_port` is {}, which cannot be that of several shards of a host; hint: leave it out, each takes a free one",
        listen.tiles_port
    );
    ensure!(
        !listen.grpc.is_empty(),
        "`listen.grpc` is empty; hint: processes need it, pass `--grpc 127.0.0.1:9000`"
    );
    Ok(())
}

/// How long a process may take from its start to its first answer; loading a large model takes minutes.
const READY_WITHIN: Duration = Duration::from_secs(600);

/// How much later than its children it may learn of a signal that all of them got.
const SIGNAL_WITHIN: Duration = Duration::from_millis(200);

/// Runs until Ctrl-C or SIGTERM.
pub(super) async fn run(args: &UpArgs, config: Config) -> Result<()> {
    let mut signals = Signals::install().context("cannot watch for signals")?;
    let (doors, planned) = (Doors::open(&config).await?, plan(args, &config).await?);
    // Pulled once here, not by every child at the same time; and what is wrong with a head plan is told once, not by every child.
    let model = config.clone();
    let fetching = blocking(move || match model.model.head_plan.is_empty() {
        true => {
            let reference = ModelRef::parse(&model.model.reference)?;
            model::ensure(&reference).context("cannot get the model").map(drop)
        }
        false => Node::open(&model).map(drop),
    });
    if process::unless_signalled(&mut signals, false, fetching).await?.is_none() {
        return Ok(());
    }
    let folder = tempfile::tempdir().context("cannot create a folder for the configuration")?;
    let file = folder.path().join("longshore.toml");
    std::fs::write(&file, render(&without_addresses(&config))).context("cannot write the configuration")?;
    let deadline = Duration::from_millis(config.drain.deadline_ms);
    let mut children = Vec::new();
    let outcome = async {
        for process in &planned {
            let recipe = worker(process, &planned, &file, &config);
            children.push(Supervised::start(recipe, deadline)?);
        }
        let starting = children.iter().zip(&planned).map(|(child, process)| serves(child, process.url()));
        try_join_all(starting).await?;
        children.push(Supervised::start(router(&planned, &file, &doors), deadline)?);
        let url = ready::loopback_url(&doors.grpc.address().to_string());
        serves(children.last().context("the router was started")?, url.clone()).await?;
        announce(&planned, &doors, &url).await
    };
    let outcome = tokio::select! {
        outcome = outcome => outcome.map(|()| None),
        signal = signals.next() => Ok(Some(signal)),
    };
    let outcome = match outcome {
        Ok(None) => tokio::select! {
            signal = signals.next() => Ok(signal),
            lost = lost(&children) => Err(lost),
        },
        Ok(Some(signal)) => Ok(signal),
        // A Ctrl-C that reaches a child before it has a group of its own ends it: then that is why.
        Err(error) => tokio::time::timeout(SIGNAL_WITHIN, signals.next()).await.map_err(|_| error),
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

async fn plan(args: &UpArgs, config: &Config) -> Result<Vec<Planned>> {
    let mut planned = Vec::new();
    for (role, count) in [("kvstore", args.shards), ("prefill", args.prefill), ("decode", args.decode)] {
        for index in 0..count {
            let free = || async { reserve(ANY_PORT).await.context("no free port on loopback") };
            let reserved = free().await?;
            let admin = if config.listen.admin.is_empty() { None } else { Some(free().await?) };
            let name = if role == "kvstore" { "kv" } else { role };
            planned.push(Planned { role, id: format!("{name}-{index}"), reserved, admin });
        }
    }
    Ok(planned)
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
    planned.iter().flat_map(|process| {
        ["--member".to_owned(), format!("{}={}@{}", process.role, process.id, process.url())]
    })
}

fn worker(process: &Planned, planned: &[Planned], file: &Path, config: &Config) -> Recipe {
    let mut arguments = vec![process.role.to_owned(), "--id".to_owned(), process.id.clone()];
    arguments.extend(["--listen".to_owned(), process.reserved.address().to_string()]);
    arguments.extend(["--config".to_owned(), file.display().to_string(), "--supervised".to_owned()]);
    if let Some(admin) = &process.admin {
        arguments.extend(["--admin".to_owned(), admin.address().to_string()]);
    }
    arguments.extend(compute_flags(config, planned, process));
    arguments.extend(members(planned));
    let shard = (process.role == "kvstore").then(|| process.url());
    Recipe { name: process.id.clone(), arguments, shard }
}

fn router(planned: &[Planned], file: &Path, doors: &Doors) -> Recipe {
    let grpc = doors.grpc.address().to_string();
    let mut arguments: Vec<String> =
        ["router", "--id", "router-0", "--listen", &grpc, "--supervised"].map(str::to_owned).to_vec();
    arguments.extend(["--set".to_owned(), format!("listen.http={:?}", doors.http())]);
    if let Some(admin) = &doors.admin {
        arguments.extend(["--admin".to_owned(), admin.address().to_string()]);
    }
    arguments.extend(["--config".to_owned(), file.display().to_string()]);
    arguments.extend(members(planned));
    Recipe { name: "router-0".to_owned(), arguments, shard: None }
}

/// Waits until the child answers for the first time. One that ends before has something that starting it again will not mend.
async fn serves(child: &Supervised, url: String) -> Result<()> {
    let name = child.name();
    tokio::select! {
        answer = timeout(READY_WITHIN, first_answer(&url)) => {
            if let Err(late) = answer {
                bail!("{name} at {url} does not answer: {late}; hint: see its log above");
            }
        }
        () = child.ended() => bail!("{name} ended before it served; hint: what it said of it is above"),
    }
    child.served();
    if let Some(failure) = child.failure() {
        bail!("{failure}; hint: what it said of it is above");
    }
    Ok(())
}

/// Waits until a child is watched no more, which none should be before its end.
async fn lost(children: &[Supervised]) -> anyhow::Error {
    let mut watched: FuturesUnordered<_> = children
        .iter()
        .map(|child| async move {
            child.ended().await;
            child.failure().unwrap_or_else(|| format!("{} is watched no more", child.name()))
        })
        .collect();
    match watched.next().await {
        Some(failure) => anyhow::anyhow!("{failure}"),
        None => std::future::pending().await,
    }
}

async fn first_answer(url: &str) -> Result<()> {
    let connector = GrpcConnector::new(GrpcOptions::default());
    let client = connector.describer(url).map_err(|error| anyhow::anyhow!("{error}"))?;
    while client.describe(&CallContext::new("up").with_timeout(Duration::from_secs(2))).await.is_err() {
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

async fn announce(planned: &[Planned], doors: &Doors, url: &str) -> Result<()> {
    let client = GrpcConnector::new(GrpcOptions::default());
    let client = client.inference(url).map_err(|error| anyhow::anyhow!("{error}"))?;
    let models =
        client.list_models(&CallContext::new("up")).await.map_err(|error| anyhow::anyhow!("{error}"))?;
    let model = models.first().context("the router serves no model")?;
    let workers: Vec<_> = planned.iter().map(Planned::line).collect();
    ready::announce(model, &doors.http(), &doors.grpc.address().to_string(), &workers);
    Ok(())
}
