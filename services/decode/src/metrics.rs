//! Counters of a decode worker.

use std::time::Duration;

use longshore_chassis::Metrics;
use longshore_engine::{AttendTimes, Error, StepInput, StepObserver};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram};

/// Buckets of the time of one step, in seconds.
const STEP_BUCKETS: [f64; 13] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];
/// Buckets of the rows of one step.
const ROW_BUCKETS: [f64; 10] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0];

/// Buckets of the parts of one layer's attention, in seconds.
const ATTEND_BUCKETS: [f64; 13] =
    [0.000_01, 0.000_025, 0.000_05, 0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0];

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
    /// Seconds from a layer's first query to its last answer, where shards were asked.
    pub attend_round_trip_seconds: Histogram,
    /// Of them, seconds with nothing left to compute here.
    pub attend_wait_seconds: Histogram,
    /// Seconds over a layer's local blocks.
    pub attend_local_seconds: Histogram,
    /// Seconds that folding a layer's partials took.
    pub attend_merge_seconds: Histogram,
    /// Blocks that answers under policies with streaming heads visited: one count per row, layer and KV head.
    pub visited_blocks: Counter,
    /// Blocks that exact attention would have visited for them.
    pub causal_blocks: Counter,
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
        metrics.register(
            "visited_blocks",
            "Blocks that answers under policies with streaming heads visited, by row, layer and KV head",
            own.visited_blocks.clone(),
        );
        metrics.register(
            "causal_blocks",
            "Blocks that exact attention would have visited for answers under policies with streaming heads",
            own.causal_blocks.clone(),
        );
        metrics.register("step_seconds", "Seconds per step", own.step_seconds.clone());
        metrics.register("step_rows", "Rows per step", own.step_rows.clone());
        for (name, help, histogram) in [
            (
                "attend_round_trip_seconds",
                "Seconds from a layer's first query to its last answer",
                &own.attend_round_trip_seconds,
            ),
            (
                "attend_wait_seconds",
                "Seconds of a layer that only waited for shards",
                &own.attend_wait_seconds,
            ),
            (
                "attend_local_seconds",
                "Seconds over a layer's local blocks; of rows that stay on a GPU, seconds to queue them",
                &own.attend_local_seconds,
            ),
            (
                "attend_merge_seconds",
                "Seconds that folding a layer's partials took",
                &own.attend_merge_seconds,
            ),
        ] {
            metrics.register(name, help, histogram.clone());
        }
        own
    }
}

impl StepObserver for &DecodeMetrics {
    fn layer_done(&mut self, _layer: usize, _batch: &[StepInput<'_>]) -> Result<(), Error> {
        Ok(())
    }

    fn attended(&mut self, _layer: usize, times: &AttendTimes) {
        if times.round_trip > Duration::ZERO {
            self.attend_round_trip_seconds.observe(times.round_trip.as_secs_f64());
            self.attend_wait_seconds.observe(times.waited.as_secs_f64());
        }
        self.attend_local_seconds.observe(times.local.as_secs_f64());
        self.attend_merge_seconds.observe(times.merge.as_secs_f64());
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
            attend_round_trip_seconds: Histogram::new(ATTEND_BUCKETS),
            attend_wait_seconds: Histogram::new(ATTEND_BUCKETS),
            attend_local_seconds: Histogram::new(ATTEND_BUCKETS),
            attend_merge_seconds: Histogram::new(ATTEND_BUCKETS),
            visited_blocks: Counter::default(),
            causal_blocks: Counter::default(),
        }
    }
}
