//! Counters of a prefill worker.

use longshore_chassis::Metrics;
use prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram};

/// Buckets of the time of one chunk, in seconds.
const CHUNK_BUCKETS: [f64; 14] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// Buckets of what streaming costs, in seconds.
const TAIL_BUCKETS: [f64; 12] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0];

/// Counters of a prefill worker; clones share them.
#[derive(Debug, Clone)]
pub struct PrefillMetrics {
    /// Prompts taken.
    pub requests: Counter,
    /// Prompts refused because the queue was full.
    pub rejected: Counter,
    /// Prompts that ended with an error, cancelled ones excluded.
    pub failed: Counter,
    /// Prompts that their callers gave up.
    pub cancelled: Counter,
    /// Prompts waiting or under way.
    pub queue_depth: Gauge,
    /// Prompt tokens computed.
    pub tokens: Counter,
    /// Prompt tokens found in the store.
    pub cached_tokens: Counter,
    /// Blocks that shards acknowledged.
    pub stored_blocks: Counter,
    /// Blocks sent again because they arrived damaged.
    pub resent_blocks: Counter,
    /// Blocks that lists of sparse policies visited on shards, one count per list.
    pub visited_blocks: Counter,
    /// Bytes of queries and partials of those lists.
    pub shipped_bytes: Counter,
    /// Bytes of summaries that came from shards.
    pub summary_bytes: Counter,
    /// Seconds per chunk.
    pub chunk_seconds: Histogram,
    /// Seconds of each chunk in which its tiles were handed to the store streams: what streaming takes from computing.
    pub hand_over_seconds: Histogram,
    /// Seconds from the end of a prompt's last chunk until its last block was acknowledged: what computing did not hide.
    pub store_tail_seconds: Histogram,
}

impl PrefillMetrics {
    /// Registers the counters.
    pub fn register(metrics: &Metrics) -> Self {
        let own = Self::default();
        let metrics = metrics.sub("longshore_prefill");
        metrics.register("requests", "Prompts taken", own.requests.clone());
        metrics.register("rejected", "Prompts refused because the queue was full", own.rejected.clone());
        metrics.register("failed", "Prompts that ended with an error", own.failed.clone());
        metrics.register("cancelled", "Prompts that their callers gave up", own.cancelled.clone());
        metrics.register("queue_depth", "Prompts waiting or under way", own.queue_depth.clone());
        metrics.register("tokens", "Prompt tokens computed", own.tokens.clone());
        metrics.register("cached_tokens", "Prompt tokens found in the store", own.cached_tokens.clone());
        metrics.register("stored_blocks", "Blocks that shards acknowledged", own.stored_blocks.clone());
        metrics.register(
            "resent_blocks",
            "Blocks sent again because they arrived damaged",
            own.resent_blocks.clone(),
        );
        metrics.register(
            "visited_blocks",
            "Blocks that sparse policies visited on shards",
            own.visited_blocks.clone(),
        );
        metrics.register(
            "shipped_bytes",
            "Bytes of queries and partials of those visits",
            own.shipped_bytes.clone(),
        );
        metrics.register(
            "summary_bytes",
            "Bytes of summaries that came from shards",
            own.summary_bytes.clone(),
        );
        metrics.register("chunk_seconds", "Seconds per chunk", own.chunk_seconds.clone());
        metrics.register(
            "hand_over_seconds",
            "Seconds of each chunk in which its tiles were handed to the store streams",
            own.hand_over_seconds.clone(),
        );
        metrics.register(
            "store_tail_seconds",
            "Seconds from the end of a prompt's last chunk until its last block was acknowledged",
            own.store_tail_seconds.clone(),
        );
        own
    }
}

impl Default for PrefillMetrics {
    /// Counters that nobody reads.
    fn default() -> Self {
        Self {
            requests: Counter::default(),
            rejected: Counter::default(),
            failed: Counter::default(),
            cancelled: Counter::default(),
            queue_depth: Gauge::default(),
            tokens: Counter::default(),
            cached_tokens: Counter::default(),
            stored_blocks: Counter::default(),
            resent_blocks: Counter::default(),
            visited_blocks: Counter::default(),
            shipped_bytes: Counter::default(),
            summary_bytes: Counter::default(),
            chunk_seconds: Histogram::new(CHUNK_BUCKETS),
            hand_over_seconds: Histogram::new(TAIL_BUCKETS),
            store_tail_seconds: Histogram::new(TAIL_BUCKETS),
        }
    }
}
