//! The client's side of the two methods that move tiles when bodies go from GPU to GPU (lane `nccl`).

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{Stream, StreamExt, stream};
use longshore_proto::{
    types::{PutAck, TileMemory, TileMessage},
    v1::{self, put_blocks_request::Part},
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};
use tonic::Status;

use super::{
    call::fault,
    epochs::{Epochs, Lease},
    streamed::{is_kept, is_told, status},
    tiles::{Failure, TileChannels, acknowledgement, single, undecodable},
};
use crate::{
    BoxStream, CallContext, Code, Error,
    lane::Hop,
    nccl::{Arrivals, Bodies, is_of_epoch},
    tiles::{self, GET_BLOCKS, Messages, Outgoing, OutgoingBody, PUT_BLOCKS},
};

/// How long the status of a call may come after its epoch broke: it says why.
const REST_PATIENCE: Duration = Duration::from_secs(1);

/// What the sending half of a store stream tells the half that ends it.
#[derive(Debug, Default)]
struct Outcome {
    all_sent: AtomicBool,
    /// Why they were not.
    why: Mutex<Option<Error>>,
}

impl Outcome {
    fn why(&self) -> Option<Error> {
        self.why.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl TileChannels {
    /// A store stream with the bodies of its tiles in the epoch of `lease`.
    pub(super) async fn put_exchanged(
        &self,
        hop: Hop,
        start: v1::PutBlocksStart,
        tiles: mpsc::Receiver<TileMessage>,
        lease: Lease,
    ) -> Result<BoxStream<PutAck>, Failure> {
        let (epochs, outcome) = (lease.epochs(), Arc::<Outcome>::default());
        let sending = Sending { bodies: lease.bodies(), tiles, outcome: Arc::clone(&outcome) };
        let start = single(&v1::PutBlocksRequest { part: Some(Part::Start(start)) });
        let messages =
            start.chain(sending.messages()).take_until(hop.context.cancel.clone().cancelled_owned());
        let response = self.call(&hop.context, PUT_BLOCKS, OutgoingBody::request(messages)).await;
        let response = response.map_err(|failure| match (failure, outcome.why()) {
            // This side reset it before the server answered.
            (Failure::Unanswered(error), Some(why)) => {
                Failure::Unanswered(instead_of(why, error, &epochs, &hop.context))
            }
            (failure, _) => {
                forget(&epochs, &failure);
                failure
            }
        })?;
        let messages = Messages::of_response(response, self.message_bytes_max());
        let ending = Ending { context: hop.context.clone(), messages, lease, outcome };
        Ok(hop.bound(Box::pin(ending.acks())))
    }

    /// A read stream with the bodies of its tiles in the epoch of `lease`.
    pub(super) async fn get_exchanged(
        &self,
        hop: Hop,
        get: v1::GetBlocksRequest,
        memory: Option<Arc<dyn TileMemory>>,
        lease: Lease,
    ) -> Result<BoxStream<Option<TileMessage>>, Failure> {
        let request = v1::GetBlocksRequest { nccl: Some(lease.wire()), ..get };
        let body = OutgoingBody::request(single(&request));
        let response = self.call(&hop.context, GET_BLOCKS, body).await;
        let response = response.inspect_err(|failure| forget(&lease.epochs(), failure))?;
        let messages = Messages::of_response(response, self.message_bytes_max());
        let (context, arrivals) = (hop.context.clone(), lease.arrivals());
        let reading = Reading { context, lease, messages, arrivals, memory };
        Ok(hop.bound(Box::pin(reading.answers())))
    }
}

/// What a call that did not begin says of the lane. That a shard cannot serve it now says nothing.
fn forget(epochs: &Epochs, failure: &Failure) {
    match failure {
        Failure::Unanswered(error) if error.code == Code::Unavailable => epochs.failed(),
        // A shard that knows the epoch no more, after a restart for instance, has forgotten the others too.
        Failure::Refused(error) if is_of_epoch(error) => epochs.forget(),
        Failure::Unanswered(_) | Failure::Refused(_) => {}
    }
}

/// A call that this side reset has no better reason than that for which it did, unless its caller ended it.
fn instead_of(why: Error, error: Error, epochs: &Epochs, context: &CallContext) -> Error {
    let is_over = context.cancel.is_cancelled() || error.code == Code::DeadlineExceeded;
    if is_over {
        return error;
    }
    epochs.failed();
    why
}

/// What a store stream sends.
struct Sending {
    bodies: Bodies,
    tiles: mpsc::Receiver<TileMessage>,
    outcome: Arc<Outcome>,
}

impl Sending {
    /// Until all is sent, or a failure, which resets the call unless the server says first what is wrong.
    fn messages(self) -> impl Stream<Item = Result<Outgoing, Status>> + Send + 'static {
        stream::unfold(Some(self), |sending| async move {
            let mut sending = sending?;
            match sending.next().await.transpose()? {
                Ok(message) => Some((Ok(message), Some(sending))),
                Err(why) => {
                    *sending.outcome.why.lock().unwrap_or_else(PoisonError::into_inner) = Some(why.clone());
                    tokio::time::sleep(REST_PATIENCE).await;
                    Some((Err(why.into()), None))
                }
            }
        })
    }

    async fn next(&mut self) -> Result<Option<Outgoing>, Error> {
        let Some(tile) = self.tiles.recv().await else {
            self.bodies.all_sent().await?;
            self.outcome.all_sent.store(true, Ordering::Release);
            return Ok(None);
        };
        Ok(Some(match self.bodies.name(&tile).await? {
            Some(wire) => {
                let message = v1::PutBlocksRequest { part: Some(Part::Tile(wire)) };
                Outgoing::Encoded(tiles::encoded(&message))
            }
            None => Outgoing::Put(tile),
        }))
    }
}

/// A store stream whose acknowledgements come.
struct Ending {
    context: CallContext,
    messages: Messages,
    lease: Lease,
    outcome: Arc<Outcome>,
}

impl Ending {
    /// The acknowledgements, then the status.
    fn acks(self) -> impl Stream<Item = Result<PutAck, Error>> + Send + 'static {
        stream::unfold(Some(self), |ending| async move {
            let mut ending = ending?;
            let ended = match ending.messages.next().await {
                Ok(Some(message)) => {
                    let ack = acknowledgement(message);
                    let rest = ack.is_ok().then_some(ending);
                    return Some((ack, rest));
                }
                Ok(None) => status(&ending.context, &ending.messages),
                Err(status) => Err(fault(&ending.context, &status)),
            };
            ending.end(ended).map(|error| (Err(error), None))
        })
    }

    /// What the caller is told of the end.
    fn end(self, ended: Result<(), Error>) -> Option<Error> {
        let Self { context, messages, lease, outcome } = self;
        let epochs = lease.epochs();
        match (ended, outcome.why()) {
            (Ok(()), _) => {
                if outcome.all_sent.load(Ordering::Acquire) {
                    keep(lease, &messages);
                }
                None
            }
            (Err(error), Some(why)) if !is_told(&messages) => Some(instead_of(why, error, &epochs, &context)),
            (Err(error), _) => {
                if is_of_epoch(&error) {
                    epochs.failed();
                }
                Some(error)
            }
        }
    }
}

/// Keeps an epoch for the next call if the server keeps it too.
fn keep(lease: Lease, messages: &Messages) {
    if is_kept(messages) {
        lease.give_back();
    }
}

/// A read stream under way.
struct Reading {
    context: CallContext,
    lease: Lease,
    messages: Messages,
    arrivals: Arrivals,
    memory: Option<Arc<dyn TileMemory>>,
}

impl Reading {
    fn answers(self) -> impl Stream<Item = Result<Option<TileMessage>, Error>> + Send + 'static {
        stream::unfold(Some(self), |reading| async move {
            let mut reading = reading?;
            match reading.next().await {
                Ok(Some(answer)) => Some((Ok(answer), Some(reading))),
                Ok(None) => {
                    keep(reading.lease, &reading.messages);
                    None
                }
                Err(error) => Some((Err(error), None)),
            }
        })
    }

    /// A tile, or that a block is not held; `None` at the good end.
    async fn next(&mut self) -> Result<Option<Option<TileMessage>>, Error> {
        let message = match self.messages.next().await {
            Ok(Some(message)) => message,
            Ok(None) => return self.told(status(&self.context, &self.messages)).map(|()| None),
            Err(status) => return self.told(Err(fault(&self.context, &status))).map(|()| None),
        };
        let answer = tiles::tile_answer(message).map_err(|status| undecodable(&status))?;
        let mut wire = match answer {
            Ok(tile) => return Ok(Some(Some(tile))),
            Err(v1::GetBlocksResponse { tile: Some(wire), missing: false }) => wire,
            Err(other) => {
                return Option::try_from(other).map(Some).map_err(|fault| Error::bad_answer(&fault));
            }
        };
        let named = self.arrivals.named(&mut wire).map_err(|error| {
            Error::new(Code::DataLoss, format!("the answer of the peer makes no sense: {error}"))
        })?;
        let Some(named) = named else {
            return TileMessage::try_from(wire)
                .map(|tile| Some(Some(tile)))
                .map_err(|f| Error::bad_answer(&f));
        };
        match self.arrivals.receive(named, self.memory.as_deref()).await {
            Ok(tile) => Ok(Some(Some(tile))),
            Err(error) => Err(self.why(error).await),
        }
    }

    /// How the call ended, as the server says.
    fn told(&self, ended: Result<(), Error>) -> Result<(), Error> {
        ended.inspect_err(|error| {
            if is_of_epoch(error) {
                self.lease.epochs().failed();
            }
        })
    }

    /// Why a body did not come: as the server's status says, if that comes soon and says anything.
    async fn why(&mut self, error: Error) -> Error {
        let soon = Instant::now() + REST_PATIENCE;
        let ended = loop {
            match timeout_at(soon, self.messages.next()).await {
                Ok(Ok(Some(_))) => {}
                Ok(Ok(None)) => break status(&self.context, &self.messages),
                Ok(Err(status)) => break Err(fault(&self.context, &status)),
                Err(_) => break Ok(()),
            }
        };
        match self.told(ended) {
            Err(told) => told,
            Ok(()) => {
                self.lease.epochs().failed();
                error
            }
        }
    }
}
