//! Takes sequences, waits for their places, opens their views and hands them to the engine thread.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use async_trait::async_trait;
use longshore_attention::{HeadPlan, PrefillPolicy};
use longshore_chassis::Tasks;
use longshore_engine::{EventSender, Sequence, TokenIntake, WorkerParts, event_channel, within};
use longshore_fabric::{BoxStream, CallContext, Code, Decoder};
use longshore_model::{Sampler, SamplerParams};
use longshore_proto::types::{DecodeEvent, DecodeStart, Sampling};
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
};

use crate::{
    Config, DecodeMetrics, Error,
    active::{Active, Ending},
    sealing::Sealing,
    stepper::{Command, Stepper},
};

/// Tokens of an answer when nobody says how many.
const MAX_TOKENS_DEFAULT: u64 = 256;

/// What a sequence occupies in the worker; given back when dropped.
#[derive(Debug)]
pub(crate) struct Places {
    _seat: OwnedSemaphorePermit,
    slot: Option<OwnedSemaphorePermit>,
    metrics: DecodeMetrics,
}

impl Drop for Places {
    fn drop(&mut self) {
        self.metrics.queue_depth.dec();
        if self.slot.is_some() {
            self.metrics.active_sequences.dec();
        }
    }
}

/// Generates tokens for many sequences at once, on one engine thread.
#[derive(Debug)]
pub struct DecodeWorker {
    worker: Arc<Worker>,
}

/// What the calls, the tasks and the engine thread share.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) config: Config,
    pub(crate) parts: WorkerParts,
    head_plan: Option<Arc<HeadPlan>>,
    pub(crate) tasks: Tasks,
    pub(crate) metrics: DecodeMetrics,
    pub(crate) commands: mpsc::Sender<Command>,
    seats: Arc<Semaphore>,
    slots: Arc<Semaphore>,
    next_id: AtomicU64,
}

impl DecodeWorker {
    /// A worker whose engine thread runs until `tasks` is cancelled; `head_plan` is the deployment's. Must be called on a runtime.
    pub fn new(
        config: Config,
        parts: WorkerParts,
        head_plan: Option<Arc<HeadPlan>>,
        tasks: &Tasks,
        metrics: DecodeMetrics,
    ) -> Arc<Self> {
        // Senders are tasks that wait, so that the bound only keeps the thread from being flooded.
        let (commands, inbox) = mpsc::channel(4 * config.max_sequences);
        let worker = Arc::new(Worker {
            seats: Arc::new(Semaphore::new(config.max_sequences + config.queue_max)),
            slots: Arc::new(Semaphore::new(config.max_sequences)),
            next_id: AtomicU64::new(0),
            parts,
            head_plan,
            tasks: tasks.child(),
            metrics,
            commands,
            config,
        });
        let stepper = Stepper::new(Arc::clone(&worker), Handle::current(), inbox);
        worker.tasks.spawn_critical("decode-engine", async {
            tokio::task::spawn_blocking(move || stepper.run()).await
        });
        Arc::new(Self { worker })
    }
}

/// Stops the engine thread, whose sequences end as at a shutdown.
impl Drop for DecodeWorker {
    fn drop(&mut self) {
        self.worker.tasks.cancel();
    }
}

#[async_trait]
impl Decoder for DecodeWorker {
    async fn decode(
        &self,
        ctx: &CallContext,
        start: DecodeStart,
        tokens: mpsc::Receiver<Vec<u32>>,
    ) -> Result<BoxStream<DecodeEvent>, longshore_fabric::Error> {
        let worker = &self.worker;
        worker.parts.limits.check_identity(&start.identity, worker.parts.shards.epoch())?;
        worker.parts.limits.check_length("start.prompt_tokens", start.prompt_tokens)?;
        let total = start.prompt_tokens.saturating_add(start.generated_tokens);
        worker.parts.limits.check_length("start.generated_tokens", total)?;
        let sampler = sampler(&start.sampling)?;
        let policy = worker.policy(&start.prefill_policy)?;
        let places = worker.take_seat()?;
        let ctx = ctx.child();
        let (events, stream) = event_channel(worker.config.event_buffer, ctx.cancel.clone());
        let admission = Admission { worker: Arc::clone(worker), ctx, start, policy, sampler, places };
        worker.tasks.spawn("decode-admission", admission.run(tokens, events));
        Ok(stream)
    }
}

impl Worker {
    /// The policy whose streaming heads stream in an answer.
    fn policy(&self, text: &str) -> Result<PrefillPolicy, Error> {
        PrefillPolicy::from_fingerprint(text, self.head_plan.as_deref())
            .map_err(|error| Error::Policy { policy: text.to_owned(), problem: error.to_string() })
    }

    fn take_seat(&self) -> Result<Places, Error> {
        if self.tasks.is_cancelled() {
            return Err(Error::ShuttingDown);
        }
        let Ok(seat) = Arc::clone(&self.seats).try_acquire_owned() else {
            self.metrics.rejected.inc();
            return Err(Error::QueueFull { limit: self.config.max_sequences + self.config.queue_max });
        };
        self.metrics.requests.inc();
        self.metrics.queue_depth.inc();
        Ok(Places { _seat: seat, slot: None, metrics: self.metrics.clone() })
    }

    /// Says the last word of a sequence.
    pub(crate) fn end(&self, events: EventSender<DecodeEvent>, outcome: Result<DecodeEvent, Error>) {
        let outcome = outcome.map_err(|error| match error.kind() {
            Code::Cancelled if self.tasks.is_cancelled() => Error::ShuttingDown,
            _ => error,
        });
        match &outcome {
            Ok(_) => {}
            Err(error) if error.kind() == Code::Cancelled => {
                self.metrics.cancelled.inc();
            }
            Err(error) => {
                self.metrics.failed.inc();
                tracing::debug!(%error, "a decode failed");
            }
        }
        events.finish(outcome.map_err(Into::into));
    }
}

/// A sequence on its way to the engine thread.
struct Admission {
    worker: Arc<Worker>,
    ctx: CallContext,
    start: DecodeStart,
    policy: PrefillPolicy,
    sampler: Sampler,
    places: Places,
}

impl Admission {
    /// Admits the sequence, then cancels it when the worker stops.
    async fn run(self, chunks: mpsc::Receiver<Vec<u32>>, events: EventSender<DecodeEvent>) {
        let (worker, ctx) = (Arc::clone(&self.worker), self.ctx.clone());
        let admitted = tokio::select! {
            admitted = self.admit(chunks) => admitted,
            () = worker.tasks.cancelled() => Err(Error::ShuttingDown),
        };
        match admitted {
            Ok(Some(ready)) => {
                let active = ready.activate(&worker, events);
                if let Err(refused) = worker.commands.send(Command::Admit(Box::new(active))).await {
                    refused.0.end(&worker);
                    return;
                }
                tokio::select! {
                    () = ctx.cancel.cancelled() => {}
                    () = worker.tasks.cancelled() => ctx.cancel.cancel(),
                }
            }
            Ok(None) => worker.end(events, Ok(DecodeEvent::Finished { stopped: false })),
            Err(error) => worker.end(events, Err(error)),
        }
    }

    /// Collects the tokens, waits for a slot and opens the views; `None` when there is nothing left to generate.
    async fn admit(mut self, chunks: mpsc::Receiver<Vec<u32>>) -> Result<Option<Ready>, Error> {
        let (worker, start) = (&self.worker, &self.start);
        let context_tokens = worker.parts.limits.context_tokens;
        let total = start.prompt_tokens + start.generated_tokens;
        let tokens = TokenIntake::new(worker.parts.limits, total).collect(&self.ctx, chunks).await?;
        let max_tokens = start.sampling.max_tokens.map_or(MAX_TOKENS_DEFAULT, u64::from);
        if start.generated_tokens >= max_tokens || total >= context_tokens {
            return Ok(None);
        }
        let slot = within(&self.ctx, Arc::clone(&worker.slots).acquire_owned()).await?;
        self.places.slot = Some(slot.expect("the slots are never closed"));
        worker.metrics.active_sequences.inc();
        let mut sequence = self.open(&tokens).await?;
        sequence.set_answer(&worker.parts.engine, &self.policy, start.prompt_tokens)?;
        let (prompt, generated) = tokens.split_at(start.prompt_tokens as usize);
        self.sampler.observe_prompt(prompt);
        generated.iter().for_each(|&token| self.sampler.observe_generated(token));
        let stop_token_ids = match start.sampling.ignore_eos {
            true => Vec::new(),
            false => start.stop_token_ids.clone(),
        };
        Ok(Some(Ready {
            next: tokens[sequence.position() as usize..].to_vec(),
            ending: Ending { max_tokens, context_tokens, stop_token_ids },
            sequence,
            admission: self,
        }))
    }

    async fn open(&self, tokens: &[u32]) -> Result<Sequence, Error> {
        let WorkerParts { engine, shards, limits } = &self.worker.parts;
        let links = shards.current()?;
        limits.check_identity(&self.start.identity, links.map().epoch())?;
        let geometry = engine.geometry();
        let stored = geometry.stored_blocks(tokens.len() as u64) * u64::from(geometry.block_tokens());
        let (identity, lease_ms) = (self.start.identity, self.worker.config.lease_ms);
        let prefix = &tokens[..stored as usize];
        let patience = self.worker.config.open_timeout();
        let open = Sequence::open(engine, &self.ctx, identity, links, prefix, lease_ms);
        // A shard that hangs must not keep a place for as long as the client has patience.
        match tokio::time::timeout(patience, open).await {
            Ok(opened) => Ok(opened?),
            Err(_) => {
                let message = format!(
                    "shards did not open views within {} ms; hint: look at them",
                    patience.as_millis()
                );
                Err(longshore_fabric::Error::new(Code::Unavailable, message).into())
            }
        }
    }
}

/// A sequence with everything that it needs.
struct Ready {
    admission: Admission,
    sequence: Sequence,
    next: Vec<u32>,
    ending: Ending,
}

impl Ready {
    fn activate(self, worker: &Worker, events: EventSender<DecodeEvent>) -> Active {
        let Admission { ctx, start, sampler, places, .. } = self.admission;
        Active {
            id: worker.next_id.fetch_add(1, Ordering::Relaxed),
            ctx,
            sealing: Sealing::new(self.sequence.remote_blocks()),
            sequence: self.sequence,
            next: self.next,
            sampler,
            generated: start.generated_tokens,
            ending: self.ending,
            events,
            puts: worker.tasks.token().child_token(),
            paused: false,
            kept: Instant::now(),
            _places: places,
        }
    }
}

/// The router fills every default in, so that resuming elsewhere draws the same tokens; a seed is needed where chance is.
fn sampler(sampling: &Sampling) -> Result<Sampler, Error> {
    let seed = match sampling.seed {
        Some(seed) => seed,
        None if sampling.temperature == 0.0 => 0,
        None => return Err(longshore_fabric::Error::invalid("start.sampling.seed", "is missing").into()),
    };
    let params = SamplerParams {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        seed,
        logprobs: sampling.logprobs,
    };
    Sampler::new(params).map_err(|error| Error::Sampling { problem: error.to_string() })
}
