//! Attend streams: several queries at a time, each answered in pieces as soon as they are computed. Answers do not depend on
//! what else is under way: every (item, stripe) is its own run of the executor.

mod plan;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, stream::FuturesUnordered};
use longshore_blocks::tier::Tier;
use longshore_chassis::Tasks;
use longshore_fabric::{BoxStream, CallContext, StripePartial, status::code_number};
use longshore_proto::types::{AttendAnswer, AttendPartial, AttendQuery};
use tokio::{sync::mpsc, time::Instant};

use crate::{
    Error,
    borrowed::{Blocks, Borrowed},
    lifetime,
    lifetime::{Kind, Outlet, Taken},
    store::Store,
};
use plan::Plan;

const KIND: Kind =
    Kind { task: "kvstore-attend", stream: "attend", stalling: "no answer was taken", unread: 4 };

/// Starts an attend stream.
pub(crate) fn start(
    store: &Arc<Store>,
    tasks: &Tasks,
    ctx: &CallContext,
    queries: mpsc::Receiver<AttendQuery>,
) -> BoxStream<AttendAnswer> {
    lifetime::run((store, tasks, ctx), KIND, move |store, answers| async move {
        serve(&store, queries, &answers).await
    })
}

type Answers = Outlet<AttendAnswer>;

/// Answers queries until the stream ends and all of them are done, or the caller leaves or takes no answers.
async fn serve(
    store: &Arc<Store>,
    mut queries: mpsc::Receiver<AttendQuery>,
    answers: &Answers,
) -> Result<(), Error> {
    let mut running = FuturesUnordered::new();
    let mut more = true;
    while more || !running.is_empty() {
        let room = running.len() < store.config().attend_stream_concurrency;
        tokio::select! {
            Some(done) = running.next(), if !running.is_empty() => {
                if done? == Taken::Gone {
                    return Ok(());
                }
            }
            query = queries.recv(), if more && room => match query {
                Some(query) => running.push(answer(store, query, answers)),
                None => more = false,
            },
        }
    }
    Ok(())
}

/// Answers one query; a failure is an answer too.
async fn answer(store: &Arc<Store>, query: AttendQuery, answers: &Answers) -> Result<Taken, Error> {
    let query_id = query.query_id;
    let started = Instant::now();
    let _running = Running::start(store);
    match compute(store, query, answers).await {
        Ok(Taken::Yes) => store.metrics.attend_queries.inc(),
        Ok(Taken::Gone) => return Ok(Taken::Gone),
        Err(Failure::Stalled(error)) => return Err(error),
        Err(Failure::Refused(error)) => {
            store.metrics.attend_failed.inc();
            let failed = AttendAnswer::Failed {
                query_id,
                code: code_number(error.kind()),
                message: error.to_string(),
            };
            return answers.send(store, failed).await;
        }
    };
    store.metrics.attend_seconds.observe(started.elapsed().as_secs_f64());
    Ok(Taken::Yes)
}

/// Why a query was not answered.
enum Failure {
    Refused(Error),
    /// Nobody takes answers: the stream ends.
    Stalled(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

/// Computes a query batch by batch; each batch is a message. A turn is held while a batch computes and not while its message
/// waits to be read, so that a slow reader holds up nobody else.
async fn compute(store: &Arc<Store>, query: AttendQuery, answers: &Answers) -> Result<Taken, Failure> {
    let (query_id, tenant) = (query.query_id, query.identity.namespace);
    store.check_identity(&query.identity)?;
    let (views, borrowed) = plan::borrow(store, &query)?;
    let disk = store.disk().filter(|_| lies_below(&views)).map(|disk| &disk.turns);
    let mut state = State { stage: Stage::Asked(query, views), _borrowed: borrowed };
    let (asked, mut computed) = (Instant::now(), Duration::ZERO);
    loop {
        let (returned, partials) = {
            let disk_turn = match disk {
                Some(turns) => Some(turns.turn(tenant).await),
                None => None,
            };
            let (turn, worker) = (store.turns().turn(tenant).await, store.clone());
            let timed = move || {
                // Held by the work itself: it runs on when its caller goes away.
                let _turns = (turn, disk_turn);
                let started = Instant::now();
                if matches!(state.stage, Stage::Asked(..)) {
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
        state = returned;
        store.metrics.attend_bytes.inc_by(bytes(&partials));
        let message = AttendAnswer::Partials { query_id, partials, last };
        let taken = answers.send(store, message).await.map_err(Failure::Stalled)?;
        if last || taken == Taken::Gone {
            return Ok(taken);
        }
    }
}

/// How far a query has come, and the blocks that it may still need.
struct State {
    stage: Stage,
    _borrowed: Borrowed,
}

/// Planning and the first batch are one piece of work: most queries have no second.
enum Stage {
    Asked(AttendQuery, Vec<Blocks>),
    Planned(Plan),
}

impl State {
    fn run_batch(self, store: &Store) -> Result<(Self, Vec<AttendPartial>), Error> {
        let mut plan = match self.stage {
            Stage::Asked(query, views) => Plan::new(store, &query, views)?,
            Stage::Planned(plan) => plan,
        };
        let partials = plan.run_batch(store)?;
        Ok((Self { stage: Stage::Planned(plan), ..self }, partials))
    }

    /// Whether this was the last batch.
    fn is_done(&self) -> bool {
        matches!(&self.stage, Stage::Planned(plan) if plan.is_done())
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

/// Whether some of the blocks have to be read from disk.
fn lies_below(views: &[Blocks]) -> bool {
    views.iter().flat_map(|view| view.iter()).any(|entry| entry.block.tier() == Tier::Disk)
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
