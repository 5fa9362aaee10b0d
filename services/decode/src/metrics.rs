//! Counters of a decode worker.

use longshore_chassis::Metrics;
use prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram};

/// Buckets of the time of one step, in seconds.
const STEP_BUCKETS: [f64; 13] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];
/// Buckets of the rows of one step.
const ROW_BUCKETS: [f64; 10] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0];

/// Counters of a decode worker; clones share them.
#[derive(Debug, Clone)]
pub struct DecodeMetrics {
    /// Sequences taken.
    pub requests: Counter,
    /// Sequences refused because the queue was full.
    pub rejected: Counter,
    /// Sequences that ended with an error, cancelled ones excluded.
    pub failed: Counter,
    /// Sequences that their callers gave up.
    pub cancelled: Counter,
    /// Sequences waiting or under way.
    pub queue_depth: Gauge,
    /// Sequences that generate.
    pub active_sequences: Gauge,
    /// Sequences that wait for their reader.
    pub paused_sequences: Gauge,
    /// Tokens generated.
    pub tokens: Counter,
    /// Blocks that shards acknowledged.
    pub stored_blocks: Counter,
    /// Blocks that a shard did not take at the first attempt.
    pub put_failures: Counter,
    /// Seconds per step.
    pub step_seconds: Histogram,
    /// Rows per step.
    pub step_rows: Histogram,
}

impl DecodeMetrics {
    /// Registers the counters.
    pub fn register(metrics: &Metrics) -> Self {
        let own = Self::default();
        let metrics = metrics.sub("longshore_decode");
        metrics.register("requests", "Sequences taken", own.requests.clone());
        metrics.register("rejected", "Sequences refused because the queue was full", own.rejected.clone());
        metrics.register("failed", "Sequences that ended with an error", own.failed.clone());
        metrics.register("cancelled", "Sequences that their callers gave up", own.cancelled.clone());
        metrics.register("queue_depth", "Sequences waiting or under way", own.queue_depth.clone());
        metrics.register("active_sequences", "Sequences that generate", own.active_sequences.clone());
        metrics.register(
            "paused_sequences",
            "Sequences that wait for their reader",
            own.paused_sequences.clone(),
        );
        metrics.register("tokens", "Tokens generated", own.tokens.clone());
        metrics.register("stored_blocks", "Blocks that shards acknowledged", own.stored_blocks.clone());
        metrics.register("put_failures", "Attempts to store a block that failed", own.put_failures.clone());
        metrics.register("step_seconds", "Seconds per step", own.step_seconds.clone());
        metrics.register("step_rows", "Rows per step", own.step_rows.clone());
        own
    }
}

impl Default for DecodeMetrics {
    /// Counters that nobody reads.
    fn default() -> Self {
        Self {
            requests: Counter::default(),
            rejected: Counter::default(),
            failed: Counter::default(),
            cancelled: Counter::default(),
            queue_depth: Gauge::default(),
            active_sequences: Gauge::default(),
            paused_sequences: Gauge::default(),
            tokens: Counter::default(),
            stored_blocks: Counter::default(),
            put_failures: Counter::default(),
            step_seconds: Histogram::new(STEP_BUCKETS),
            step_rows: Histogram::new(ROW_BUCKETS),
        }
    }
}
