//! `longshore store stat`: what each shard holds, what came and went, and how its copies stand.

mod report;

use std::{io::IsTerminal, time::Duration};

use anyhow::{Context, Result, ensure};
use longshore_proto::types::ShardStats;
use tokio::time::Instant;

pub(super) use self::report::Report;
use super::cluster::Cluster;
use crate::{cli::StoreStatArgs, console};

/// What a terminal does before the next look: clears itself and begins at its top.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// What the shards said at one moment; `None` for those that did not answer.
#[derive(Debug)]
pub(super) struct Look {
    at: Instant,
    shards: Vec<Option<ShardStats>>,
}

/// Runs the command.
pub(super) async fn stat(args: &StoreStatArgs) -> Result<()> {
    let cluster = Cluster::find(&args.cluster).await?;
    let mut before: Option<Look> = None;
    loop {
        let (report, look) = look(&cluster, before.as_ref()).await;
        let clear = args.watch.is_some() && !args.json && std::io::stdout().is_terminal();
        let text = match args.json {
            true => serde_json::to_string(&report).context("figures are JSON")?,
            false => report.text(),
        };
        console::say(if clear { format!("{CLEAR}{text}") } else { text });
        let Some(seconds) = args.watch else {
            ensure!(
                look.shards.iter().any(Option::is_some),
                "no shard answers; hint: is the cluster running?"
            );
            return Ok(());
        };
        before = Some(look);
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }
}

/// Asks all shards once; rates are of the time since `before`.
pub(super) async fn look(cluster: &Cluster, before: Option<&Look>) -> (Report, Look) {
    let (at, stats) = (Instant::now(), cluster.stats().await);
    let report = Report::of(cluster, &stats, before.map(|look| (at - look.at, look.shards.as_slice())));
    (report, Look { at, shards: stats.into_iter().map(Result::ok).collect() })
}
