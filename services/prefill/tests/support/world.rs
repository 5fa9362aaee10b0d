//! A prefill worker on a cluster of shards in memory.

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use longshore_attention::{KvDtype, PrefillPolicy, TileShape};
use longshore_chassis::Tasks;
use longshore_engine::{
    Logits, Sequence, StepInput,
    testing::{Bodies, TestCluster, reference_tiles},
};
use longshore_fabric::{BoxStream, CallContext, Error, Prefiller};
use longshore_prefill::{Config, PrefillMetrics, PrefillWorker};
use longshore_proto::types::{PrefillEvent, PrefillStart};
use tokio::sync::mpsc;

/// Tokens of a block in the test cluster.
pub(crate) const BLOCK: usize = 16;

pub(crate) struct World {
    pub(crate) cluster: TestCluster,
    pub(crate) worker: Arc<PrefillWorker>,
    pub(crate) tasks: Tasks,
    pub(crate) metrics: PrefillMetrics,
}

impl World {
    pub(crate) fn new(shards: usize, config: Config) -> Self {
        Self::with_dtype(shards, config, KvDtype::F32)
    }

    pub(crate) fn with_dtype(shards: usize, config: Config, dtype: KvDtype) -> Self {
        let (cluster, tasks, metrics) =
            (TestCluster::new(shards, dtype), Tasks::new(), PrefillMetrics::default());
        let worker = PrefillWorker::new(config, cluster.parts.clone(), None, &tasks, metrics.clone());
        Self { cluster, worker, tasks, metrics }
    }

    pub(crate) fn start(&self, prompt_tokens: usize, cached_blocks: usize) -> PrefillStart {
        PrefillStart {
            request_id: "test".to_owned(),
            identity: self.cluster.identity(b""),
            prompt_tokens: prompt_tokens as u64,
            cached_blocks: cached_blocks as u64,
            prefill_policy: "exact".to_owned(),
            dense_from: 0,
            generated_tokens: 0,
        }
    }

    /// The same for a policy that selects.
    pub(crate) fn balanced(&self, prompt_tokens: usize, cached_blocks: usize) -> PrefillStart {
        let prefill_policy = balanced().fingerprint();
        PrefillStart { prefill_policy, ..self.start(prompt_tokens, cached_blocks) }
    }

    /// Starts a prefill whose tokens come in small chunks.
    pub(crate) async fn call(
        &self,
        start: PrefillStart,
        prompt: &[u32],
    ) -> Result<BoxStream<PrefillEvent>, Error> {
        let (sender, receiver) = mpsc::channel(1);
        let chunks: Vec<Vec<u32>> = prompt.chunks(50).map(<[u32]>::to_vec).collect();
        self.tasks.spawn("test-feed", async move {
            for chunk in chunks {
                if sender.send(chunk).await.is_err() {
                    break;
                }
            }
        });
        self.worker.prefill(&CallContext::new("test"), start, receiver).await
    }

    /// All events of a prefill that must work; the last one is `Finished`.
    pub(crate) async fn prefill(&self, prompt: &[u32], cached_blocks: usize) -> Vec<PrefillEvent> {
        self.events(self.start(prompt.len(), cached_blocks), prompt).await
    }

    /// The same with parameters of one's own.
    pub(crate) async fn events(&self, start: PrefillStart, prompt: &[u32]) -> Vec<PrefillEvent> {
        let stream = self.call(start, prompt).await.expect("the call is good");
        let events: Vec<_> = stream.collect().await;
        events.into_iter().map(|event| event.expect("nothing fails")).collect()
    }

    /// The error of a prefill that must fail, at once or as its last event.
    pub(crate) async fn failure(&self, start: PrefillStart, prompt: &[u32]) -> Error {
        match self.call(start, prompt).await {
            Err(error) => error,
            Ok(stream) => {
                let events: Vec<_> = stream.collect().await;
                events.into_iter().next_back().expect("a stream ends with something").expect_err("it fails")
            }
        }
    }

    /// Tiles of the first `blocks` blocks of `prompt`.
    pub(crate) fn reference(&self, prompt: &[u32], blocks: usize) -> Bodies {
        let identity = self.cluster.identity(b"");
        reference_tiles(&self.cluster.engine, identity, self.cluster.links(), &prompt[..blocks * BLOCK]).0
    }
}

impl World {
    /// Tiles of a prompt of `prompt_tokens` under `policy`, exact from `dense_from` on, and of the answer after it, row by row.
    pub(crate) fn reference_answer(
        &self,
        policy: &Arc<PrefillPolicy>,
        dense_from: u64,
        prompt_tokens: usize,
        all: &[u32],
    ) -> Bodies {
        let engine = &self.cluster.engine;
        let mut sequence = Sequence::new(engine, self.cluster.identity(b""), self.cluster.links());
        sequence.set_prefill(Arc::clone(policy), dense_from).expect("stripes are small");
        sequence.set_answer(engine, policy, prompt_tokens as u64).expect("all heads are alike");
        let (prompt, answer) = all.split_at(prompt_tokens);
        for tokens in [prompt].into_iter().chain(answer.chunks(1)) {
            let input = StepInput { sequence: &mut sequence, tokens, logits: Logits::None };
            let outputs = engine.step(&CallContext::new("reference"), &mut [input], &mut ());
            outputs.expect("the step runs").remove(0).expect("nothing is remote");
        }
        let blocks = 0..sequence.full_blocks();
        let tiles = blocks.flat_map(|block| sequence.block_messages(block).expect("the block is local"));
        tiles.map(|tile| ((tile.key, tile.layer as usize), tile.data.to_vec())).collect()
    }
}

/// Bytes of one block of the test cluster's model over all layers, in f32.
pub(crate) fn block_bytes() -> u64 {
    let shape = TileShape { block_tokens: BLOCK, kv_heads: 2, head_dim: 8, dtype: KvDtype::F32 };
    3 * shape.bytes() as u64
}

/// A policy that selects.
pub(crate) fn balanced() -> PrefillPolicy {
    PrefillPolicy::parse("balanced", None).expect("the policy is known")
}

/// A policy that reads all keys while it selects, and is exact at first as `balanced` is.
pub(crate) fn antidiagonal() -> PrefillPolicy {
    PrefillPolicy::parse("blocks:scorer=antidiagonal,stride=8", None).expect("the text is a policy")
}

/// Waits until `condition` holds, for a minute at most.
pub(crate) async fn settles(condition: impl Fn() -> bool) -> bool {
    for _ in 0..6_000 {
        if condition() {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    false
}
