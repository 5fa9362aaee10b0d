//! The figures of `longshore store stat`, as JSON and as tables.

mod figures;
mod tables;

use std::time::Duration;

use longshore_fabric::Error;
use longshore_proto::types::ShardStats;
use serde::Serialize;

use crate::store::{cluster::Cluster, table::Table};

/// All shards, and their sum.
#[derive(Debug, Clone, Serialize)]
pub(in crate::store) struct Report {
    pub(in crate::store) shards: Vec<ShardFigures>,
    pub(in crate::store) total: ShardFigures,
    /// Shards that do not answer, and why.
    pub(in crate::store) unanswered: Vec<(String, String)>,
}

/// Figures of one shard, or of all together.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(in crate::store) struct ShardFigures {
    pub(in crate::store) shard: String,
    /// Hexadecimal; empty in a sum.
    pub(in crate::store) epoch: String,
    /// Hexadecimal; empty in a sum.
    pub(in crate::store) incarnation: String,
    pub(in crate::store) uptime_s: u64,
    pub(in crate::store) blocks: u64,
    pub(in crate::store) pinned_blocks: u64,
    pub(in crate::store) open_blocks: u64,
    pub(in crate::store) condemned_blocks: u64,
    pub(in crate::store) views: u64,
    pub(in crate::store) closed_views: u64,
    pub(in crate::store) waiting_turns: u64,
    pub(in crate::store) writers: u64,
    pub(in crate::store) stored_total: u64,
    pub(in crate::store) hits_total: u64,
    pub(in crate::store) misses_total: u64,
    /// Share of lookups that found their block; none without lookups.
    pub(in crate::store) hit_rate: Option<f64>,
    pub(in crate::store) attend_total: u64,
    pub(in crate::store) tiers: Vec<TierFigures>,
    pub(in crate::store) departures: Departures,
    pub(in crate::store) copies: Copies,
    pub(in crate::store) tenants: Tenants,
    pub(in crate::store) lanes: Vec<LaneFigures>,
    pub(in crate::store) scrub: Scrub,
    /// `no`, `draining` or `drained`; empty in a sum.
    pub(in crate::store) drain: &'static str,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(in crate::store) struct TierFigures {
    pub(in crate::store) tier: String,
    pub(in crate::store) used_bytes: u64,
    pub(in crate::store) capacity_bytes: u64,
    pub(in crate::store) blocks: u64,
    /// Blocks of the tier above that it has as well.
    pub(in crate::store) also_above: u64,
    pub(in crate::store) leaving: u64,
    pub(in crate::store) rising: u64,
    pub(in crate::store) hits_total: u64,
    pub(in crate::store) spilled_total: u64,
    pub(in crate::store) promoted_total: u64,
    pub(in crate::store) io_errors_total: u64,
    pub(in crate::store) slow_total: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(in crate::store) struct Departures {
    pub(in crate::store) evicted_memory_total: u64,
    pub(in crate::store) not_admitted_total: u64,
    pub(in crate::store) disk_full_total: u64,
    pub(in crate::store) evicted_disk_total: u64,
    pub(in crate::store) condemned_total: u64,
    pub(in crate::store) moved_total: u64,
    pub(in crate::store) incomplete_total: u64,
    pub(in crate::store) no_space_total: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(in crate::store) struct Copies {
    pub(in crate::store) wanted: u32,
    pub(in crate::store) short: u64,
    pub(in crate::store) backlog: u64,
    pub(in crate::store) unchecked: u64,
    /// Blocks of which `short` says nothing yet.
    pub(in crate::store) unsearched: u64,
    pub(in crate::store) unplaced: u64,
    pub(in crate::store) sent_total: u64,
    pub(in crate::store) sent_bytes_total: u64,
    pub(in crate::store) failed_total: u64,
    pub(in crate::store) peers_down: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(in crate::store) struct Tenants {
    /// In a sum, the most that one shard has: a tenant is on many shards.
    pub(in crate::store) tenants: u64,
    pub(in crate::store) kept_bytes: u64,
    /// In a sum, that of the shard where it is most.
    pub(in crate::store) most_kept_bytes: u64,
    pub(in crate::store) refused_total: u64,
    pub(in crate::store) broken_promises_total: u64,
    pub(in crate::store) stalled_streams_total: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(in crate::store) struct LaneFigures {
    pub(in crate::store) lane: String,
    pub(in crate::store) received_bytes_total: u64,
    pub(in crate::store) sent_bytes_total: u64,
    pub(in crate::store) received_bytes_per_s: f64,
    pub(in crate::store) sent_bytes_per_s: f64,
    pub(in crate::store) puts_total: u64,
    pub(in crate::store) gets_total: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(in crate::store) struct Scrub {
    pub(in crate::store) done_blocks: u64,
    pub(in crate::store) round_blocks: u64,
    pub(in crate::store) rounds_total: u64,
    pub(in crate::store) bad_total: u64,
}

impl Report {
    /// Figures of `stats`, by the position of the shards. Rates are of the time since `before` and what was told then.
    pub(super) fn of(
        cluster: &Cluster,
        stats: &[Result<ShardStats, Error>],
        before: Option<(Duration, &[Option<ShardStats>])>,
    ) -> Self {
        let mut report = Self { shards: Vec::new(), total: ShardFigures::default(), unanswered: Vec::new() };
        for (at, (shard, stats)) in cluster.shards.iter().zip(stats).enumerate() {
            match stats {
                Ok(stats) => {
                    let since = before.and_then(|(time, before)| Some((time, before.get(at)?.as_ref()?)));
                    report.shards.push(ShardFigures::of(&shard.id, stats, since));
                }
                Err(error) => report.unanswered.push((shard.id.clone(), error.to_string())),
            }
        }
        report.total = ShardFigures::sum(&report.shards);
        report
    }

    /// Tables for people.
    pub(in crate::store) fn text(&self) -> String {
        let lines: Vec<&ShardFigures> = match self.shards.len() {
            0 | 1 => self.shards.iter().collect(),
            _ => self.shards.iter().chain([&self.total]).collect(),
        };
        let mut parts: Vec<String> = tables::all(&lines).iter().map(Table::text).collect();
        let unanswered = self.unanswered.iter();
        parts.extend(unanswered.map(|(id, error)| format!("shard `{id}` does not answer: {error}")));
        parts.join("\n\n")
    }
}
