//! Takes prompts, queues them for the engine threads and watches over their ends.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use longshore_attention::HeadPlan;
use longshore_chassis::Tasks;
use longshore_engine::{EventSender, ShardLinks, TokenIntake, WorkerParts, close_queue, event_channel};
use longshore_fabric::{BoxStream, CallContext, Code, Prefiller};
use longshore_proto::types::{PrefillEvent, PrefillStart};
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
};

use crate::{Config, Error, PrefillMetrics, compute, policy::JobPolicy};

/// A prompt on its way through the worker.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) ctx: CallContext,
    pub(crate) start: PrefillStart,
    pub(crate) policy: JobPolicy,
    pub(crate) tokens: Vec<u32>,
    pub(crate) links: Arc<ShardLinks>,
    pub(crate) events: EventSender<PrefillEvent>,
    pub(crate) seat: Seat,
}

/// A place in the worker; given back when dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    _permit: OwnedSemaphorePermit,
    metrics: PrefillMetrics,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.metrics.queue_depth.dec();
    }
}

/// Turns prompts into KV on the shards. Prompts wait in one bounded queue for `concurrency` engine threads.
#[derive(Debug)]
pub struct PrefillWorker {
    worker: Arc<Worker>,
}

/// What the calls, the tasks and the engine threads of one worker share.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) config: Config,
    pub(crate) parts: WorkerParts,
    /// Head plan of the deployment, which some policies are made of.
    head_plan: Option<Arc<HeadPlan>>,
    pub(crate) tasks: Tasks,
    pub(crate) metrics: PrefillMetrics,
    /// Prompts whose last blocks are still under way to the shards: one per engine thread keeps its tiles.
    pub(crate) storing: Arc<Semaphore>,
    seats: Arc<Semaphore>,
    jobs: mpsc::Sender<Job>,
}

impl PrefillWorker {
    /// A worker whose engine threads run until `tasks` is cancelled. Must be called on a runtime.
    pub fn new(
        config: Config,
        parts: WorkerParts,
        head_plan: Option<Arc<HeadPlan>>,
        tasks: &Tasks,
        metrics: PrefillMetrics,
    ) -> Arc<Self> {
        let seats = config.queue_max + config.concurrency;
        let (jobs, queue) = mpsc::channel(seats);
        let worker = Arc::new(Worker {
            storing: Arc::new(Semaphore::new(config.concurrency)),
            seats: Arc::new(Semaphore::new(seats)),
            parts,
            head_plan,
            tasks: tasks.child(),
            metrics,
            jobs,
            config,
        });
        let queue = Arc::new(Mutex::new(queue));
        for thread in 0..worker.config.concurrency {
            let engine =
                Engine { worker: Arc::clone(&worker), queue: Arc::clone(&queue), runtime: Handle::current() };
            worker.tasks.spawn_critical(format!("prefill-engine-{thread}"), async move {
                tokio::task::spawn_blocking(move || engine.run()).await
            });
        }
        Arc::new(Self { worker })
    }
}

impl Worker {
    fn take_seat(&self) -> Result<Seat, Error> {
        if self.tasks.is_cancelled() {
            return Err(Error::ShuttingDown);
        }
        match Arc::clone(&self.seats).try_acquire_owned() {
            Ok(permit) => {
                self.metrics.requests.inc();
                self.metrics.queue_depth.inc();
                Ok(Seat { _permit: permit, metrics: self.metrics.clone() })
            }
            Err(_) => {
                self.metrics.rejected.inc();
                Err(Error::QueueFull { limit: self.config.queue_max + self.config.concurrency })
            }
        }
    }

    /// Collects the prompt, queues it, and cancels it when the worker stops.
    async fn admit(
        self: Arc<Self>,
        ctx: CallContext,
        (start, policy): (PrefillStart, JobPolicy),
        chunks: mpsc::Receiver<Vec<u32>>,
        events: EventSender<PrefillEvent>,
        seat: Seat,
    ) {
        let intake = TokenIntake::new(self.parts.limits, start.prompt_tokens);
        let collected = tokio::select! {
            collected = intake.collect(&ctx, chunks) => collected.map_err(Error::from),
            () = self.tasks.cancelled() => Err(Error::ShuttingDown),
        };
        let ready = collected.and_then(|tokens| Ok((tokens, self.links(&start)?)));
        match ready {
            Ok((tokens, links)) => {
                let job = Job { ctx: ctx.clone(), start, policy, tokens, links, events, seat };
                // The queue has a place per seat, so it is full never and closed only when the worker stops.
                if let Err(refused) = self.jobs.try_send(job) {
                    self.end(refused.into_inner().events, Err(Error::ShuttingDown));
                    return;
                }
                tokio::select! {
                    () = ctx.cancel.cancelled() => {}
                    () = self.tasks.cancelled() => ctx.cancel.cancel(),
                }
            }
            Err(error) => self.end(events, Err(error)),
        }
    }

    /// Links of the epoch that the caller placed blocks with.
    fn links(&self, start: &PrefillStart) -> Result<Arc<ShardLinks>, Error> {
        let links = self.parts.shards.current()?;
        self.parts.limits.check_identity(&start.identity, links.map().epoch())?;
        Ok(links)
    }

    /// Says the last word of a prompt.
    pub(crate) fn end(&self, events: EventSender<PrefillEvent>, outcome: Result<PrefillEvent, Error>) {
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
                tracing::debug!(%error, "a prefill failed");
            }
        }
        events.finish(outcome.map_err(Into::into));
    }
}

/// Stops the engine threads, whose prompts end as at a shutdown.
impl Drop for PrefillWorker {
    fn drop(&mut self) {
        self.worker.tasks.cancel();
    }
}

#[async_trait]
impl Prefiller for PrefillWorker {
    async fn prefill(
        &self,
        ctx: &CallContext,
        start: PrefillStart,
        tokens: mpsc::Receiver<Vec<u32>>,
    ) -> Result<BoxStream<PrefillEvent>, longshore_fabric::Error> {
        let worker = &self.worker;
        worker.parts.limits.check_identity(&start.identity, worker.parts.shards.epoch())?;
        worker.parts.limits.check_length("start.prompt_tokens", start.prompt_tokens)?;
        let plan = worker.head_plan.as_deref();
        let policy = JobPolicy::of(&start, plan, &worker.parts.engine, &worker.config)?;
        let seat = worker.take_seat()?;
        let ctx = ctx.child();
        let (events, stream) = event_channel(worker.config.event_buffer, ctx.cancel.clone());
        let admission = Arc::clone(worker).admit(ctx, (start, policy), tokens, events, seat);
        worker.tasks.spawn("prefill-admission", admission);
        Ok(stream)
    }
}

/// One engine thread.
struct Engine {
    worker: Arc<Worker>,
    queue: Arc<Mutex<mpsc::Receiver<Job>>>,
    runtime: Handle,
}

impl Engine {
    fn run(self) {
        self.worker.parts.engine.pin_caller();
        while let Some(job) = self.next() {
            compute::run(&self.worker, &self.runtime, job);
        }
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        close_queue(&mut queue, |job| self.worker.end(job.events, Err(Error::ShuttingDown)));
    }

    /// The next prompt; `None` when the worker stops. One idle thread at a time waits, the others for it.
    fn next(&self) -> Option<Job> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                () = self.worker.tasks.cancelled() => None,
                job = queue.recv() => job,
            }
        })
    }
}
