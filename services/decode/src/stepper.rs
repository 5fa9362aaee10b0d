//! The engine thread: continuous batching. Every step takes one row of each sequence that generates, or the first rows of one
//! that just came.

use std::{sync::Arc, time::Instant};

use longshore_engine::{StepInput, StepOutput, close_queue, store_copies};
use longshore_fabric::CallContext;
use longshore_proto::types::{DecodeEvent, PutOutcome};
use tokio::{runtime::Handle, sync::mpsc};

use crate::{
    Error,
    active::{Active, Next},
    service::Worker,
};

/// What tasks tell the engine thread.
#[derive(Debug)]
pub(crate) enum Command {
    /// A sequence is ready.
    Admit(Box<Active>),
    /// The reader of a paused sequence took its event, or why it never will.
    Resume { id: u64, delivered: Result<(), Error> },
    /// A shard answered to a block.
    Stored { id: u64, block: u64, outcome: Result<PutOutcome, String> },
}

impl Command {
    /// Ends the sequence that the command would have brought to a thread that has stopped.
    pub(crate) fn end(self, worker: &Worker) {
        if let Self::Admit(active) = self {
            worker.end(active.events, Err(Error::ShuttingDown));
        }
    }
}

/// The engine thread and its sequences.
pub(crate) struct Stepper {
    worker: Arc<Worker>,
    runtime: Handle,
    inbox: mpsc::Receiver<Command>,
    active: Vec<Active>,
}

impl Stepper {
    pub(crate) fn new(worker: Arc<Worker>, runtime: Handle, inbox: mpsc::Receiver<Command>) -> Self {
        Self { worker, runtime, inbox, active: Vec::new() }
    }

    /// Runs until the worker stops.
    pub(crate) fn run(mut self) {
        self.worker.parts.engine.pin_caller();
        while self.receive() {
            self.reap();
            self.hand_over();
            self.keep_views();
            self.step();
            self.seal();
        }
        close_queue(&mut self.inbox, |command| command.end(&self.worker));
        for active in self.active.drain(..) {
            active.puts.cancel();
            self.worker.end(active.events, Err(Error::ShuttingDown));
        }
    }

    /// Takes what came, and waits for something to come while no sequence runs. False when the worker stops.
    fn receive(&mut self) -> bool {
        while let Ok(command) = self.inbox.try_recv() {
            self.handle(command);
        }
        while !self.active.iter().any(Active::runs) {
            let command = self.runtime.block_on(async {
                tokio::select! {
                    biased;
                    () = self.worker.tasks.cancelled() => None,
                    command = self.inbox.recv() => command,
                }
            });
            match command {
                Some(command) => self.handle(command),
                None => return false,
            }
        }
        !self.worker.tasks.is_cancelled()
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Admit(active) => self.active.push(*active),
            Command::Resume { id, delivered } => self.resume(id, delivered),
            Command::Stored { id, block, outcome } => {
                match &outcome {
                    Ok(PutOutcome::Stored | PutOutcome::Duplicate) => self.worker.metrics.stored_blocks.inc(),
                    failure => {
                        tracing::debug!(block, ?failure, "a block was not stored");
                        self.worker.metrics.put_failures.inc()
                    }
                };
                if let Some(active) = self.active.iter_mut().find(|active| active.id == id) {
                    active.sealing.answered(block, outcome);
                }
            }
        }
    }

    fn resume(&mut self, id: u64, delivered: Result<(), Error>) {
        let Some(index) = self.active.iter().position(|active| active.id == id) else { return };
        self.worker.metrics.paused_sequences.dec();
        let active = &mut self.active[index];
        active.paused = false;
        match delivered.map(|()| active.after_token()) {
            Ok(Next::End(stopped)) => {
                let finished = self.active[index].finished(stopped);
                self.end(index, Ok(finished));
            }
            Ok(_) => {}
            Err(error) => self.end(index, Err(error)),
        }
    }

    /// Ends sequences whose callers went away or whose time is up.
    fn reap(&mut self) {
        for index in (0..self.active.len()).rev() {
            let active = &self.active[index];
            let error = if active.ctx.cancel.is_cancelled() || active.events.is_gone() {
                longshore_engine::Error::Cancelled
            } else if active.ctx.time_left().is_some_and(|left| left.is_zero()) {
                longshore_engine::Error::DeadlineExceeded
            } else {
                continue;
            };
            self.end(index, Err(error.into()));
        }
    }

    fn end(&mut self, index: usize, outcome: Result<DecodeEvent, Error>) {
        // Blocks of a finished answer still go to the store, where the next turn of a conversation finds them.
        if outcome.is_ok() {
            self.send_blocks(index);
        }
        let active = self.active.swap_remove(index);
        if active.paused {
            self.worker.metrics.paused_sequences.dec();
        }
        if outcome.is_err() {
            active.puts.cancel();
        }
        self.worker.end(active.events, outcome);
    }

    /// One step of every sequence that runs.
    fn step(&mut self) {
        let (mut running, mut batch) = (Vec::new(), Vec::new());
        let vocabulary = self.vocabulary();
        for (index, active) in self.active.iter_mut().enumerate().filter(|(_, active)| active.runs()) {
            running.push(index);
            let logits = active.wanted(vocabulary);
            batch.push(StepInput { sequence: &mut active.sequence, tokens: &active.next, logits });
        }
        if batch.is_empty() {
            return;
        }
        let rows: usize = batch.iter().map(|input| input.tokens.len()).sum();
        let ctx = CallContext { cancel: self.worker.tasks.token(), ..CallContext::new("decode-step") };
        let started = Instant::now();
        let outputs = self.worker.parts.engine.step(&ctx, &mut batch, &mut &self.worker.metrics);
        drop(batch);
        self.worker.metrics.step_seconds.observe(started.elapsed().as_secs_f64());
        self.worker.metrics.step_rows.observe(rows as f64);
        let outputs = outputs.unwrap_or_else(|error| running.iter().map(|_| Err(error.clone())).collect());
        // From the back, because a sequence that ends is replaced by the last one.
        for (&index, output) in running.iter().zip(outputs).rev() {
            self.advance(index, output);
        }
    }

    fn vocabulary(&self) -> usize {
        self.worker.parts.engine.backend().config().vocabulary
    }

    fn advance(&mut self, index: usize, output: StepOutput) {
        let vocabulary = self.vocabulary();
        let active = &mut self.active[index];
        let (counted, now) = (active.counted, active.sequence.answer_visits());
        self.worker.metrics.visited_blocks.inc_by(now.blocks - counted.blocks);
        self.worker.metrics.causal_blocks.inc_by(now.of - counted.of);
        active.counted = now;
        let next = output
            .map_err(Error::from)
            .and_then(|row| active.advance(&row.expect("logits were asked for"), vocabulary));
        match next {
            Ok(Next::End(stopped)) => {
                let finished = self.active[index].finished(stopped);
                self.end(index, Ok(finished));
            }
            Ok(Next::Gone) => self.end(index, Err(longshore_engine::Error::Cancelled.into())),
            Ok(Next::Go) => {
                self.worker.metrics.tokens.inc();
            }
            Ok(Next::Pause(event)) => {
                self.worker.metrics.tokens.inc();
                self.pause(index, event);
            }
            Err(error) => self.end(index, Err(error)),
        }
    }

    /// Waits in a task until the reader of one sequence has room for its event; the others go on.
    fn pause(&mut self, index: usize, event: DecodeEvent) {
        self.active[index].paused = true;
        self.worker.metrics.paused_sequences.inc();
        let active = &self.active[index];
        let (id, ctx, channel) = (active.id, active.ctx.clone(), active.events.channel());
        let (stall, commands) = (self.worker.config.stall_timeout(), self.worker.commands.clone());
        self.spawn("decode-slow-reader", async move {
            let room = longshore_engine::within(&ctx, tokio::time::timeout(stall, channel.reserve()));
            let delivered = match room.await {
                Ok(Ok(Ok(permit))) => {
                    permit.send(Ok(event));
                    Ok(())
                }
                Ok(Ok(Err(_))) => Err(longshore_engine::Error::Cancelled.into()),
                Ok(Err(_)) => Err(Error::Stalled { waited_ms: stall.as_millis() as u64 }),
                Err(error) => Err(error.into()),
            };
            // Fails only when the thread has stopped and with it the sequence.
            drop(commands.send(Command::Resume { id, delivered }).await);
        });
    }

    /// Sends full blocks to their shards; ends sequences with too many that no shard took.
    fn seal(&mut self) {
        let limit = self.worker.config.local_blocks_max;
        for index in (0..self.active.len()).rev() {
            self.send_blocks(index);
            let sealing = &self.active[index].sealing;
            let waiting = sealing.waiting();
            if waiting > limit {
                let last = sealing.last_failure().to_owned();
                self.end(index, Err(Error::NotStored { waiting, limit, last }));
            }
        }
    }

    fn send_blocks(&mut self, index: usize) {
        let active = &mut self.active[index];
        active.sealing.seal(active.sequence.full_blocks());
        while let Some(block) = self.active[index].sealing.next_to_send() {
            self.put(index, block);
        }
    }

    fn put(&mut self, index: usize, block: u64) {
        let active = &mut self.active[index];
        let tiles =
            active.sequence.block_messages(block).expect("a full block that was not handed over is local");
        let candidates = match active.sequence.candidates(block) {
            Ok(candidates) => candidates,
            Err(error) => {
                active.sealing.answered(block, Err(error.to_string()));
                return;
            }
        };
        let links = Arc::clone(active.sequence.links());
        let ctx =
            CallContext { cancel: active.puts.clone(), ..CallContext::new(active.ctx.request_id.clone()) };
        let ctx = ctx.with_timeout(self.worker.config.put_timeout());
        let (id, identity) = (active.id, *active.sequence.identity());
        let (shape, commands) = (self.worker.parts.engine.wire_tile_shape(), self.worker.commands.clone());
        self.spawn("decode-put", async move {
            let outcome = store_copies(&ctx, &links, &candidates, identity, shape, tiles).await;
            let outcome = outcome.map_err(|error| error.to_string());
            drop(commands.send(Command::Stored { id, block, outcome }).await);
        });
    }

    /// Hands stored blocks over to their views. Between two steps, because a block must be counted exactly once: by its
    /// shard or here.
    fn hand_over(&mut self) {
        let config = &self.worker.config;
        let (timeout, lease_ms) = (config.append_timeout(), config.lease_ms);
        let ready = self.active.iter_mut().enumerate().filter(|(_, active)| !active.paused);
        let appends = ready.filter_map(|(index, active)| {
            let stored = active.sealing.stored();
            (stored > 0).then_some(async move {
                let before = active.sequence.remote_blocks();
                let ctx = active.ctx.child().with_timeout(timeout);
                let appended = active.sequence.append_remote(&ctx, stored, lease_ms).await;
                let failure = appended.err().map(|error| error.to_string());
                active.sealing.handed_over(active.sequence.remote_blocks() - before, failure);
                active.sequence.broken().map(|cause| (index, cause))
            })
        });
        // All at once: a slow shard costs the others one timeout, not one for each of its sequences.
        let broken = self.runtime.block_on(futures::future::join_all(appends));
        // From the back, because ending one moves those behind it.
        for (index, cause) in broken.into_iter().flatten().rev() {
            self.end(index, Err(longshore_engine::Error::Broken(cause).into()));
        }
    }

    /// Renews the leases of views that streaming heads may not ask for long.
    fn keep_views(&mut self) {
        let config = &self.worker.config;
        let (timeout, due) = (config.append_timeout(), config.keep_after());
        let is_due =
            |active: &&mut Active| active.sequence.leaves_views_idle() && active.kept.elapsed() >= due;
        let kept: Vec<_> = self
            .active
            .iter_mut()
            .filter(is_due)
            .map(|active| {
                active.kept = Instant::now();
                let (ctx, sequence) = (active.ctx.child().with_timeout(timeout), &active.sequence);
                async move { sequence.keep_views(&ctx).await }
            })
            .collect();
        if !kept.is_empty() {
            self.runtime.block_on(futures::future::join_all(kept));
        }
    }

    fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let _on_runtime = self.runtime.enter();
        self.worker.tasks.spawn(name, task);
    }
}
