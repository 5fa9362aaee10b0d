//! What a shard tells about itself.

use longshore_blocks::{
    pool::{PoolStats, Resource},
    tier::Tier,
};
use longshore_proto::types::{CopyStats, DepartureStats, ScrubStats, ShardStats, TenantStats, TierStats};

use crate::store::Store;

/// Occupancy and counters of a shard.
pub(crate) fn of(store: &Store) -> ShardStats {
    let (pool, incarnation, placed, room_bytes) = store.with_inventory(|pool, inventory, now| {
        (pool.stats(), inventory.incarnation(), inventory.placed_blocks(), pool.room_bytes(now))
    });
    ShardStats {
        shard_id: store.identity().shard_id.0.clone(),
        capacity_bytes: pool.budget_bytes,
        used_bytes: pool.used_bytes,
        blocks: pool.blocks,
        pinned_blocks: pool.pinned_blocks,
        open_blocks: pool.open_blocks,
        views: pool.views,
        closed_views: pool.closed_views,
        waiting_turns: store.all_turns().map(|(_, turns)| turns.waiting() as u64).sum(),
        stored_total: pool.stored_total,
        evicted_total: pool.evicted_total,
        corrupt_total: store.metrics.corrupt_blocks.get() + pool.condemned_total,
        hits_total: pool.hits_total,
        misses_total: pool.misses_total,
        attend_total: store.metrics.attend_queries.get(),
        tiers: std::iter::once(dram(&pool)).chain(store.disk().map(|_| disk(store, &pool))).collect(),
        scrub: scrub(store),
        incarnation,
        shard_map_epoch: *store.identity().epoch.borrow(),
        repair: store.repair.stats(),
        room_bytes,
        summary_bytes: pool.note_bytes,
        uptime_ms: store.elapsed_us() / 1_000,
        writers: pool.writers,
        condemned_blocks: pool.condemned_blocks,
        departures: departures(store, &pool),
        lanes: store.metrics.lanes.stats(),
        copies: CopyStats {
            unplaced_blocks: pool.blocks.saturating_sub(placed),
            ..store.repair.copies(pool.blocks, pool.stored_total)
        },
        drain: store.drain.stats(&pool, placed, store.config().repair.drain_settle_ms),
        scrub_findings: store.scrub.findings(),
        tenants: tenants(store, &pool),
    }
}

fn tenants(store: &Store, pool: &PoolStats) -> TenantStats {
    let kept = pool.shares[Resource::KeptBlocks as usize];
    TenantStats {
        tenants: pool.tenants,
        kept_bytes: kept.taken * store.block_bytes(),
        most_kept_bytes: kept.most * store.block_bytes(),
        refused_total: pool.shares.iter().map(|share| share.refused_total).sum(),
        broken_promises_total: pool.broken_promises_total,
        stalled_streams_total: store.metrics.stalled_total(),
    }
}

fn departures(store: &Store, pool: &PoolStats) -> DepartureStats {
    DepartureStats {
        evicted_memory_total: pool.evicted_total - pool.disk.evicted_total,
        evicted_disk_total: pool.disk.evicted_total,
        condemned_total: pool.condemned_total,
        moved_total: store.repair.stats().dropped_total,
        incomplete_total: pool.dropped_total,
        no_space_total: pool.no_space_total,
        duplicate_total: pool.duplicate_total,
    }
}

fn dram(pool: &PoolStats) -> TierStats {
    TierStats {
        name: Tier::Dram.name().to_owned(),
        capacity_bytes: pool.budget_bytes,
        used_bytes: pool.used_bytes,
        blocks: pool.blocks + pool.condemned_blocks - pool.disk.blocks,
        leaving_blocks: pool.disk.leaving,
        hits_total: pool.hits_total - pool.disk.hits_total,
        evicted_total: pool.evicted_total - pool.disk.evicted_total,
        ..TierStats::default()
    }
}

fn disk(store: &Store, pool: &PoolStats) -> TierStats {
    let disk = &pool.disk;
    TierStats {
        name: Tier::Disk.name().to_owned(),
        capacity_bytes: disk.budget_bytes,
        used_bytes: disk.used_bytes,
        blocks: disk.blocks,
        copies: disk.copies,
        leaving_blocks: 0,
        rising_blocks: disk.coming,
        hits_total: disk.hits_total,
        evicted_total: disk.evicted_total,
        spilled_total: disk.spilled_total,
        promoted_total: disk.promoted_total,
        restored_total: disk.restored_total,
        io_errors_total: store.metrics.disk_read_errors.get() + store.metrics.disk_write_errors.get(),
        slow_total: store.metrics.disk_slow.get(),
        refused_total: disk.spills_refused_total,
        skipped_total: disk.spills_skipped_total,
    }
}

fn scrub(store: &Store) -> ScrubStats {
    let ((done_blocks, round_blocks), (checked_total, bad_total)) =
        (store.metrics.scrub_round(), store.metrics.scrub_totals());
    let rounds_total = store.metrics.scrub_rounds.get();
    ScrubStats { done_blocks, round_blocks, rounds_total, checked_total, bad_total }
}
