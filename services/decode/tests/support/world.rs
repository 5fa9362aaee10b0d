//! A decode worker on a cluster of shards in memory, and the slow obvious way to generate.

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use longshore_attention::{KvDtype, PrefillPolicy};
use longshore_chassis::Tasks;
use longshore_decode::{Config, DecodeMetrics, DecodeWorker};
use longshore_engine::{
    Logits, Sequence, StepInput,
    testing::{Bodies, TestCluster, reference_tiles},
};
use longshore_fabric::{BoxStream, CallContext, Decoder, Error};
use longshore_model::{Sampler, SamplerParams};
use longshore_proto::types::{DecodeEvent, DecodeStart, Sampling};
use tokio::sync::mpsc;

/// Tokens of a block in the test cluster.
pub(crate) const BLOCK: usize = 16;

pub(crate) struct World {
    pub(crate) cluster: TestCluster,
    pub(crate) worker: Arc<DecodeWorker>,
    pub(crate) tasks: Tasks,
    pub(crate) metrics: DecodeMetrics,
}

/// Greedy, `max_tokens` tokens.
pub(crate) fn greedy(max_tokens: u32) -> Sampling {
    Sampling { temperature: 0.0, max_tokens: Some(max_tokens), ..Sampling::default() }
}

impl World {
    pub(crate) fn new(shards: usize, config: Config) -> Self {
        Self::with_dtype(shards, config, KvDtype::F32)
    }

    pub(crate) fn with_dtype(shards: usize, config: Config, dtype: KvDtype) -> Self {
        let (cluster, tasks, metrics) =
            (TestCluster::new(shards, dtype), Tasks::new(), DecodeMetrics::default());
        let worker = DecodeWorker::new(config, cluster.parts.clone(), None, &tasks, metrics.clone());
        Self { cluster, worker, tasks, metrics }
    }

    /// A start for `tokens`, of which the last `generated` belong to the answer.
    pub(crate) fn start(&self, tokens: &[u32], generated: usize, sampling: Sampling) -> DecodeStart {
        DecodeStart {
            request_id: "test".to_owned(),
            identity: self.cluster.identity(b""),
            prompt_tokens: (tokens.len() - generated) as u64,
            generated_tokens: generated as u64,
            sampling,
            stop_token_ids: Vec::new(),
            prefill_policy: "exact".to_owned(),
        }
    }

    pub(crate) async fn call(
        &self,
        start: DecodeStart,
        tokens: &[u32],
    ) -> Result<BoxStream<DecodeEvent>, Error> {
        let (sender, receiver) = mpsc::channel(1);
        let chunks: Vec<Vec<u32>> = tokens.chunks(50).map(<[u32]>::to_vec).collect();
        self.tasks.spawn("test-feed", async move {
            for chunk in chunks {
                if sender.send(chunk).await.is_err() {
                    break;
                }
            }
        });
        self.worker.decode(&CallContext::new("test"), start, receiver).await
    }

    /// Stores what a prefill would store.
    pub(crate) async fn prefill(&self, tokens: &[u32]) {
        self.cluster.store(b"", &tokens[..(tokens.len() - 1) / BLOCK * BLOCK]).await;
    }

    /// Prefills and generates; the tokens and whether a stop token ended them.
    pub(crate) async fn generate(
        &self,
        tokens: &[u32],
        generated: usize,
        sampling: Sampling,
    ) -> (Vec<u32>, bool) {
        self.prefill(tokens).await;
        let stream = self.call(self.start(tokens, generated, sampling), tokens).await;
        finished(stream.expect("the call is good")).await
    }

    /// The error of a decode that must fail, at once or as its last event.
    pub(crate) async fn failure(&self, start: DecodeStart, tokens: &[u32]) -> Error {
        match self.call(start, tokens).await {
            Err(error) => error,
            Ok(stream) => ended(stream).await.expect_err("it fails"),
        }
    }

    /// Tiles of the full blocks of `tokens`.
    pub(crate) fn reference_tiles(&self, tokens: &[u32]) -> Bodies {
        reference_tiles(&self.cluster.engine, self.cluster.identity(b""), self.cluster.links(), tokens).0
    }

    /// The greedy answer to `prompt` under a policy with streaming heads, one place, row by row.
    pub(crate) fn streamed(&self, policy: &PrefillPolicy, prompt: &[u32], count: usize) -> Vec<u32> {
        let engine = &self.cluster.engine;
        let mut sequence = Sequence::new(engine, self.cluster.identity(b""), self.cluster.links());
        sequence.set_answer(engine, policy, prompt.len() as u64).expect("the policy fits");
        let (mut answer, mut next) = (Vec::new(), prompt.to_vec());
        while answer.len() < count {
            let input = StepInput { sequence: &mut sequence, tokens: &next, logits: Logits::Last };
            let outputs = engine.step(&CallContext::new("reference"), &mut [input], &mut ());
            let logits = outputs.expect("the step runs").remove(0).expect("nothing is remote");
            let logits = logits.expect("they were wanted").into_all();
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
            next = vec![best.expect("there is a vocabulary") as u32];
            answer.extend(&next);
        }
        answer
    }

    /// The answer to `prompt`, every token computed from scratch.
    pub(crate) fn reference(&self, prompt: &[u32], sampling: &Sampling) -> Vec<u32> {
        let params = SamplerParams {
            temperature: sampling.temperature,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            seed: sampling.seed.unwrap_or(0),
            top_k: sampling.top_k,
            ..SamplerParams::default()
        };
        let mut sampler = Sampler::new(params).expect("the parameters are in range");
        sampler.observe_prompt(prompt);
        let mut tokens = prompt.to_vec();
        for index in 0..u64::from(sampling.max_tokens.expect("tests say how many")) {
            let (engine, identity) = (&self.cluster.engine, self.cluster.identity(b""));
            let (_, logits) = reference_tiles(engine, identity, self.cluster.links(), &tokens);
            let token = sampler.sample(&logits, index).expect("the logits are finite").token;
            sampler.observe_generated(token);
            tokens.push(token);
        }
        tokens.split_off(prompt.len())
    }
}

/// The last event of a stream.
pub(crate) async fn ended(stream: BoxStream<DecodeEvent>) -> Result<DecodeEvent, Error> {
    stream.collect::<Vec<_>>().await.pop().expect("a stream ends with something")
}

/// Tokens of a stream that must finish, and whether a stop token ended it.
pub(crate) async fn finished(mut stream: BoxStream<DecodeEvent>) -> (Vec<u32>, bool) {
    let mut tokens = Vec::new();
    while let Some(event) = stream.next().await {
        match event.expect("nothing fails") {
            DecodeEvent::Token { token_id, .. } => tokens.push(token_id),
            DecodeEvent::Finished { stopped, .. } => {
                assert!(stream.next().await.is_none(), "nothing follows the end");
                return (tokens, stopped);
            }
        }
    }
    panic!("the stream ended without an end")
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
