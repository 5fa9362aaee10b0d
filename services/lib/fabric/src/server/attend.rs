//! `Attend`: queries come, partials go. Where a query names an epoch of the lane `nccl`, the large ones of its answer go from GPU to GPU;
//! whatever happens to the epoch, the stream goes on with partials in messages.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures::{FutureExt, Stream, StreamExt, stream};
use longshore_proto::{
    types::{AttendAnswer, AttendQuery, NcclLease},
    v1,
};
use tokio::sync::mpsc;
use tonic::{Request, Status, Streaming};

use super::{
    Answers,
    pump::{self, Step},
    shard::ShardService,
};
use crate::{
    BoxStream, Error, TileTraffic,
    nccl::{Bodies, Convener, Held, Left, PARTIALS_BYTES_MIN},
    shm::{Connection, Lender, Link},
    status::code_number,
};

/// Queries of a call whose answers may be exchanged, at most. Later ones are answered in messages: a service takes far fewer at a time.
const NAMED_MAX: usize = 1024;

/// Serves one attend stream.
pub(super) async fn attend(
    service: &ShardService,
    request: Request<Streaming<v1::AttendRequest>>,
) -> Result<Answers<v1::AttendResponse>, Error> {
    let hop = service.desk.enter(&request)?;
    let (sender, queries) = mpsc::channel(pump::QUEUE);
    let draining = Some(service.desk.draining.clone());
    let link = request.extensions().get::<Connection>().and_then(|connection| connection.link.clone());
    let lender = link.as_ref().map(Link::lender);
    let named = Arc::<Named>::default();
    let names = Arc::clone(&named);
    let step = move |message| Ok(step(message, link.as_ref(), &names));
    let pump = pump::pump(request.into_inner(), sender, draining, step);
    let context = hop.context.clone();
    let answers = pump::conversation(&hop, pump, service.shard.attend(&context, queries)).await?;
    let (convener, traffic) = (service.convener.clone(), service.traffic.clone());
    let exchange = Exchange { convener, traffic, named, held: None, over: None };
    let sending = Sending { answers, lender, exchange };
    // The call lasts until the last body is out, which is later than the last answer.
    let answers = hop.bound(Box::pin(sending.messages()));
    Ok(Box::pin(answers.map(|answer| answer.map_err(Status::from))))
}

/// A query for the service. A bad one fails alone: the stream belongs to many sequences.
fn step(
    mut message: v1::AttendRequest,
    link: Option<&Arc<Link>>,
    named: &Named,
) -> Step<AttendQuery, AttendAnswer> {
    let query_id = message.query_id;
    let lease = message.nccl.take().map(NcclLease::try_from).transpose();
    let taken = link.map_or(Ok(()), |link| link.take_queries(&mut message));
    let lease = lease.map_err(|fault| fault.within("nccl"));
    match taken.and(lease).and_then(|lease| Ok((AttendQuery::try_from(message)?, lease))) {
        Ok((query, lease)) => {
            named.note(query_id, lease);
            Step::Forward(query)
        }
        Err(fault) => {
            let error = Error::from(fault);
            Step::Answer(AttendAnswer::Failed {
                query_id,
                code: code_number(error.code),
                message: error.message,
            })
        }
    }
}

/// Which epochs the queries of a call named.
#[derive(Debug, Default)]
struct Named(Mutex<Names>);

#[derive(Debug, Default)]
struct Names {
    /// Those of queries that are not answered yet.
    of_queries: HashMap<u64, NcclLease>,
    /// The one that was named last: those before are over.
    newest: Option<NcclLease>,
}

impl Named {
    fn names(&self) -> MutexGuard<'_, Names> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, query_id: u64, lease: Option<NcclLease>) {
        let mut names = self.names();
        names.of_queries.remove(&query_id);
        let Some(lease) = lease else { return };
        names.newest = Some(lease);
        if names.of_queries.len() < NAMED_MAX {
            names.of_queries.insert(query_id, lease);
        }
    }

    /// What the query of an answer named, and whether nothing was named later.
    fn of(&self, query_id: u64, is_last: bool) -> Option<(NcclLease, bool)> {
        let mut names = self.names();
        let lease = match is_last {
            true => names.of_queries.remove(&query_id),
            false => names.of_queries.get(&query_id).copied(),
        }?;
        Some((lease, names.newest == Some(lease)))
    }
}

/// What a call sends.
struct Sending {
    answers: BoxStream<AttendAnswer>,
    lender: Option<Lender>,
    exchange: Exchange,
}

impl Sending {
    fn messages(self) -> impl Stream<Item = Result<v1::AttendResponse, Error>> + Send + 'static {
        stream::unfold(Some(self), |sending| async move {
            let mut sending = sending?;
            match sending.next().await.transpose()? {
                Ok(message) => Some((Ok(message), Some(sending))),
                Err(error) => Some((Err(error), None)),
            }
        })
    }

    async fn next(&mut self) -> Result<Option<v1::AttendResponse>, Error> {
        let answer = loop {
            tokio::select! {
                answer = self.answers.next() => break answer.transpose()?,
                () = self.exchange.left() => self.exchange.leave(),
            }
        };
        let Some(answer) = answer else {
            self.exchange.all_sent().await;
            return Ok(None);
        };
        let mut message = v1::AttendResponse::from(answer);
        match &self.lender {
            Some(lender) => lender.place_partials(&mut message),
            None => self.exchange.name(&mut message).await,
        }
        Ok(Some(message))
    }
}

/// What a call sends from GPU to GPU.
struct Exchange {
    convener: Option<Arc<Convener>>,
    traffic: TileTraffic,
    named: Arc<Named>,
    /// The epoch that the call has, until that is over, or the call is.
    held: Option<(NcclLease, Held, Bodies)>,
    /// The last one that was refused, or broke.
    over: Option<NcclLease>,
}

impl Exchange {
    /// Waits until the epoch of the call is over; for ever where it has none.
    fn left(&self) -> Left {
        let held = self.held.as_ref();
        held.map_or_else(|| -> Left { Box::pin(std::future::pending()) }, |(_, held, _)| held.left())
    }

    /// Gives back the end of an epoch that is over: others may want one.
    fn leave(&mut self) {
        let Some((lease, _held, mut bodies)) = self.held.take() else { return };
        self.over = Some(lease);
        // What did not go by now never will.
        if bodies.all_sent().now_or_never().is_none_or(|sent| sent.is_err()) {
            self.traffic.lost_attend_epoch();
        }
    }

    /// Leaves large partials out of a message and sends them in the epoch that the query named, where there is one; otherwise they stay, and
    /// the message says if the epoch is to blame.
    async fn name(&mut self, message: &mut v1::AttendResponse) {
        let is_last = message.last || message.error_code != 0;
        let Some((lease, is_newest)) = self.named.of(message.query_id, is_last) else { return };
        if message.body_bytes() < PARTIALS_BYTES_MIN {
            return;
        }
        let named = match is_newest {
            true => self.send(lease, message).await,
            false => Err(Error::invalid("nccl", "is an epoch that the call left for another one")),
        };
        if let Err(error) = named {
            tracing::debug!(%error, "partials of an attend stream go in messages");
            message.nccl_over = true;
        }
    }

    async fn send(&mut self, lease: NcclLease, message: &mut v1::AttendResponse) -> Result<(), Error> {
        if self.over == Some(lease) {
            return Err(Error::invalid("nccl", "is over"));
        }
        let sent = async {
            let bodies = self.bodies(lease).await?;
            bodies.name_partials(message).await
        };
        match sent.await {
            Ok(_) => {
                let bytes = message.nccl.as_ref().map_or(0, |body| body.bytes);
                self.traffic.exchanges_partials(bytes.into());
                Ok(())
            }
            Err(error) => {
                if self.held.is_some() {
                    self.traffic.lost_attend_epoch();
                }
                (self.held, self.over) = (None, Some(lease));
                Err(error)
            }
        }
    }

    /// The bodies in an epoch, which the call takes if it has it not yet. The one before is over.
    async fn bodies(&mut self, lease: NcclLease) -> Result<&mut Bodies, Error> {
        if self.held.as_ref().is_none_or(|(of, ..)| *of != lease) {
            self.held = None;
            let convener = self.convener.as_ref();
            let convener =
                convener.ok_or_else(|| Error::invalid("nccl", "is set, there is no such lane here"))?;
            let held = convener.lease_for_stream(lease).await?;
            let bodies = held.bodies();
            self.held = Some((lease, held, bodies));
        }
        let (.., bodies) = self.held.as_mut().expect("was taken");
        Ok(bodies)
    }

    /// Whoever reads the last answers reads their bodies too; who does not, need not.
    async fn all_sent(&mut self) {
        if let Some((_, _, bodies)) = &mut self.held
            && let Err(error) = bodies.all_sent().await
        {
            tracing::debug!(%error, "the last bodies of an attend stream were not taken");
        }
    }
}

#[cfg(test)]
mod tests;
