//! Attend streams: several queries at a time, each answered in pieces as soon as they are computed. Answers do not depend on
//! what else is under way: every (item, stripe) is its own run of the executor.

mod plan;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, stream::FuturesUnordered};
use longshore_chassis::Tasks;
use longshore_fabric::{BoxStream, CallContext, StripePartial, status::code_number};
use longshore_proto::types::{AttendAnswer, AttendPartial, AttendQuery};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;

use crate::{Error, lifetime, store::Store};
use plan::Plan;

pub(crate) use plan::Blocks;

/// Answer messages that may be unread before queries wait.
const ANSWERS_UNREAD_MAX: usize = 4;

/// Starts an attend stream.
pub(crate) fn start(
    store: &Arc<Store>,
    tasks: &Tasks,
    ctx: &CallContext,
    queries: mpsc::Receiver<AttendQuery>,
) -> BoxStream<AttendAnswer> {
    let (answers, answer) = mpsc::channel(ANSWERS_UNREAD_MAX);
    let (store, ctx, scope) = (store.clone(), ctx.clone(), tasks.clone());
    tasks.spawn("kvstore-attend", async move {
        let failure = tokio::select! {
            () = serve(&store, queries, &answers) => None,
            reason = lifetime::ended(&store, &ctx, &scope) => Some(reason),
            () = answers.closed() => None,
        };
        if let Some(error) = failure {
            let _caller_is_gone = answers.try_send(Err(error.into()));
        }
    });
    Box::pin(ReceiverStream::new(answer))
}

type Answers = mpsc::Sender<Result<AttendAnswer, longshore_fabric::Error>>;

/// The caller went away: nobody wants further answers.
struct Gone;

/// Answers queries until the stream ends and all of them are done.
async fn serve(store: &Arc<Store>, mut queries: mpsc::Receiver<AttendQuery>, answers: &Answers) {
    let mut running = FuturesUnordered::new();
    let mut more = true;
    while more || !running.is_empty() {
        let room = running.len() < store.config().attend_stream_concurrency;
        tokio::select! {
            Some(done) = running.next(), if !running.is_empty() => {
                if let Err(Gone) = done {
                    return;
                }
            }
            query = queries.recv(), if more && room => match query {
                Some(query) => running.push(answer(store, query, answers)),
                None => more = false,
            },
        }
    }
}

/// Answers one query; a failure is an answer too.
async fn answer(store: &Arc<Store>, query: AttendQuery, answers: &Answers) -> Result<(), Gone> {
    let query_id = query.query_id;
    let started = Instant::now();
    let _running = Running::start(store);
    match compute(store, query, answers).await {
        Ok(()) => store.metrics.attend_queries.inc(),
        Err(Failure::Gone) => return Err(Gone),
        Err(Failure::Refused(error)) => {
            store.metrics.attend_failed.inc();
            let failed = AttendAnswer::Failed {
                query_id,
                code: code_number(error.kind()),
                message: error.to_string(),
            };
            answers.send(Ok(failed)).await.map_err(|_| Gone)?;
            return Ok(());
        }
    };
    store.metrics.attend_seconds.observe(started.elapsed().as_secs_f64());
    Ok(())
}

/// Why a query was not answered.
enum Failure {
    Refused(Error),
    Gone,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

/// Computes a query batch by batch; each batch is a message. A permit is held while a batch computes and not while its message
/// waits to be read, so that a slow reader holds up nobody else.
async fn compute(store: &Arc<Store>, query: AttendQuery, answers: &Answers) -> Result<(), Failure> {
    let query_id = query.query_id;
    store.check_identity(&query.identity)?;
    let views = plan::views(store, &query)?;
    let mut state = State::Asked(query, views);
    let (asked, mut computed) = (Instant::now(), Duration::ZERO);
    loop {
        let (returned, partials) = {
            let (permit, worker) = (permit(store).await, store.clone());
            let timed = move || {
                // Held by the work itself: it runs on when its caller goes away.
                let _permit = permit;
                let started = Instant::now();
                if matches!(state, State::Asked(..)) {
                    worker.metrics.attend_queue_seconds.observe((started - asked).as_secs_f64());
                }
                state.run_batch(&worker).map(|batch| (batch, started.elapsed()))
            };
            let (batch, took) = store.off_reactor(timed).await??;
            computed += took;
            batch
        };
        let last = returned.is_done();
        if last {
            store.metrics.attend_compute_seconds.observe(computed.as_secs_f64());
        }
        state = State::Planned(returned);
        store.metrics.attend_bytes.inc_by(bytes(&partials));
        let message = AttendAnswer::Partials { query_id, partials, last };
        answers.send(Ok(message)).await.map_err(|_| Failure::Gone)?;
        if last {
            return Ok(());
        }
    }
}

/// How far a query has come. Planning and the first batch are one piece of work: most queries have no second.
enum State {
    Asked(AttendQuery, Vec<plan::Blocks>),
    Planned(Plan),
}

impl State {
    fn run_batch(self, store: &Store) -> Result<(Plan, Vec<AttendPartial>), Error> {
        let mut plan = match self {
            Self::Asked(query, views) => Plan::new(store, &query, views)?,
            Self::Planned(plan) => plan,
        };
        let partials = plan.run_batch(store)?;
        Ok((plan, partials))
    }
}

/// Answers a query of a worker in this process, on the worker's thread. The compute pool gives callers their turns, so no
/// permit is needed.
pub(crate) fn here(store: &Store, query: &AttendQuery) -> Result<Vec<StripePartial>, Error> {
    let started = Instant::now();
    let _running = Running::start(store);
    let compute = || {
        store.check_identity(&query.identity)?;
        Plan::new(store, query, plan::views(store, query)?)?.run(store)
    };
    // A panic is this query's failure, as on a stream, and not the end of the worker's thread.
    let answer = catch_unwind(AssertUnwindSafe(compute)).unwrap_or_else(|_| Err(store.panicked()));
    match &answer {
        Ok(_) => {
            store.metrics.attend_queries.inc();
            store.metrics.attend_seconds.observe(started.elapsed().as_secs_f64());
            store.metrics.attend_compute_seconds.observe(started.elapsed().as_secs_f64());
        }
        Err(_) => _ = store.metrics.attend_failed.inc(),
    }
    answer
}

async fn permit(store: &Store) -> OwnedSemaphorePermit {
    Arc::clone(store.attend_permits()).acquire_owned().await.expect("nobody closes the semaphore")
}

fn bytes(partials: &[AttendPartial]) -> u64 {
    partials.iter().map(|partial| partial.partial.data.len() as u64).sum()
}

/// Counts a query as under way.
struct Running<'a>(&'a Store);

impl<'a> Running<'a> {
    fn start(store: &'a Store) -> Self {
        store.metrics.attend_running.inc();
        Self(store)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.metrics.attend_running.dec();
    }
}
