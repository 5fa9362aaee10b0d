//! The figures of `longshore store stat`, as JSON and as tables.

use std::time::Duration;

use longshore_fabric::Error;
use longshore_proto::types::{LaneStats, ShardStats, TierStats};
use serde::Serialize;

use crate::{
    console,
    store::{cluster::Cluster, table::Table},
};

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
    pub(in crate::store) unplaced: u64,
    pub(in crate::store) sent_total: u64,
    pub(in crate::store) sent_bytes_total: u64,
    pub(in crate::store) failed_total: u64,
    pub(in crate::store) peers_down: u64,
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
        let tables = [shards(&lines), tiers(&lines), departures(&lines), copies(&lines), lanes(&lines)];
        let mut parts: Vec<String> = tables.iter().map(Table::text).collect();
        let unanswered = self.unanswered.iter();
        parts.extend(unanswered.map(|(id, error)| format!("shard `{id}` does not answer: {error}")));
        parts.join("\n\n")
    }
}

impl ShardFigures {
    fn of(id: &str, stats: &ShardStats, since: Option<(Duration, &ShardStats)>) -> Self {
        let (repair, copies, went) = (&stats.repair, &stats.copies, &stats.departures);
        let below = |total: fn(&TierStats) -> u64| stats.tiers.iter().map(total).sum();
        Self {
            shard: id.to_owned(),
            epoch: format!("{:016x}", stats.shard_map_epoch),
            incarnation: format!("{:016x}", stats.incarnation),
            uptime_s: stats.uptime_ms / 1_000,
            blocks: stats.blocks,
            pinned_blocks: stats.pinned_blocks,
            open_blocks: stats.open_blocks,
            condemned_blocks: stats.condemned_blocks,
            views: stats.views,
            writers: stats.writers,
            stored_total: stats.stored_total,
            hits_total: stats.hits_total,
            misses_total: stats.misses_total,
            hit_rate: hit_rate(stats.hits_total, stats.misses_total),
            attend_total: stats.attend_total,
            tiers: stats.tiers.iter().map(tier).collect(),
            departures: Departures {
                evicted_memory_total: went.evicted_memory_total,
                not_admitted_total: below(|tier| tier.refused_total),
                disk_full_total: below(|tier| tier.skipped_total),
                evicted_disk_total: went.evicted_disk_total,
                condemned_total: went.condemned_total,
                moved_total: went.moved_total,
                incomplete_total: went.incomplete_total,
                no_space_total: went.no_space_total,
            },
            copies: Copies {
                wanted: copies.wanted.max(1),
                short: copies.short,
                backlog: repair.backlog_blocks,
                unchecked: repair.unchecked_blocks,
                unplaced: copies.unplaced_blocks,
                sent_total: repair.sent_total,
                sent_bytes_total: repair.sent_bytes_total,
                failed_total: repair.failed_total,
                peers_down: repair.peers_down,
            },
            lanes: stats.lanes.iter().map(|now| lane(now, stats, since)).collect(),
            scrub: Scrub {
                done_blocks: stats.scrub.done_blocks,
                round_blocks: stats.scrub.round_blocks,
                rounds_total: stats.scrub.rounds_total,
                bad_total: stats.scrub.bad_total,
            },
            drain: match (stats.drain.draining, stats.drain.drained) {
                (false, _) => "no",
                (true, false) => "draining",
                (true, true) => "drained",
            },
        }
    }

    fn sum(all: &[Self]) -> Self {
        let mut sum = Self { shard: "total".to_owned(), ..Self::default() };
        for one in all {
            sum.uptime_s = sum.uptime_s.max(one.uptime_s);
            for (into, from) in sum.counts_mut().into_iter().zip(one.clone().counts_mut()) {
                *into += *from;
            }
            sum.copies.wanted = sum.copies.wanted.max(one.copies.wanted);
            for tier in &one.tiers {
                match sum.tiers.iter_mut().find(|known| known.tier == tier.tier) {
                    Some(known) => known.add(tier),
                    None => sum.tiers.push(tier.clone()),
                }
            }
            for lane in &one.lanes {
                match sum.lanes.iter_mut().find(|known| known.lane == lane.lane) {
                    Some(known) => known.add(lane),
                    None => sum.lanes.push(lane.clone()),
                }
            }
        }
        sum.hit_rate = hit_rate(sum.hits_total, sum.misses_total);
        sum
    }

    /// Everything that a sum adds up.
    fn counts_mut(&mut self) -> [&mut u64; 29] {
        let (went, copies, scrub) = (&mut self.departures, &mut self.copies, &mut self.scrub);
        [
            &mut self.blocks,
            &mut self.pinned_blocks,
            &mut self.open_blocks,
            &mut self.condemned_blocks,
            &mut self.views,
            &mut self.writers,
            &mut self.stored_total,
            &mut self.hits_total,
            &mut self.misses_total,
            &mut self.attend_total,
            &mut went.evicted_memory_total,
            &mut went.not_admitted_total,
            &mut went.disk_full_total,
            &mut went.evicted_disk_total,
            &mut went.condemned_total,
            &mut went.moved_total,
            &mut went.incomplete_total,
            &mut went.no_space_total,
            &mut copies.short,
            &mut copies.backlog,
            &mut copies.unchecked,
            &mut copies.unplaced,
            &mut copies.sent_total,
            &mut copies.sent_bytes_total,
            &mut copies.failed_total,
            &mut scrub.done_blocks,
            &mut scrub.round_blocks,
            &mut scrub.rounds_total,
            &mut scrub.bad_total,
        ]
    }
}

impl TierFigures {
    fn add(&mut self, other: &Self) {
        self.used_bytes += other.used_bytes;
        self.capacity_bytes += other.capacity_bytes;
        self.blocks += other.blocks;
        self.also_above += other.also_above;
        self.leaving += other.leaving;
        self.rising += other.rising;
        self.hits_total += other.hits_total;
        self.spilled_total += other.spilled_total;
        self.promoted_total += other.promoted_total;
        self.io_errors_total += other.io_errors_total;
        self.slow_total += other.slow_total;
    }
}

impl LaneFigures {
    fn add(&mut self, other: &Self) {
        self.received_bytes_total += other.received_bytes_total;
        self.sent_bytes_total += other.sent_bytes_total;
        self.received_bytes_per_s += other.received_bytes_per_s;
        self.sent_bytes_per_s += other.sent_bytes_per_s;
        self.puts_total += other.puts_total;
        self.gets_total += other.gets_total;
    }
}

fn hit_rate(hits: u64, misses: u64) -> Option<f64> {
    (hits + misses > 0).then(|| hits as f64 / (hits + misses) as f64)
}

fn tier(stats: &TierStats) -> TierFigures {
    TierFigures {
        tier: stats.name.clone(),
        used_bytes: stats.used_bytes,
        capacity_bytes: stats.capacity_bytes,
        blocks: stats.blocks,
        also_above: stats.copies,
        leaving: stats.leaving_blocks,
        rising: stats.rising_blocks,
        hits_total: stats.hits_total,
        spilled_total: stats.spilled_total,
        promoted_total: stats.promoted_total,
        io_errors_total: stats.io_errors_total,
        slow_total: stats.slow_total,
    }
}

/// Rates since the look before, of the same start of the shard; else since that start.
fn lane(now: &LaneStats, stats: &ShardStats, since: Option<(Duration, &ShardStats)>) -> LaneFigures {
    let since = since.filter(|(_, before)| before.incarnation == stats.incarnation);
    let before = since.and_then(|(_, before)| before.lanes.iter().find(|lane| lane.name == now.name));
    let time = since.map_or(Duration::from_millis(stats.uptime_ms), |(time, _)| time);
    let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / time.as_secs_f64().max(1e-3);
    LaneFigures {
        lane: now.name.clone(),
        received_bytes_total: now.received_bytes_total,
        sent_bytes_total: now.sent_bytes_total,
        received_bytes_per_s: rate(
            now.received_bytes_total,
            before.map_or(0, |lane| lane.received_bytes_total),
        ),
        sent_bytes_per_s: rate(now.sent_bytes_total, before.map_or(0, |lane| lane.sent_bytes_total)),
        puts_total: now.puts_total,
        gets_total: now.gets_total,
    }
}

fn shards(lines: &[&ShardFigures]) -> Table {
    let mut table = Table::new(&[
        "<SHARD",
        "UP",
        "<EPOCH",
        "<INCARNATION",
        "BLOCKS",
        "PINNED",
        "OPEN",
        "CONDEMNED",
        "VIEWS",
        "WRITERS",
        "STORED",
        "HITS",
        "MISSES",
        "HIT RATE",
        "ATTENDS",
    ]);
    for line in lines {
        let counts = [line.blocks, line.pinned_blocks, line.open_blocks, line.condemned_blocks, line.views];
        let counts =
            counts.into_iter().chain([line.writers, line.stored_total, line.hits_total, line.misses_total]);
        let mut cells = vec![line.shard.clone(), format!("{} s", console::grouped(line.uptime_s))];
        cells.extend([line.epoch.clone(), line.incarnation.clone()]);
        cells.extend(counts.map(console::grouped));
        cells.push(line.hit_rate.map_or_else(|| "-".to_owned(), |rate| format!("{:.1} %", 100.0 * rate)));
        cells.push(console::grouped(line.attend_total));
        table.row(cells);
    }
    table
}

fn tiers(lines: &[&ShardFigures]) -> Table {
    let mut table = Table::new(&[
        "<SHARD",
        "<TIER",
        "USED",
        "CAPACITY",
        "BLOCKS",
        "ALSO ABOVE",
        "LEAVING",
        "RISING",
        "HITS",
        "SPILLED",
        "PROMOTED",
        "I/O ERRORS",
        "SLOW",
    ]);
    for line in lines {
        for tier in &line.tiers {
            let counts = [tier.blocks, tier.also_above, tier.leaving, tier.rising, tier.hits_total];
            let totals = [tier.spilled_total, tier.promoted_total, tier.io_errors_total, tier.slow_total];
            let mut cells = vec![line.shard.clone(), tier.tier.clone()];
            cells.extend([tier.used_bytes, tier.capacity_bytes].map(console::bytes));
            cells.extend(counts.into_iter().chain(totals).map(console::grouped));
            table.row(cells);
        }
    }
    table
}

fn departures(lines: &[&ShardFigures]) -> Table {
    let mut table = Table::new(&[
        "<SHARD",
        "EVICTED FROM MEMORY",
        "(NOT ADMITTED",
        "DISK FULL)",
        "EVICTED FROM DISK",
        "DAMAGED",
        "MOVED",
        "INCOMPLETE",
        "NO ROOM",
    ]);
    for line in lines {
        let went = &line.departures;
        let counts = [
            went.evicted_memory_total,
            went.not_admitted_total,
            went.disk_full_total,
            went.evicted_disk_total,
            went.condemned_total,
            went.moved_total,
            went.incomplete_total,
            went.no_space_total,
        ];
        table.row([line.shard.clone()].into_iter().chain(counts.map(console::grouped)));
    }
    table
}

fn copies(lines: &[&ShardFigures]) -> Table {
    let mut table = Table::new(&[
        "<SHARD",
        "COPIES",
        "SHORT",
        "BACKLOG",
        "UNCHECKED",
        "UNPLACED",
        "SENT",
        "SENT BYTES",
        "FAILED",
        "PEERS DOWN",
        "SCRUBBED",
        "ROUNDS",
        "DAMAGED",
        "<DRAIN",
    ]);
    for line in lines {
        let (copies, scrub) = (&line.copies, &line.scrub);
        let counts = [copies.short, copies.backlog, copies.unchecked, copies.unplaced, copies.sent_total];
        let mut cells = vec![line.shard.clone(), copies.wanted.to_string()];
        cells.extend(counts.map(console::grouped));
        cells.push(console::bytes(copies.sent_bytes_total));
        cells.extend([copies.failed_total, copies.peers_down].map(console::grouped));
        cells.push(format!("{}/{}", scrub.done_blocks, scrub.round_blocks));
        cells.extend([scrub.rounds_total, scrub.bad_total].map(console::grouped));
        cells.push(line.drain.to_owned());
        table.row(cells);
    }
    table
}

fn lanes(lines: &[&ShardFigures]) -> Table {
    let mut table = Table::new(&[
        "<SHARD",
        "<LANE",
        "RECEIVED",
        "RECEIVED/S",
        "SENT",
        "SENT/S",
        "PUT STREAMS",
        "GET STREAMS",
    ]);
    for line in lines {
        for lane in &line.lanes {
            let rate = |bytes: f64| format!("{}/s", console::bytes(bytes as u64));
            table.row([
                line.shard.clone(),
                lane.lane.clone(),
                console::bytes(lane.received_bytes_total),
                rate(lane.received_bytes_per_s),
                console::bytes(lane.sent_bytes_total),
                rate(lane.sent_bytes_per_s),
                console::grouped(lane.puts_total),
                console::grouped(lane.gets_total),
            ]);
        }
    }
    table
}
