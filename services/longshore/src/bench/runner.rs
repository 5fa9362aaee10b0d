//! Drives an engine over sequences that no shard holds.

use std::{sync::Arc, time::Instant};

use anyhow::{Context, Result};
use longshore_blocks::{EXACT_PREFILL, ShardEntry, ShardId, ShardMap};
use longshore_engine::{Engine, Logits, Sequence, ShardLinks, StepInput, StepObserver};
use longshore_fabric::{CallContext, Shard};
use longshore_model::RowLogits;
use longshore_proto::types::Identity;
use tokio::runtime::Handle;
use tokio_util::task::TaskTracker;

use super::{noise::Noise, noise_shard::NoiseShard, statistics::Spread};
use crate::node::Node;

/// Steps that go before a measurement of decode.
const WARM_STEPS: usize = 2;

/// An engine and the one shard of its world, which gives tiles of noise and is never asked to attend.
#[derive(Debug)]
pub(super) struct Runner {
    engine: Arc<Engine>,
    identity: Identity,
    links: Arc<ShardLinks>,
    ctx: CallContext,
    chunk_tokens: usize,
}

impl Runner {
    /// Must be made on a thread of a runtime.
    pub(super) fn new(engine: Arc<Engine>, node: &Node, chunk_tokens: usize) -> Result<Self> {
        let map = ShardMap::new(0, vec![ShardEntry::new(ShardId("noise".to_owned()), 1)])?;
        let shard: Arc<dyn Shard> = Arc::new(NoiseShard::new(engine.tile_shape(), node.info.config.layers));
        let links = ShardLinks::new(map, [shard], &TaskTracker::new(), 1)?;
        let deployment = node.deployment;
        let identity = Identity {
            deployment,
            namespace: deployment.namespace(EXACT_PREFILL, b"bench"),
            shard_map_epoch: 0,
        };
        let chunk_tokens = chunk_tokens.next_multiple_of(engine.tile_shape().block_tokens);
        Ok(Self { engine, identity, links: Arc::new(links), ctx: CallContext::new("bench"), chunk_tokens })
    }

    /// Tokens of a prefill step.
    pub(super) fn chunk_tokens(&self) -> usize {
        self.chunk_tokens
    }

    /// A short prompt, so that nothing is cold.
    pub(super) fn warm_up(&self) -> Result<()> {
        self.prompt(64, 0).map(drop)
    }

    /// Tokens a second of prompts of `tokens`, logits of the last token included.
    pub(super) fn prefill(&self, tokens: usize, repeats: usize) -> Result<Spread> {
        let mut rates = Vec::with_capacity(repeats);
        for repeat in 0..repeats {
            let began = Instant::now();
            self.prompt(tokens, repeat as u64 + 1)?;
            rates.push(tokens as f64 / began.elapsed().as_secs_f64());
        }
        Ok(Spread::of(rates))
    }

    /// Tokens a second of greedy decode, `steps` steps a sample, the first of them at position `depth` or a little later.
    /// What lies before is noise: time does not depend on it.
    pub(super) fn decode(&self, depth: usize, steps: usize, repeats: usize) -> Result<Spread> {
        let block_tokens = self.engine.tile_shape().block_tokens;
        let noise = Noise(depth as u64).tokens(depth, self.vocabulary());
        let (blocks, rest) = noise.split_at(depth / block_tokens * block_tokens);
        let filling =
            Sequence::fetch(&self.engine, &self.ctx, self.identity, Arc::clone(&self.links), blocks);
        let mut sequence = Handle::current().block_on(filling)?;
        if !rest.is_empty() {
            self.step(&mut sequence, rest, Logits::None)?;
        }
        let mut token = 1;
        for _ in 0..WARM_STEPS {
            token = self.next(&mut sequence, &[token])?;
        }
        let mut rates = Vec::with_capacity(repeats);
        for _ in 0..repeats {
            let began = Instant::now();
            for _ in 0..steps {
                token = self.next(&mut sequence, &[token])?;
            }
            rates.push(steps as f64 / began.elapsed().as_secs_f64());
        }
        Ok(Spread::of(rates))
    }

    /// The first token after a prompt of noise.
    pub(super) fn first_token(&self, tokens: usize) -> Result<u32> {
        Ok(likeliest(&self.prompt(tokens, 1)?))
    }

    /// A prompt in chunks, as a prefill worker computes it; the logits of its last token.
    fn prompt(&self, tokens: usize, seed: u64) -> Result<Vec<f32>> {
        let tokens = Noise(seed).tokens(tokens, self.vocabulary());
        self.compute(self.sequence(), &tokens, &mut (), &|_| {})
    }

    /// An empty sequence.
    pub(super) fn sequence(&self) -> Sequence {
        Sequence::new(&self.engine, self.identity, Arc::clone(&self.links))
    }

    /// A prompt in chunks; the logits of its last token. `progress` is told the tokens that are done.
    pub(super) fn compute(
        &self,
        mut sequence: Sequence,
        tokens: &[u32],
        observer: &mut dyn StepObserver,
        progress: &dyn Fn(usize),
    ) -> Result<Vec<f32>> {
        let chunks = tokens.chunks(self.chunk_tokens);
        let (last, mut logits, mut done) = (chunks.len().saturating_sub(1), None, 0);
        for (index, chunk) in chunks.enumerate() {
            let wanted = if index == last { Logits::Last } else { Logits::None };
            logits = self.observed(&mut sequence, chunk, wanted, observer)?;
            done += chunk.len();
            progress(done);
        }
        logits.context("a prompt has no logits")
    }

    fn next(&self, sequence: &mut Sequence, tokens: &[u32]) -> Result<u32> {
        let logits = self.step(sequence, tokens, Logits::Last)?;
        Ok(likeliest(&logits.context("a step has no logits")?))
    }

    fn step(&self, sequence: &mut Sequence, tokens: &[u32], logits: Logits) -> Result<Option<Vec<f32>>> {
        self.observed(sequence, tokens, logits, &mut ())
    }

    fn observed(
        &self,
        sequence: &mut Sequence,
        tokens: &[u32],
        logits: Logits,
        observer: &mut dyn StepObserver,
    ) -> Result<Option<Vec<f32>>> {
        let mut batch = [StepInput { sequence, tokens, logits }];
        let mut outputs = self.engine.step(&self.ctx, &mut batch, observer)?;
        Ok(outputs.pop().context("a step has no output")??.map(RowLogits::into_all))
    }

    /// Entries of the vocabulary.
    pub(super) fn vocabulary(&self) -> usize {
        self.engine.backend().config().vocabulary
    }
}

fn likeliest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|(_, a), (_, b)| a.total_cmp(b));
    best.map_or(0, |(token, _)| token as u32)
}
