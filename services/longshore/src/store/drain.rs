//! `longshore store drain`: a shard hands its blocks to the others, and this waits until it has.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use longshore_fabric::Error;
use longshore_proto::types::{DrainStats, ShardStats};
use tokio::time::Instant;

use super::{
    cluster::{Cluster, call, unreachable},
    progress::Progress,
};
use crate::{cli::StoreDrainArgs, console};

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long nothing may change before what cannot be moved is told, once; it is still waited for.
const STUCK_AFTER: Duration = Duration::from_secs(30);

/// Runs the command.
pub(super) async fn drain(args: &StoreDrainArgs) -> Result<()> {
    let cluster = Cluster::find(&args.cluster).await?;
    let at = cluster.position(&args.shard)?;
    if args.cancel {
        let shard = &cluster.shards[at];
        shard.client.drain(&call(), true).await.with_context(|| unreachable(shard))?;
        console::say(format!("{}: takes blocks and owns its part of them again", shard.id));
        return Ok(());
    }
    let stats = run(&cluster, at, Duration::from_secs(args.timeout)).await?;
    console::say(format!(
        "{}: drained; all {} blocks have their {} copies on other shards; stop it, then take it out of the member list",
        args.shard,
        console::grouped(stats.drain.blocks),
        stats.copies.wanted.max(1),
    ));
    Ok(())
}

/// Asks the shard at this position to drain, unless it does already, and waits until it has.
pub(super) async fn run(cluster: &Cluster, at: usize, timeout: Duration) -> Result<ShardStats> {
    let shard = &cluster.shards[at];
    ensure!(
        cluster.shards.len() > 1,
        "`{}` is the only shard: there is nobody to hand its blocks to; hint: add a shard first",
        shard.id
    );
    let before = cluster.stats_of(at).await?;
    if !before.drain.draining {
        let others = Others::of(cluster, at, &cluster.stats().await);
        ensure!(others.are_enough(&before), "{}", others.too_few(&shard.id, &before));
    }
    shard.client.drain(&call(), false).await.with_context(|| unreachable(shard))?;
    let (mut progress, started) = (Progress::new("drain"), Instant::now());
    let (mut last, mut changed, mut is_told) = (DrainStats::default(), started, false);
    loop {
        let stats = cluster.stats_of(at).await?;
        ensure!(
            stats.incarnation == before.incarnation,
            "shard `{}` was started anew and drains no more; hint: ask again",
            shard.id
        );
        ensure!(stats.drain.draining, "somebody else ended the drain of `{}`", shard.id);
        let drain = stats.drain;
        progress.set(drain.moved_blocks, drain.blocks, &said(&stats));
        if drain.drained {
            progress.end();
            return Ok(stats);
        }
        if drain != last {
            (last, changed) = (drain, Instant::now());
        }
        let stuck = drain.waiting_blocks == 0
            && drain.no_room_blocks + drain.too_few_hosts_blocks + stats.copies.unplaced_blocks > 0
            && changed.elapsed() >= STUCK_AFTER;
        let is_late = started.elapsed() >= timeout;
        if is_late || (stuck && !is_told) {
            let others = Others::of(cluster, at, &cluster.stats().await);
            let told = left(&shard.id, &stats, &others);
            if is_late {
                progress.end();
                bail!("{told}");
            }
            is_told = true;
            console::note(format!("{told}; still waiting (Ctrl-C ends the waiting, not the drain)"));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Who could take a shard's blocks.
#[derive(Debug, Default)]
pub(super) struct Others {
    /// Hosts of shards that answer and are not drained.
    hosts: usize,
    /// Shards that take blocks.
    taking: Vec<String>,
    /// Shards that are being drained too.
    draining: Vec<String>,
    /// Shards that do not answer.
    silent: Vec<String>,
}

impl Others {
    fn of(cluster: &Cluster, at: usize, stats: &[Result<ShardStats, Error>]) -> Self {
        let (map, mut others, mut hosts) = (cluster.view.shard_map(), Self::default(), BTreeSet::new());
        for (other, stats) in stats.iter().enumerate().filter(|(other, _)| *other != at) {
            let id = format!("`{}`", cluster.shards[other].id);
            match stats {
                Ok(stats) if stats.drain.draining => others.draining.push(id),
                Ok(_) => {
                    hosts.insert(map.host_of(other));
                    others.taking.push(id);
                }
                Err(_) => others.silent.push(id),
            }
        }
        others.hosts = hosts.len();
        others
    }

    /// Whether every block can have all its copies without the shard.
    fn are_enough(&self, stats: &ShardStats) -> bool {
        self.hosts >= stats.copies.wanted.max(1) as usize
    }

    fn too_few(&self, id: &str, stats: &ShardStats) -> String {
        let taking = match self.taking.is_empty() {
            true => "none takes them".to_owned(),
            false => format!("{} of {} hosts take them", self.taking.join(", "), self.hosts),
        };
        format!(
            "`{id}` was not asked to drain: its blocks need {} copies on other hosts, and of the other shards {taking}; hint: {}",
            stats.copies.wanted.max(1),
            self.remedy()
        )
    }

    /// How there would be more of them.
    fn remedy(&self) -> String {
        let mut remedies = Vec::new();
        if let Some(first) = self.draining.first() {
            remedies.push(format!(
                "end the drain of {} (`longshore store drain {} --cancel`)",
                self.draining.join(", "),
                first.trim_matches('`')
            ));
        }
        if !self.silent.is_empty() {
            remedies.push(format!("bring {} back", self.silent.join(", ")));
        }
        remedies.push("add a shard on another host".to_owned());
        remedies.join(", or ")
    }
}

/// What is under way.
fn said(stats: &ShardStats) -> String {
    format!(
        "blocks elsewhere, {} copies to send, {} sent ({})",
        stats.repair.backlog_blocks,
        stats.repair.sent_total,
        console::bytes(stats.repair.sent_bytes_total)
    )
}

/// Why a drain is not done, cause by cause, each with its remedy.
pub(super) fn left(id: &str, stats: &ShardStats, others: &Others) -> String {
    let drain = &stats.drain;
    let few_hosts = format!(
        "are on every other host that takes blocks, which are fewer than there should be copies; hint: {}",
        others.remedy()
    );
    let causes = [
        (
            drain.waiting_blocks,
            "are on their way or their new owners did not answer; hint: wait longer with `--timeout`",
        ),
        (
            drain.no_room_blocks,
            "found no room on their new owners, and drive nothing out there; hint: raise `kvstore.capacity_bytes` or \
             `kvstore.disk.capacity_bytes` there, or add a shard",
        ),
        (drain.too_few_hosts_blocks, few_hosts.as_str()),
        (
            stats.copies.unplaced_blocks,
            "cannot be moved because nobody said where they belong; hint: they are computed again when they are asked for",
        ),
    ];
    let told =
        causes.iter().filter(|(blocks, _)| *blocks > 0).map(|(blocks, why)| format!("{blocks} blocks {why}"));
    let mut told: Vec<String> = told.collect();
    if told.is_empty() {
        told.push("blocks still come; hint: wait longer with `--timeout`, or stop traffic".to_owned());
    }
    if drain.takes_blocks {
        told.push("it still takes new blocks, because there would be too few shards for them".to_owned());
    }
    format!(
        "`{id}` is not drained ({} of {} blocks have their copies elsewhere) and goes on draining (`--cancel` ends that): {}",
        drain.moved_blocks,
        drain.blocks,
        told.join("; ")
    )
}
