//! The figures as tables for people.

use super::ShardFigures;
use crate::{console, store::table::Table};

/// Every table, in the order in which they are shown.
pub(super) fn all(lines: &[&ShardFigures]) -> [Table; 6] {
    [shards(lines), tiers(lines), departures(lines), copies(lines), tenants(lines), lanes(lines)]
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
        "CLOSED",
        "WRITERS",
        "WAITING",
        "STORED",
        "HITS",
        "MISSES",
        "HIT RATE",
        "ATTENDS",
    ]);
    for line in lines {
        let counts = [line.blocks, line.pinned_blocks, line.open_blocks, line.condemned_blocks, line.views];
        let counts = counts.into_iter().chain([line.closed_views, line.writers, line.waiting_turns]);
        let counts = counts.chain([line.stored_total, line.hits_total, line.misses_total]);
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
        "UNSEARCHED",
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
        let counts = [copies.short, copies.unsearched, copies.backlog, copies.unchecked, copies.unplaced];
        let mut cells = vec![line.shard.clone(), copies.wanted.to_string()];
        cells.extend(counts.into_iter().chain([copies.sent_total]).map(console::grouped));
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

fn tenants(lines: &[&ShardFigures]) -> Table {
    let mut table =
        Table::new(&["<SHARD", "TENANTS", "KEPT", "MOST KEPT", "REFUSED", "PROMISES BROKEN", "STALLED"]);
    for line in lines {
        let tenants = &line.tenants;
        table.row([
            line.shard.clone(),
            console::grouped(tenants.tenants),
            console::bytes(tenants.kept_bytes),
            console::bytes(tenants.most_kept_bytes),
            console::grouped(tenants.refused_total),
            console::grouped(tenants.broken_promises_total),
            console::grouped(tenants.stalled_streams_total),
        ]);
    }
    table
}
