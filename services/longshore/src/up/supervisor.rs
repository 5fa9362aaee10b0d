//! Child processes of `longshore up --processes`: started, told apart, restarted when they die, ended in order.

use std::{
    convert::Infallible,
    path::Path,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail};
use longshore_chassis::Tasks;
use longshore_fabric::{CallContext, Connector, GrpcConnector, GrpcOptions};
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{console, process::Drained};

/// How to start one child.
#[derive(Debug, Clone)]
pub(super) struct Recipe {
    /// Name for people.
    pub(super) name: String,
    /// Arguments of this same program.
    pub(super) arguments: Vec<String>,
    /// gRPC address, of a shard: one that ends when it was drained is not started again.
    pub(super) shard: Option<String>,
}

/// A supervised child: once it has served, restarted until told to end.
#[derive(Debug)]
pub(super) struct Supervised {
    name: String,
    served: Arc<AtomicBool>,
    stop: CancellationToken,
    tasks: Tasks,
}

/// First pause before a restart; doubles up to the last one and starts over after a good minute.
const RESTART_FIRST: Duration = Duration::from_millis(500);
const RESTART_LAST: Duration = Duration::from_secs(15);
const GOOD_RUN: Duration = Duration::from_secs(60);
/// On Linux: the file of whoever opens it.
const OWN_FILE: &str = "/proc/self/exe";
/// How often a shard is asked whether it was drained, and how long it may take to answer.
const LOOK_EVERY: Duration = Duration::from_millis(500);

impl Supervised {
    /// Starts the child and its watcher. `deadline` is what it gets to end after SIGTERM.
    pub(super) fn start(recipe: Recipe, deadline: Duration) -> Result<Self> {
        let (stop, served) = (CancellationToken::new(), Arc::new(AtomicBool::new(false)));
        let child = spawn(&recipe)?;
        let tasks = Tasks::new();
        let name = recipe.name.clone();
        let watched = watch(recipe, child, Arc::clone(&served), stop.clone(), deadline);
        tasks.spawn_critical(format!("supervise {name}"), watched);
        Ok(Self { name, served, stop, tasks })
    }

    /// Its name for people.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Tells the watcher that the child answered: from now on it is started again when it ends.
    pub(super) fn served(&self) {
        self.served.store(true, Ordering::Relaxed);
    }

    /// Why it is not watched any more.
    pub(super) fn failure(&self) -> Option<String> {
        self.tasks.failure()
    }

    /// Waits until it is not watched any more: it ended before it served.
    pub(super) async fn ended(&self) {
        self.tasks.cancelled().await;
    }

    /// Asks the child to end and waits for it.
    pub(super) async fn end(self, deadline: Duration) {
        self.stop.cancel();
        // The watcher kills a child that outlives the deadline, so a little more is always enough.
        if !self.tasks.drain(deadline + Duration::from_secs(5)).await.is_empty() {
            console::note(format!("{} did not end", self.name));
        }
    }
}

fn spawn(recipe: &Recipe) -> Result<Child> {
    let name = std::env::current_exe().context("cannot find this program's own file")?;
    // The file that runs, even when another has its name by now.
    let mut command = Command::new(if cfg!(target_os = "linux") { Path::new(OWN_FILE) } else { &name });
    command.arg0(&name).args(&recipe.arguments).stdin(Stdio::null()).kill_on_drop(true);
    // A group of its own: Ctrl-C reaches the supervisor only, which then ends the children in order.
    command.process_group(0);
    command.spawn().with_context(|| format!("cannot start {}", recipe.name))
}

async fn watch(
    recipe: Recipe,
    mut child: Child,
    served: Arc<AtomicBool>,
    stop: CancellationToken,
    deadline: Duration,
) -> Result<()> {
    let mut pause = RESTART_FIRST;
    loop {
        let began = Instant::now();
        let mut drained = false;
        let status = tokio::select! {
            status = child.wait() => status.with_context(|| format!("cannot wait for {}", recipe.name))?,
            () = stop.cancelled() => return end(&recipe, child, deadline).await,
            never = look(recipe.shard.as_deref(), &mut drained) => match never {},
        };
        if drained || status.code() == Some(i32::from(Drained::STATUS)) {
            console::note(format!(
                "{} ended after it was drained: it is not started again; start the cluster anew with fewer `--shards` when it \
                 is to stay away",
                recipe.name
            ));
            stop.cancelled().await;
            return Ok(());
        }
        if !served.load(Ordering::Relaxed) {
            bail!("{} ended before it served ({status})", recipe.name);
        }
        if began.elapsed() > GOOD_RUN {
            pause = RESTART_FIRST;
        }
        console::note(format!(
            "{} ended ({status}); restarting in {:.1} s",
            recipe.name,
            pause.as_secs_f64()
        ));
        tokio::select! {
            () = sleep(pause) => {}
            () = stop.cancelled() => return Ok(()),
        }
        pause = (pause * 2).min(RESTART_LAST);
        child = match again(&recipe, &stop).await {
            Some(child) => child,
            None => return Ok(()),
        };
    }
}

/// Starts the child once more, however often the system refuses. `None`: it is not wanted any more.
async fn again(recipe: &Recipe, stop: &CancellationToken) -> Option<Child> {
    loop {
        match spawn(recipe) {
            Ok(child) => return Some(child),
            Err(error) => console::note(format!("{}; trying again", console::text(&error))),
        }
        tokio::select! {
            () = sleep(RESTART_LAST) => {}
            () = stop.cancelled() => return None,
        }
    }
}

/// Keeps asking a shard whether it is drained: one that is killed cannot say so as it ends.
async fn look(shard: Option<&str>, drained: &mut bool) -> Infallible {
    let client = shard.and_then(|url| GrpcConnector::new(GrpcOptions::default()).shard(url).ok());
    let Some(client) = client else { return std::future::pending().await };
    loop {
        sleep(LOOK_EVERY).await;
        let ctx = CallContext::new("supervisor").with_timeout(LOOK_EVERY);
        // One that does not answer any more may have ended because it was drained.
        if let Ok(stats) = client.stats(&ctx).await {
            *drained = stats.drain.drained;
        }
    }
}

async fn end(recipe: &Recipe, mut child: Child, deadline: Duration) -> Result<()> {
    if let Some(id) =
        child.id().and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw)
    {
        // A child that ended a moment ago is what we want anyway.
        let _ = rustix::process::kill_process(id, rustix::process::Signal::TERM);
    }
    if tokio::time::timeout(deadline, child.wait()).await.is_err() {
        console::note(format!(
            "{} did not end within {:.0} s: killing it",
            recipe.name,
            deadline.as_secs_f64()
        ));
        child.kill().await.with_context(|| format!("cannot kill {}", recipe.name))?;
    }
    Ok(())
}
