//! One prompt on an engine thread: chunk by chunk through the layers, tiles streaming out behind.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use longshore_engine::{
    EventSender, Logits, PutStreams, RemoteVisits, Sequence, StepInput, StepObserver, Unstored,
};
use longshore_proto::types::PrefillEvent;
use longshore_routing::Choice;
use tokio::runtime::Handle;

use crate::{
    Config, Error, PrefillMetrics,
    prefix::{Budget, choose},
    service::{Job, Worker},
};

/// Computes a prompt. Its end is told by a task, so that the thread can go on while the last blocks are stored.
pub(crate) fn run(worker: &Arc<Worker>, runtime: &Handle, job: Job) {
    let geometry = worker.parts.engine.geometry();
    let stored = geometry.stored_blocks(job.start.prompt_tokens);
    let cached = job.start.cached_blocks.min(stored);
    worker.metrics.cached_tokens.inc_by(cached * u64::from(geometry.block_tokens()));
    if cached == stored {
        return worker.end(job.events, Ok(PrefillEvent::Finished { computed_blocks: 0, stored_bytes: 0 }));
    }
    match (Prefill { worker, runtime, job: &job, blocks: cached..stored }).compute() {
        Ok(computed) => store_rest(worker, runtime, job, computed),
        Err(error) => worker.end(job.events, Err(error)),
    }
}

/// A prompt whose blocks are computed and on their way.
struct Computed {
    sequence: Sequence,
    streams: PutStreams,
    blocks: Range<u64>,
    at: Instant,
}

/// Waits for the last acknowledgements in a task. One prompt per engine thread may be in this state, so that the tiles
/// that wait stay bounded.
fn store_rest(worker: &Arc<Worker>, runtime: &Handle, job: Job, computed: Computed) {
    let storing = runtime.block_on(Arc::clone(&worker.storing).acquire_owned());
    let task = Arc::clone(worker);
    worker.tasks.spawn("prefill-storing", async move {
        let _until_stored = (storing, job.seat);
        let Computed { sequence, mut streams, blocks, at } = computed;
        streams.end();
        let outcome = ensure_stored(&task, &sequence, &mut streams, blocks.clone()).await;
        if outcome.is_ok() {
            streams.detach();
        }
        task.metrics.store_tail_seconds.observe(at.elapsed().as_secs_f64());
        let count = blocks.end - blocks.start;
        let finished =
            PrefillEvent::Finished { computed_blocks: count, stored_bytes: count * sequence.block_bytes() };
        sequence.close().await;
        task.end(job.events, outcome.map(|()| finished));
    });
}

/// A prompt under way.
struct Prefill<'a> {
    worker: &'a Worker,
    runtime: &'a Handle,
    job: &'a Job,
    /// Blocks to compute; those before are in the store.
    blocks: Range<u64>,
}

impl Prefill<'_> {
    fn compute(&self) -> Result<Computed, Error> {
        let engine = &self.worker.parts.engine;
        let job = self.job;
        let tile_bytes = engine.tile_shape().bytes() as u64;
        let mut sequence = self.open_prefix()?;
        sequence.set_prefill(Arc::clone(&job.policy.policy), job.policy.dense_from)?;
        sequence.set_answer(engine, &job.policy.policy, job.policy.answer_from)?;
        // Moves as much as it likes, within the request's deadline, as fetching would.
        let loaded = self.runtime.block_on(sequence.load_summaries(&job.ctx))?;
        self.worker.metrics.summary_bytes.inc_by(loaded);
        let mut streams = PutStreams::new(
            job.ctx.clone(),
            job.start.identity,
            engine.wire_tile_shape(),
            Arc::clone(&job.links),
            (self.worker.config.put_buffer_bytes / tile_bytes) as usize,
        );
        let Range { start: mut position, end } = self.tokens(&self.blocks);
        while position < end {
            let chunk = &job.tokens[position..self.chunk_end(position).min(end)];
            self.make_room(&mut sequence, &mut streams, chunk.len())?;
            self.step(&mut sequence, &mut streams, chunk)?;
            position += chunk.len();
        }
        Ok(Computed { sequence, streams, blocks: self.blocks.clone(), at: Instant::now() })
    }

    fn step(&self, sequence: &mut Sequence, streams: &mut PutStreams, chunk: &[u32]) -> Result<(), Error> {
        let started = Instant::now();
        let mut observer = Streamer {
            patience: self.worker.config.shard_timeout(),
            runtime: self.runtime,
            streams,
            events: &self.job.events,
            metrics: &self.worker.metrics,
            layers: self.worker.parts.engine.backend().config().layers,
            every: self.worker.config.progress_layers,
            handed_over: Duration::ZERO,
        };
        let input = StepInput { sequence, tokens: chunk, logits: Logits::None };
        let mut outputs = self.worker.parts.engine.step(&self.job.ctx, &mut [input], &mut observer)?;
        outputs.pop().expect("a step has an output per input")?;
        self.worker.metrics.tokens.inc_by(chunk.len() as u64);
        let handed_over = observer.handed_over;
        self.worker.metrics.chunk_seconds.observe(started.elapsed().as_secs_f64());
        self.worker.metrics.hand_over_seconds.observe(handed_over.as_secs_f64());
        match streams.refused() {
            Some((shard, key)) => {
                Err(Error::NoSpace { shard: self.job.links.links()[shard].id.clone(), key })
            }
            None => Ok(()),
        }
    }

    /// Tokens of a chunk that begins on the policy's grid; the largest.
    fn chunk_tokens(&self) -> usize {
        (self.worker.config.chunk_tokens as usize).next_multiple_of(self.chunk_grid())
    }

    fn chunk_grid(&self) -> usize {
        self.job.policy.chunk_grid(self.worker.parts.engine.tile_shape().block_tokens)
    }

    /// End of the chunk that begins at `position`: on the grid of absolute positions, so that a cached prefix of any length
    /// changes the first chunk only.
    fn chunk_end(&self, position: usize) -> usize {
        (position + self.chunk_tokens()) / self.chunk_grid() * self.chunk_grid()
    }

    fn tokens(&self, blocks: &Range<u64>) -> Range<usize> {
        let block_tokens = self.worker.parts.engine.tile_shape().block_tokens;
        blocks.start as usize * block_tokens..blocks.end as usize * block_tokens
    }

    fn open_prefix(&self) -> Result<Sequence, Error> {
        let (engine, job) = (&self.worker.parts.engine, self.job);
        let prefix = &job.tokens[self.tokens(&(0..self.blocks.start))];
        let (identity, links) = (job.start.identity, Arc::clone(&job.links));
        let lease_ms = self.worker.config.lease_ms;
        self.runtime.block_on(async {
            match self.choose() {
                Choice::Ship => {
                    let open = Sequence::open(engine, &job.ctx, identity, links, prefix, lease_ms);
                    live(&self.worker.config, "opening the prefix", open).await
                }
                // Moves the whole prefix: as long as it likes, within the request's deadline.
                Choice::Fetch => Ok(Sequence::fetch(engine, &job.ctx, identity, links, prefix).await?),
            }
        })
    }

    fn choose(&self) -> Choice {
        let block_tokens = self.worker.parts.engine.tile_shape().block_tokens;
        let budget = Budget {
            prefix_blocks: self.blocks.start,
            rows: self.tokens(&self.blocks).len() as u64,
            chunk_blocks: (self.chunk_tokens() / block_tokens) as u64,
        };
        choose(&self.worker.config, &self.worker.parts.engine, &self.job.policy.policy, budget)
    }

    /// Hands the oldest local blocks over to their shards when the next `tokens` would exceed the budget.
    fn make_room(
        &self,
        sequence: &mut Sequence,
        streams: &mut PutStreams,
        tokens: usize,
    ) -> Result<(), Error> {
        let block_tokens = self.worker.parts.engine.tile_shape().block_tokens;
        let needed_bytes = tokens.div_ceil(block_tokens) as u64 * sequence.block_bytes();
        let budget = self.worker.config.local_kv_bytes;
        let excess = (sequence.local_bytes() + needed_bytes).saturating_sub(budget);
        let count =
            excess.div_ceil(sequence.block_bytes()).min(sequence.full_blocks() - sequence.remote_blocks());
        if count == 0 {
            return Ok(());
        }
        let first = sequence.remote_blocks();
        let computed = first.max(self.blocks.start)..(first + count).max(self.blocks.start);
        self.runtime.block_on(async {
            ensure_stored(self.worker, sequence, streams, computed).await?;
            let append = sequence.append_remote(&self.job.ctx, count, self.worker.config.lease_ms);
            live(&self.worker.config, "handing blocks over", append).await
        })
    }
}

/// Sends the tiles of a layer while the next one computes, and tells the caller how far the prompt is.
struct Streamer<'a> {
    patience: Duration,
    runtime: &'a Handle,
    streams: &'a mut PutStreams,
    events: &'a EventSender<PrefillEvent>,
    metrics: &'a PrefillMetrics,
    layers: usize,
    every: usize,
    /// Time of the engine thread so far.
    handed_over: Duration,
}

impl StepObserver for Streamer<'_> {
    fn visited_remotely(&mut self, visits: &RemoteVisits) {
        self.metrics.visited_blocks.inc_by(visits.blocks);
        self.metrics.shipped_bytes.inc_by(visits.query_bytes + visits.partial_bytes);
    }

    fn layer_done(&mut self, layer: usize, batch: &[StepInput<'_>]) -> Result<(), longshore_engine::Error> {
        for input in batch {
            let sequence = &*input.sequence;
            let started = Instant::now();
            self.runtime.block_on(async {
                for block in sequence.filling() {
                    let tile =
                        sequence.tile_message(block, layer).expect("blocks that a step fills are local");
                    if !self.streams.knows(&tile.key) {
                        self.streams.begin(tile.key, &sequence.candidates(block)?);
                    }
                    self.streams.send(tile, self.patience).await?;
                }
                Ok::<_, longshore_engine::Error>(())
            })?;
            self.handed_over += started.elapsed();
            let done = layer + 1;
            if done.is_multiple_of(self.every) || done == self.layers {
                let new_tokens = (input.tokens.len() * done / self.layers) as u64;
                // A reader that is behind misses steps, nothing else.
                self.events
                    .try_send(PrefillEvent::Progress { done_tokens: sequence.position() + new_tokens });
            }
        }
        Ok(())
    }
}

/// Waits until enough shards acknowledged `blocks`, which are all local; sends again what arrived damaged, and to other shards
/// what some refused.
async fn ensure_stored(
    worker: &Worker,
    sequence: &Sequence,
    streams: &mut PutStreams,
    blocks: Range<u64>,
) -> Result<(), Error> {
    let patience = worker.config.shard_timeout();
    for block in blocks {
        let key = sequence.key(block).expect("a computed block has a key");
        let tiles = || sequence.block_messages(block).expect("a block that is not acknowledged is local");
        let shard = |index: usize| sequence.links().links()[index].id.clone();
        match streams.ensure(key, patience, tiles).await {
            Ok(stored) => {
                worker.metrics.resent_blocks.inc_by(stored.resent);
                worker.metrics.stored_blocks.inc();
            }
            Err(Unstored::NoSpace(index)) => return Err(Error::NoSpace { shard: shard(index), key }),
            Err(Unstored::Corrupt(index)) => {
                worker.metrics.resent_blocks.inc();
                return Err(Error::Corrupt { shard: shard(index), key });
            }
            Err(Unstored::Stalled) => {
                let waited_ms = worker.config.shard_timeout_ms;
                return Err(Error::Stalled { what: "storing a block", waited_ms });
            }
            Err(Unstored::Failed(error)) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Gives up on a shard that hangs, so that it cannot hold the engine thread. Counted from the last progress, never from the
/// start of the prompt.
async fn live<T>(
    config: &Config,
    what: &'static str,
    work: impl Future<Output = Result<T, longshore_engine::Error>>,
) -> Result<T, Error> {
    match tokio::time::timeout(config.shard_timeout(), work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(Error::Stalled { what, waited_ms: config.shard_timeout_ms }),
    }
}
