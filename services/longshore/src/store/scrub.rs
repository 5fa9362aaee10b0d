//! `longshore store scrub`: a round of the scrubber on the shards, now.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use longshore_blocks::BlockKey;
use longshore_proto::types::ShardStats;
use tokio::time::Instant;

use super::{
    cluster::{Cluster, call, unreachable},
    progress::Progress,
};
use crate::{cli::StoreScrubArgs, console};

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What a round found on one shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Scrubbed {
    pub(super) shard: String,
    pub(super) checked: u64,
    pub(super) bad: u64,
    /// The last of them, and the tier that they were on.
    pub(super) findings: Vec<(BlockKey, String)>,
}

/// Runs the command.
pub(super) async fn scrub(args: &StoreScrubArgs) -> Result<()> {
    let cluster = Cluster::find(&args.cluster).await?;
    let shards = match args.shards.is_empty() {
        true => (0..cluster.shards.len()).collect(),
        false => args.shards.iter().map(|id| cluster.position(id)).collect::<Result<Vec<_>>>()?,
    };
    let scrubbed = run(&cluster, &shards, args.bytes_per_second, Duration::from_secs(args.timeout)).await?;
    for one in &scrubbed {
        console::say(format!(
            "{}: {} blocks checked, {} damaged and dropped",
            one.shard,
            console::grouped(one.checked),
            one.bad
        ));
        for (key, tier) in &one.findings {
            console::say(format!("  {key} on {tier}"));
        }
    }
    let bad: u64 = scrubbed.iter().map(|one| one.bad).sum();
    ensure!(
        bad == 0,
        "{bad} blocks were damaged; hint: shards with other copies make them anew, the others are computed again; look at the \
         memory and disks of those hosts"
    );
    Ok(())
}

/// Where one shard's round stands.
struct Round {
    at: usize,
    before: ShardStats,
    number: u64,
}

/// Scrubs the shards at these positions and waits for the end.
pub(super) async fn run(
    cluster: &Cluster,
    shards: &[usize],
    bytes_per_second: Option<u64>,
    timeout: Duration,
) -> Result<Vec<Scrubbed>> {
    let mut rounds = Vec::new();
    for &at in shards {
        let (shard, before) = (&cluster.shards[at], cluster.stats_of(at).await?);
        let started = shard.client.start_scrub(&call(), bytes_per_second).await;
        let started = started.with_context(|| unreachable(shard))?;
        rounds.push(Round { at, before, number: started.round });
    }
    let (mut progress, deadline) = (Progress::new("scrub"), Instant::now() + timeout);
    loop {
        let mut now = Vec::with_capacity(rounds.len());
        for round in &rounds {
            now.push(look(cluster, round).await?);
        }
        let left =
            rounds.iter().zip(&now).filter(|(round, stats)| stats.scrub.rounds_total < round.number).count();
        let (mut done, mut total, mut bad) = (0, 0, 0);
        for (round, stats) in rounds.iter().zip(&now) {
            let is_over = stats.scrub.rounds_total >= round.number;
            done += if is_over { stats.scrub.round_blocks } else { stats.scrub.done_blocks };
            total += stats.scrub.round_blocks;
            bad += found(round, stats);
        }
        progress.set(done, total, &format!("blocks, {bad} damaged, {left} shards at work"));
        if left == 0 {
            progress.end();
            let scrubbed = rounds.iter().zip(&now).map(|(round, stats)| scrubbed(cluster, round, stats));
            return Ok(scrubbed.collect());
        }
        if Instant::now() >= deadline {
            progress.end();
            bail!(
                "{left} shards are still at work ({done} of {total} blocks); hint: they go on; ask again, or raise `--timeout`"
            );
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn look(cluster: &Cluster, round: &Round) -> Result<ShardStats> {
    let stats = cluster.stats_of(round.at).await?;
    ensure!(
        stats.incarnation == round.before.incarnation,
        "shard `{}` was started anew meanwhile; hint: ask again",
        cluster.shards[round.at].id
    );
    Ok(stats)
}

fn found(round: &Round, stats: &ShardStats) -> u64 {
    stats.scrub.bad_total.saturating_sub(round.before.scrub.bad_total)
}

fn scrubbed(cluster: &Cluster, round: &Round, stats: &ShardStats) -> Scrubbed {
    let bad = found(round, stats);
    let findings = &stats.scrub_findings;
    let last = usize::try_from(bad).unwrap_or(usize::MAX).min(findings.len());
    let last = findings[findings.len() - last..].iter();
    Scrubbed {
        shard: cluster.shards[round.at].id.clone(),
        checked: stats.scrub.checked_total.saturating_sub(round.before.scrub.checked_total),
        bad,
        findings: last.map(|finding| (finding.key, finding.tier.clone())).collect(),
    }
}
