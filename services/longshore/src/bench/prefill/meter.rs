//! Watches the attention of one prompt: what was visited, how long it took, and what visiting everything would have taken.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use longshore_attention::{AttendItem, ExactBlock, Executor, PlanInput, WorkList};
use longshore_engine::{AttendTimes, AttentionProbe, Error, StepInput, StepObserver};
use serde::Serialize;

/// Pairs of a row of a query head and something that it visits.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct Visited {
    /// Keys.
    pub(super) keys: u64,
    /// Means of blocks.
    pub(super) means: u64,
}

/// One layer, over all chunks.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct LayerTimes {
    /// Seconds of making lists.
    pub(super) selection: f64,
    /// Seconds of attending.
    pub(super) attend: f64,
    /// What was visited; nothing where the exact path computed.
    pub(super) visited: Visited,
}

/// Sums over the chunks of one prompt.
#[derive(Debug)]
pub(super) struct Meter {
    executor: Arc<dyn Executor>,
    pub(super) layers: Vec<LayerTimes>,
    /// Dense attention beside: seconds, and (row, head, key) triples.
    dense: (f64, u64),
    /// Time of that, which is not the policy's.
    pub(super) aside: Duration,
    /// Chunks between two samples of dense attention; `None`: no samples.
    sample_every: Option<usize>,
    chunk: usize,
}

impl Meter {
    /// Samples dense attention in the middle layer of every `sample_every`-th chunk.
    pub(super) fn new(executor: Arc<dyn Executor>, layers: usize, sample_every: Option<usize>) -> Self {
        let layers = vec![LayerTimes::default(); layers];
        Self { executor, layers, dense: (0.0, 0), aside: Duration::ZERO, sample_every, chunk: 0 }
    }

    /// Seconds for a (row, head, key) triple when everything is visited; `None` without a sample.
    pub(super) fn dense_rate(&self) -> Option<f64> {
        (self.dense.1 > 0).then(|| self.dense.0 / self.dense.1 as f64)
    }

    /// Visits everything that the rows see, as the exact path does.
    fn sample_dense(&mut self, plan: &PlanInput<'_>) -> Result<(), longshore_attention::Error> {
        let began = Instant::now();
        let block_tokens = plan.kv.shape().block_tokens as u64;
        let end = plan.queries.first_position + plan.queries.rows() as u64;
        let exact = (0..end.div_ceil(block_tokens)).map(|block| ExactBlock {
            tile: block as u32,
            first_position: block * block_tokens,
            len: (end - block * block_tokens).min(block_tokens) as u32,
        });
        let work = WorkList { exact: exact.collect(), ..WorkList::default() };
        let item = AttendItem { queries: plan.queries, kv: plan.kv, work: &work, initial: None };
        let timed = Instant::now();
        self.executor.attend(&[item])?;
        self.dense.0 += timed.elapsed().as_secs_f64();
        let heads = plan.queries.shape.query_heads();
        self.dense.1 += causal(plan.queries.first_position, plan.queries.rows() as u64) * heads as u64;
        self.aside += began.elapsed();
        Ok(())
    }
}

/// (Row, key) pairs of rows `first .. first + rows`.
pub(super) fn causal(first: u64, rows: u64) -> u64 {
    rows * first + rows * (rows + 1) / 2
}

impl StepObserver for Meter {
    fn layer_done(&mut self, layer: usize, _batch: &[StepInput<'_>]) -> Result<(), Error> {
        self.chunk += usize::from(layer == 0);
        Ok(())
    }

    fn attended(&mut self, layer: usize, times: &AttendTimes) {
        self.layers[layer].selection += times.plan.as_secs_f64();
        self.layers[layer].attend += (times.local + times.merge).as_secs_f64();
    }

    fn probes(&self) -> bool {
        true
    }

    fn probe(&mut self, probe: &AttentionProbe<'_>) {
        let pairs = probe.work.visited_pairs(&probe.plan.queries);
        let visited = &mut self.layers[probe.layer].visited;
        visited.keys += pairs.keys;
        visited.means += pairs.means;
        let due = self.sample_every.is_some_and(|every| self.chunk.is_multiple_of(every));
        if due && probe.layer == self.layers.len() / 2 {
            self.sample_dense(&probe.plan).expect("what a policy attended to can be attended to exactly");
        }
    }
}
