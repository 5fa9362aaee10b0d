//! Counters of a shard, and its occupancy as it is at the moment of a scrape.

mod shares;
mod waiting;

use std::{
    fmt,
    sync::{Arc, Weak},
};

use longshore_blocks::{pool::PoolStats, tier::Tier};
use longshore_chassis::{Figure, Metrics, encode_counters, encode_gauges};
use longshore_proto::types::{CopyStats, PutOutcome, RepairStats};
use prometheus_client::{
    collector::Collector,
    encoding::DescriptorEncoder,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
};

use crate::{
    ShardIdentity,
    lanes::{LaneCounters, UnderWay},
    lifetime::STREAMS,
    store::Store,
};

/// Buckets of the time of one attention query, in seconds.
const ATTEND_BUCKETS: [f64; 16] = [
    0.000_025, 0.000_05, 0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 5.0,
];

/// Prefix of every name.
const PREFIX: &str = "longshore_kvstore";

/// Counters of a shard; clones share them.
#[derive(Debug, Clone)]
pub(crate) struct StoreMetrics {
    /// Bytes of tiles stored.
    pub(crate) stored_bytes: Counter,
    /// Blocks refused because a tile was bad.
    pub(crate) corrupt_blocks: Counter,
    /// Attention queries answered.
    pub(crate) attend_queries: Counter,
    /// Attention queries refused or failed.
    pub(crate) attend_failed: Counter,
    /// Attention queries under way.
    pub(crate) attend_running: Gauge,
    /// Bytes of partial results sent.
    pub(crate) attend_bytes: Counter,
    /// Blocks that the lists of sparse items visited, one count per list.
    pub(crate) attend_visited_blocks: Counter,
    /// Summaries made, one per block and layer.
    pub(crate) summaries_made: Counter,
    /// Bytes of summaries sent.
    pub(crate) summary_bytes: Counter,
    /// Seconds per attention query, waiting included.
    pub(crate) attend_seconds: Histogram,
    /// Seconds that a query waited for its first turn to compute.
    pub(crate) attend_queue_seconds: Histogram,
    /// Seconds that queries computed.
    pub(crate) attend_compute_seconds: Histogram,
    /// Reads from the disk tier that failed.
    pub(crate) disk_read_errors: Counter,
    /// Writes to the disk tier that failed.
    pub(crate) disk_write_errors: Counter,
    /// Reads and writes of the disk tier that took longer than somebody waits.
    pub(crate) disk_slow: Counter,
    /// Blocks that the scrubber checked, by tier.
    scrubbed_blocks: Family<[(&'static str, &'static str); 1], Counter>,
    /// Blocks that the scrubber found damaged, by tier.
    scrub_bad_blocks: Family<[(&'static str, &'static str); 1], Counter>,
    /// Streams ended because they made no progress, by kind.
    stalled_streams: Family<[(&'static str, &'static str); 1], Counter>,
    /// Rounds that the scrubber finished.
    pub(crate) scrub_rounds: Counter,
    scrub_done: Gauge,
    scrub_total: Gauge,
    /// Tiles by lane.
    pub(crate) lanes: LaneCounters,
}

impl StoreMetrics {
    pub(crate) fn register(metrics: &Metrics) -> Self {
        let own = Self {
            stored_bytes: Counter::default(),
            corrupt_blocks: Counter::default(),
            attend_queries: Counter::default(),
            attend_failed: Counter::default(),
            attend_running: Gauge::default(),
            attend_bytes: Counter::default(),
            attend_visited_blocks: Counter::default(),
            summaries_made: Counter::default(),
            summary_bytes: Counter::default(),
            attend_seconds: Histogram::new(ATTEND_BUCKETS),
            attend_queue_seconds: Histogram::new(ATTEND_BUCKETS),
            attend_compute_seconds: Histogram::new(ATTEND_BUCKETS),
            disk_read_errors: Counter::default(),
            disk_write_errors: Counter::default(),
            disk_slow: Counter::default(),
            scrubbed_blocks: Family::default(),
            scrub_bad_blocks: Family::default(),
            stalled_streams: Family::default(),
            scrub_rounds: Counter::default(),
            scrub_done: Gauge::default(),
            scrub_total: Gauge::default(),
            lanes: LaneCounters::register(&metrics.sub(PREFIX)),
        };
        let metrics = metrics.sub(PREFIX);
        own.register_upkeep(&metrics);
        metrics.register("stored_bytes", "Bytes of tiles stored", own.stored_bytes.clone());
        metrics.register(
            "corrupt_blocks",
            "Blocks refused because a tile was bad",
            own.corrupt_blocks.clone(),
        );
        metrics.register("attend_queries", "Attention queries answered", own.attend_queries.clone());
        metrics.register("attend_failed", "Attention queries refused or failed", own.attend_failed.clone());
        metrics.register("attend_running", "Attention queries under way", own.attend_running.clone());
        metrics.register("attend_bytes", "Bytes of partial results sent", own.attend_bytes.clone());
        metrics.register(
            "attend_visited_blocks",
            "Blocks that lists of sparse attention visited",
            own.attend_visited_blocks.clone(),
        );
        metrics.register("summaries_made", "Summaries made", own.summaries_made.clone());
        metrics.register("summary_bytes", "Bytes of summaries sent", own.summary_bytes.clone());
        metrics.register("attend_seconds", "Seconds per attention query", own.attend_seconds.clone());
        metrics.register(
            "attend_queue_seconds",
            "Seconds that a query waited before it computed",
            own.attend_queue_seconds.clone(),
        );
        metrics.register(
            "attend_compute_seconds",
            "Seconds that a query computed",
            own.attend_compute_seconds.clone(),
        );
        own
    }

    fn register_upkeep(&self, metrics: &Metrics) {
        let counters = [
            ("disk_read_errors", "Reads from the disk tier that failed", &self.disk_read_errors),
            ("disk_write_errors", "Writes to the disk tier that failed", &self.disk_write_errors),
            ("disk_slow", "Reads and writes of the disk tier that took too long", &self.disk_slow),
            ("scrub_rounds", "Rounds that the scrubber finished", &self.scrub_rounds),
        ];
        counters.into_iter().for_each(|(name, help, counter)| metrics.register(name, help, counter.clone()));
        metrics.register(
            "stalled_streams",
            "Streams ended because they made no progress, by kind",
            self.stalled_streams.clone(),
        );
        metrics.register("scrubbed_blocks", "Blocks that the scrubber checked", self.scrubbed_blocks.clone());
        metrics.register(
            "scrub_bad_blocks",
            "Blocks that the scrubber found damaged",
            self.scrub_bad_blocks.clone(),
        );
        metrics.register("scrub_done_blocks", "Blocks of this round so far", self.scrub_done.clone());
        metrics.register("scrub_round_blocks", "Blocks of this round", self.scrub_total.clone());
    }

    /// A stream of one of [`STREAMS`] was ended because it made no progress.
    pub(crate) fn stalled(&self, stream: &'static str) {
        self.stalled_streams.get_or_create(&[("stream", stream)]).inc();
    }

    /// Streams ended because they made no progress.
    pub(crate) fn stalled_total(&self) -> u64 {
        STREAMS.iter().map(|stream| self.stalled_streams.get_or_create(&[("stream", *stream)]).get()).sum()
    }

    /// How far the scrubber is.
    pub(crate) fn scrub_progress(&self, done: usize, total: usize) {
        self.scrub_done.set(i64::try_from(done).unwrap_or(i64::MAX));
        self.scrub_total.set(i64::try_from(total).unwrap_or(i64::MAX));
    }

    /// The scrubber checked a block.
    pub(crate) fn scrubbed(&self, tier: Tier, sound: bool) {
        let label = [("tier", tier.name())];
        self.scrubbed_blocks.get_or_create(&label).inc();
        if !sound {
            self.scrub_bad_blocks.get_or_create(&label).inc();
        }
    }

    /// Blocks that the scrubber checked and found damaged, over all tiers.
    pub(crate) fn scrub_totals(&self) -> (u64, u64) {
        let sum = |family: &Family<[(&'static str, &'static str); 1], Counter>| {
            let tiers =
                [Tier::Dram, Tier::Disk].map(|tier| family.get_or_create(&[("tier", tier.name())]).get());
            tiers.iter().sum()
        };
        (sum(&self.scrubbed_blocks), sum(&self.scrub_bad_blocks))
    }

    /// Blocks of the scrubber's round, and how many of them are done.
    pub(crate) fn scrub_round(&self) -> (u64, u64) {
        (self.scrub_done.get().unsigned_abs(), self.scrub_total.get().unsigned_abs())
    }

    /// A block was completed.
    pub(crate) fn stored(&self, identity: &ShardIdentity) {
        self.stored_bytes.inc_by(identity.tile_shape.bytes() as u64 * u64::from(identity.layers));
    }

    /// A block was refused or not needed.
    pub(crate) fn refused(&self, outcome: PutOutcome) {
        if outcome == PutOutcome::Corrupt {
            self.corrupt_blocks.inc();
        }
    }
}

/// Reports the pool at every scrape, as long as the shard lives.
pub(crate) fn register_occupancy(metrics: &Metrics, store: &Arc<Store>) {
    let occupancy = Occupancy { store: Arc::downgrade(store) };
    metrics.sub(PREFIX).with(|registry| registry.register_collector(Box::new(occupancy)));
}

#[derive(Debug)]
struct Occupancy {
    store: Weak<Store>,
}

impl Collector for Occupancy {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(store) = self.store.upgrade() else { return Ok(()) };
        let stats = store.with_pool(|pool, _| pool.stats());
        let (repair, copies) = (store.repair.stats(), store.repair.copies(stats.blocks, stats.stored_total));
        shares::encode(&mut encoder, &stats)?;
        waiting::encode(&mut encoder, &store)?;
        let tiles = store.listeners.under_way();
        let lane = tiles.map(tile_gauges).into_iter().flatten();
        let gauges_below = store.disk().map(|_| disk_gauges(&stats)).into_iter().flatten();
        let gauges = gauges(&stats).into_iter().chain(repair_gauges(&repair, &copies)).chain(lane);
        encode_gauges(&mut encoder, gauges.chain(gauges_below))?;
        let counters_below = store.disk().map(|_| disk_counters(&stats)).into_iter().flatten();
        let counters = counters(&stats).into_iter().chain(repair_counters(&repair)).chain(counters_below);
        encode_counters(&mut encoder, counters.chain(tiles.into_iter().flat_map(tile_counters)))
    }
}

fn gauges(stats: &PoolStats) -> [Figure; 10] {
    [
        ("capacity_bytes", "Bytes that tiles and summaries may occupy", stats.budget_bytes),
        ("used_bytes", "Bytes that tiles and summaries occupy", stats.used_bytes),
        ("kept_summary_bytes", "Bytes of summaries beside blocks, of those used", stats.note_bytes),
        ("blocks", "Complete blocks", stats.blocks),
        ("pinned_blocks", "Complete blocks that a view keeps", stats.pinned_blocks),
        ("open_blocks", "Blocks being written", stats.open_blocks),
        ("condemned_blocks", "Damaged blocks that wait for their views to end", stats.condemned_blocks),
        ("writers", "Put streams", stats.writers),
        ("views", "Open views", stats.views),
        ("closed_views", "Views that were closed and whose blocks readers still keep", stats.closed_views),
    ]
}

fn tile_gauges(tiles: UnderWay) -> [Figure; 3] {
    [
        ("tile_connections", "Open connections of the tcp lane", tiles.connections),
        (
            "tile_bytes_in_flight",
            "Bytes of tiles that come over the tcp lane and are not taken yet, or go",
            tiles.bytes_in_flight,
        ),
        (
            "tile_budget_taken_bytes",
            "Bytes of what tiles on their way may take of memory, on all lanes between processes",
            tiles.budget_taken_bytes,
        ),
    ]
}

fn tile_counters(tiles: UnderWay) -> [Figure; 4] {
    [
        ("tile_streams_refused", "Tile streams that there was no room for on the way", tiles.refused_total),
        (
            "unread_connections",
            "gRPC connections closed because an answer was not read",
            tiles.ended_unread_total,
        ),
        (
            "exchanged_partials_bytes",
            "Bytes of partials that answers named to be exchanged over the lane nccl",
            tiles.exchanged_partials_bytes_total,
        ),
        (
            "attend_epochs_lost",
            "Epochs of the lane nccl that were over before all partials named in them went",
            tiles.attend_epochs_lost_total,
        ),
    ]
}

fn counters(stats: &PoolStats) -> [Figure; 9] {
    [
        ("stored_blocks", "Blocks stored", stats.stored_total),
        ("duplicate_blocks", "Blocks that came although they were held", stats.duplicate_total),
        ("dropped_blocks", "Blocks dropped before they were complete", stats.dropped_total),
        ("evicted_blocks", "Blocks evicted", stats.evicted_total),
        ("condemned", "Blocks whose stored tiles failed a check", stats.condemned_total),
        ("no_space", "Blocks refused for want of room", stats.no_space_total),
        ("lookup_hits", "Lookups of blocks that were held", stats.hits_total),
        ("lookup_misses", "Lookups of blocks that were not held", stats.misses_total),
        ("expired_views", "Views that nobody used in time", stats.expired_views_total),
    ]
}

fn disk_gauges(stats: &PoolStats) -> [Figure; 6] {
    let disk = &stats.disk;
    [
        ("disk_capacity_bytes", "Bytes that blocks may occupy on disk", disk.budget_bytes),
        ("disk_used_bytes", "Bytes that blocks occupy on disk", disk.used_bytes),
        ("disk_blocks", "Complete blocks on disk and not in memory", disk.blocks),
        ("disk_copies", "Blocks on disk and in memory", disk.copies),
        ("disk_leaving_blocks", "Blocks being written to disk", disk.leaving),
        ("disk_coming_blocks", "Blocks being read into memory", disk.coming),
    ]
}

fn disk_counters(stats: &PoolStats) -> [Figure; 8] {
    let disk = &stats.disk;
    [
        ("disk_lookup_hits", "Lookups of blocks that were on disk only", disk.hits_total),
        ("spilled_blocks", "Blocks written to disk", disk.spilled_total),
        ("spills_failed", "Blocks whose write to disk failed", disk.spills_failed_total),
        ("spills_refused", "Blocks that were not worth a write", disk.spills_refused_total),
        ("spills_skipped", "Blocks for which disk had no room or paused", disk.spills_skipped_total),
        ("promoted_blocks", "Blocks read into memory", disk.promoted_total),
        ("disk_evicted_blocks", "Blocks evicted from disk, of all evicted", disk.evicted_total),
        ("restored_blocks", "Blocks that the start found on disk", disk.restored_total),
    ]
}

fn repair_gauges(stats: &RepairStats, copies: &CopyStats) -> [Figure; 5] {
    [
        (
            "repair_unchecked_blocks",
            "Blocks whose copies the running search did not look at yet",
            stats.unchecked_blocks,
        ),
        ("repair_backlog_blocks", "Missing copies that are to be sent", stats.backlog_blocks),
        ("peers_down", "Other shards that are not reached", stats.peers_down),
        ("copies_short", "Copies that the last search found missing and did not send", copies.short),
        ("copies_unsearched_blocks", "Blocks that no search looked at yet", copies.unsearched_blocks),
    ]
}

fn repair_counters(stats: &RepairStats) -> [Figure; 5] {
    [
        ("repair_sent_blocks", "Copies sent to other shards", stats.sent_total),
        ("repair_sent_bytes", "Bytes of copies sent to other shards", stats.sent_bytes_total),
        ("repair_failed_blocks", "Copies that other shards did not take", stats.failed_total),
        ("repair_dropped_blocks", "Own copies dropped because their owners hold theirs", stats.dropped_total),
        ("repair_passes", "Searches for missing copies that went through all blocks", stats.passes_total),
    ]
}
