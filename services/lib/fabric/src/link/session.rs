//! The task of a link: opens the stream when there is something to ask, matches answers to questions, reopens.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::StreamExt;
use longshore_proto::types::{AttendAnswer, AttendPartial, AttendQuery};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot, watch},
    time::{Instant, MissedTickBehavior},
};

use crate::{BoxStream, CallContext, Code, Error, Shard, status::code_from_number};

/// How often questions that nobody waits for any more give their slots back.
const SWEEP: Duration = Duration::from_secs(1);

/// All partials of one message, or why there are none.
pub(super) type Outcome = Result<Vec<AttendPartial>, Error>;

/// One message to ask, and where its answer goes. The slot bounds how many there are.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) query: AttendQuery,
    pub(super) partials_max: usize,
    pub(super) reply: oneshot::Sender<Outcome>,
    pub(super) _slot: OwnedSemaphorePermit,
}

/// A question that was sent.
#[derive(Debug)]
struct Waiting {
    partials: Vec<AttendPartial>,
    partials_max: usize,
    reply: oneshot::Sender<Outcome>,
    _slot: OwnedSemaphorePermit,
}

/// Serves the questions of one link until nobody can ask any more; `hears` shows when the last message came.
pub(super) async fn run(
    shard: Arc<dyn Shard>,
    mut questions: mpsc::Receiver<Question>,
    in_flight_max: usize,
    hears: watch::Sender<Option<Instant>>,
) {
    let mut next_id = 1;
    while let Some(question) = questions.recv().await {
        match Session::open(&shard, in_flight_max, next_id).await {
            Ok(mut session) => {
                session.ask(question);
                session.serve(&mut questions, &hears).await;
                next_id = session.next_id;
            }
            Err(error) => {
                tracing::debug!(%error, "cannot open an attention stream");
                // Whoever asked while the stream was being opened would wait for the same failure again. Nobody is told before all of them
                // are known: who asks once he was told asks anew.
                let mut refused = vec![question];
                while let Ok(question) = questions.try_recv() {
                    refused.push(question);
                }
                for question in refused {
                    answer(question.reply, Err(error.clone()));
                }
            }
        }
    }
}

/// Whoever asked may have given up; then nobody needs the answer.
fn answer(reply: oneshot::Sender<Outcome>, outcome: Outcome) {
    drop(reply.send(outcome));
}

struct Session {
    queries: mpsc::Sender<AttendQuery>,
    answers: BoxStream<AttendAnswer>,
    waiting: HashMap<u64, Waiting>,
    next_id: u64,
}

impl Session {
    async fn open(shard: &Arc<dyn Shard>, in_flight_max: usize, next_id: u64) -> Result<Self, Error> {
        let (queries, asked) = mpsc::channel(in_flight_max);
        let answers = shard.attend(&CallContext::default(), asked).await?;
        Ok(Self { queries, answers, waiting: HashMap::new(), next_id })
    }

    /// Runs until the stream ends or, once nobody can ask any more, until the last question is answered.
    async fn serve(
        &mut self,
        questions: &mut mpsc::Receiver<Question>,
        hears: &watch::Sender<Option<Instant>>,
    ) {
        let mut sweep = tokio::time::interval(SWEEP);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut open = true;
        while open || !self.waiting.is_empty() {
            tokio::select! {
                answer = self.answers.next() => match answer {
                    Some(Ok(answer)) => {
                        hears.send_replace(Some(Instant::now()));
                        self.take(answer);
                    }
                    Some(Err(error)) => return self.fail_all(&format!("broke: {error}")),
                    None => return self.fail_all("ended"),
                },
                question = questions.recv(), if open => match question {
                    Some(question) => self.ask(question),
                    None => open = false,
                },
                _ = sweep.tick() => self.waiting.retain(|_, waiting| !waiting.reply.is_closed()),
            }
        }
    }

    fn ask(&mut self, question: Question) {
        let Question { mut query, partials_max, reply, _slot } = question;
        if reply.is_closed() {
            return;
        }
        let id = self.next_id;
        self.next_id += 1;
        query.query_id = id;
        // Full only when a stalled shard was asked more than it takes and the askers gave up; the next ones must know.
        if self.queries.try_send(query).is_err() {
            return answer(reply, Err(unavailable("takes no more queries")));
        }
        self.waiting.insert(id, Waiting { partials: Vec::new(), partials_max, reply, _slot });
    }

    fn take(&mut self, message: AttendAnswer) {
        match message {
            AttendAnswer::Failed { query_id, code, message } => {
                let code = code_from_number(code).unwrap_or(Code::Internal);
                self.finish(query_id, |_| Err(Error::new(code, message)));
            }
            AttendAnswer::Partials { query_id, partials, last } => {
                let Some(waiting) = self.waiting.get_mut(&query_id) else {
                    // Given up, or never asked.
                    return tracing::trace!(query_id, "an answer that nobody waits for");
                };
                waiting.partials.extend(partials);
                if waiting.partials.len() > waiting.partials_max {
                    let limit = waiting.partials_max;
                    let problem = format!(
                        "the answer of the shard has more than the {limit} partials that there can be"
                    );
                    self.finish(query_id, |_| Err(Error::new(Code::DataLoss, problem)));
                } else if last {
                    self.finish(query_id, Ok);
                }
            }
        }
    }

    fn finish(&mut self, query_id: u64, outcome: impl FnOnce(Vec<AttendPartial>) -> Outcome) {
        if let Some(waiting) = self.waiting.remove(&query_id) {
            answer(waiting.reply, outcome(waiting.partials));
        }
    }

    fn fail_all(&mut self, problem: &str) {
        if !self.waiting.is_empty() {
            tracing::debug!(in_flight = self.waiting.len(), problem, "lost an attention stream");
        }
        for (_, waiting) in self.waiting.drain() {
            answer(waiting.reply, Err(unavailable(problem)));
        }
    }
}

fn unavailable(problem: &str) -> Error {
    Error::new(Code::Unavailable, format!("the attention stream {problem}"))
}
