//! One attention stream to one shard, shared by every sequence of a process.

mod answer;
mod session;
mod split;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use longshore_attention::Partials;
use longshore_proto::types::AttendQuery;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, mpsc, oneshot, watch},
    time::Instant,
};
use tokio_util::task::TaskTracker;

use crate::{CallContext, Code, Error, Shard, lane};

use answer::Expected;
use session::{Outcome, Question};
use split::Span;

/// A partial of one stripe, as an answer brought it.
#[derive(Debug, Clone, PartialEq)]
pub struct StripePartial {
    /// Index of the item in the query.
    pub item: u32,
    /// Stripe.
    pub stripe: u64,
    /// The partial, checked for shape and finiteness.
    pub partial: Partials,
}

/// Multiplexes queries of many sequences over one `attend` stream; reopens it after a failure, which everything in flight
/// sees as `Unavailable`. Cheap to clone.
#[derive(Debug, Clone)]
pub struct AttendLink {
    shard: Arc<dyn Shard>,
    questions: mpsc::Sender<Question>,
    slots: Arc<Semaphore>,
    in_flight_max: usize,
    /// When the last message came.
    heard: watch::Receiver<Option<Instant>>,
    runtime: Handle,
}

/// An answer under way. Dropping it gives the answer up.
#[derive(Debug)]
pub struct PendingAttend(State);

#[derive(Debug)]
enum State {
    /// The shard lies in this process and has answered.
    Here(Vec<StripePartial>),
    /// Messages are under way.
    Asked {
        context: CallContext,
        runtime: Handle,
        expected: Expected,
        pieces: VecDeque<(Vec<Span>, oneshot::Receiver<Outcome>)>,
        /// Answers to pieces that came before.
        came: Vec<(Vec<Span>, Outcome)>,
    },
}

impl AttendLink {
    /// A link to `shard`. Its task runs on `tasks` until the last clone is dropped. `in_flight_max` (at least 1) bounds
    /// messages under way; each carries about 1 MiB of query rows at most.
    ///
    /// # Panics
    /// Outside a tokio runtime. The stream lives on the runtime of this call.
    pub fn new(shard: Arc<dyn Shard>, tasks: &TaskTracker, in_flight_max: usize) -> Self {
        let in_flight_max = in_flight_max.clamp(1, Semaphore::MAX_PERMITS);
        let runtime = Handle::current();
        let (questions, asked) = mpsc::channel(in_flight_max);
        let (hears, heard) = watch::channel(None);
        tasks.spawn_on(session::run(Arc::clone(&shard), asked, in_flight_max, hears), &runtime);
        let slots = Arc::new(Semaphore::new(in_flight_max));
        Self { shard, questions, slots, in_flight_max, heard, runtime }
    }

    /// When the last message with an answer came, whoever asked and whether or not anybody waits for it; `None` where none came yet or
    /// the shard lies in this process.
    pub fn heard(&self) -> Option<Instant> {
        *self.heard.borrow()
    }

    /// Messages under way: sent, or about to be, and not answered yet.
    pub fn under_way(&self) -> usize {
        self.in_flight_max.saturating_sub(self.slots.available_permits())
    }

    /// Whether the shard lies in this process and answers while it is asked.
    pub fn is_here(&self) -> bool {
        self.shard.is_here()
    }

    /// Sends a query (its `query_id` is overwritten). Splits it by rows into messages of about 1 MiB. Blocks the calling
    /// compute thread while too many are under way, at most until the context's deadline or cancellation. A shard of this
    /// process answers here and now, without a message.
    ///
    /// # Panics
    /// On a reactor thread, which must never block.
    pub fn query_blocking(&self, ctx: &CallContext, query: AttendQuery) -> Result<PendingAttend, Error> {
        let expected = Expected::of(&query)?;
        if let Some(answer) = self.shard.attend_here(&query) {
            return Ok(PendingAttend(State::Here(answer?)));
        }
        let mut pieces = VecDeque::new();
        for piece in split::split(query, &expected) {
            let slot = self.runtime.block_on(lane::within(ctx, async {
                Arc::clone(&self.slots).acquire_owned().await.map_err(|_| closed())
            }))?;
            let (reply, answer) = oneshot::channel();
            let question =
                Question { query: piece.query, partials_max: piece.partials_max, reply, _slot: slot };
            // Every question holds a slot and the channel has room for all of them.
            self.questions.try_send(question).map_err(|_| closed())?;
            pieces.push_back((piece.spans, answer));
        }
        let (context, runtime) = (ctx.clone(), self.runtime.clone());
        Ok(PendingAttend(State::Asked { context, runtime, expected, pieces, came: Vec::new() }))
    }
}

fn closed() -> Error {
    Error::new(Code::Unavailable, "the attention link is closed")
}

impl PendingAttend {
    /// Whether the answer is there and needs no waiting.
    pub fn is_ready(&self) -> bool {
        matches!(self.0, State::Here(_))
    }

    /// Waits for the whole answer: partials ascending by item and stripe, rows of split messages joined, every shape
    /// checked against the query. Ends early with `Cancelled` or `DeadlineExceeded` as the context says.
    ///
    /// # Panics
    /// On a reactor thread, which must never block.
    pub fn wait_blocking(self) -> Result<Vec<StripePartial>, Error> {
        let (context, runtime, expected, pieces, came) = match self.0 {
            State::Here(partials) => return Ok(partials),
            State::Asked { context, runtime, expected, pieces, came } => {
                (context, runtime, expected, pieces, came)
            }
        };
        let mut joiner = answer::Joiner::new(&expected);
        for (spans, outcome) in came {
            joiner.add(&spans, outcome?)?;
        }
        for (spans, mut answer) in pieces {
            let outcome = match answer.try_recv() {
                Ok(outcome) => outcome,
                Err(_) => {
                    runtime.block_on(lane::within(&context, async { answer.await.map_err(|_| closed())? }))
                }
            };
            joiner.add(&spans, outcome?)?;
        }
        joiner.finish()
    }
}

impl PendingAttend {
    /// Like [`Self::wait_blocking`] for as long as `patience` lasts; then gives itself back, and may be asked again.
    ///
    /// # Panics
    /// On a reactor thread, which must never block.
    pub fn wait_blocking_for(
        mut self,
        patience: Duration,
    ) -> Result<Result<Vec<StripePartial>, Error>, Box<Self>> {
        if let State::Asked { runtime, context, pieces, came, .. } = &mut self.0 {
            let all = async {
                while let Some((spans, answer)) = pieces.front_mut() {
                    let outcome = answer.await.map_err(|_| closed()).and_then(|outcome| outcome);
                    came.push((std::mem::take(spans), outcome));
                    pieces.pop_front();
                }
            };
            let patient = async { tokio::time::timeout(patience, all).await };
            match runtime.block_on(lane::within(context, async { Ok(patient.await) })) {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(Box::new(self)),
                Err(ended) => return Ok(Err(ended)),
            }
        }
        Ok(self.wait_blocking())
    }
}

#[cfg(test)]
mod tests;
