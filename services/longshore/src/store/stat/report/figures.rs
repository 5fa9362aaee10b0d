//! What a shard says, as figures, and their sum.

use std::time::Duration;

use longshore_proto::types::{LaneStats, ShardStats, TierStats};

use super::{Copies, Departures, LaneFigures, Scrub, ShardFigures, Tenants, TierFigures};

impl ShardFigures {
    pub(super) fn of(id: &str, stats: &ShardStats, since: Option<(Duration, &ShardStats)>) -> Self {
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
            closed_views: stats.closed_views,
            waiting_turns: stats.waiting_turns,
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
                unsearched: copies.unsearched_blocks,
                unplaced: copies.unplaced_blocks,
                sent_total: repair.sent_total,
                sent_bytes_total: repair.sent_bytes_total,
                failed_total: repair.failed_total,
                peers_down: repair.peers_down,
            },
            tenants: Tenants {
                tenants: stats.tenants.tenants,
                kept_bytes: stats.tenants.kept_bytes,
                most_kept_bytes: stats.tenants.most_kept_bytes,
                refused_total: stats.tenants.refused_total,
                broken_promises_total: stats.tenants.broken_promises_total,
                stalled_streams_total: stats.tenants.stalled_streams_total,
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

    pub(super) fn sum(all: &[Self]) -> Self {
        let mut sum = Self { shard: "total".to_owned(), ..Self::default() };
        for one in all {
            sum.uptime_s = sum.uptime_s.max(one.uptime_s);
            for (into, from) in sum.counts_mut().into_iter().zip(one.clone().counts_mut()) {
                *into += *from;
            }
            sum.copies.wanted = sum.copies.wanted.max(one.copies.wanted);
            sum.tenants.tenants = sum.tenants.tenants.max(one.tenants.tenants);
            sum.tenants.most_kept_bytes = sum.tenants.most_kept_bytes.max(one.tenants.most_kept_bytes);
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
    fn counts_mut(&mut self) -> [&mut u64; 36] {
        let (went, copies, scrub) = (&mut self.departures, &mut self.copies, &mut self.scrub);
        let tenants = &mut self.tenants;
        [
            &mut self.blocks,
            &mut self.pinned_blocks,
            &mut self.open_blocks,
            &mut self.condemned_blocks,
            &mut self.views,
            &mut self.closed_views,
            &mut self.waiting_turns,
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
            &mut copies.unsearched,
            &mut copies.unplaced,
            &mut copies.sent_total,
            &mut copies.sent_bytes_total,
            &mut copies.failed_total,
            &mut tenants.kept_bytes,
            &mut tenants.refused_total,
            &mut tenants.broken_promises_total,
            &mut tenants.stalled_streams_total,
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
