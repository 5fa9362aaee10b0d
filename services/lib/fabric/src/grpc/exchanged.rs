//! The client's side of the two methods that move tiles when bodies go from GPU to GPU (lane `nccl`).

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
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
    epochs::Lease,
    leased::{Ending, Leased, REST_PATIENCE, Reading, Way, acks, answers, instead_of, is_told, status},
    over::until,
    tiles::{Failure, TileChannels, single, undecodable},
};
use crate::{
    BoxStream, CallContext, Code, Error,
    lane::Hop,
    nccl::{Arrivals, Bodies},
    tiles::{self, GET_BLOCKS, Messages, Outgoing, OutgoingBody, PUT_BLOCKS},
};

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

/// The half of a store stream that ends it.
struct End {
    outcome: Arc<Outcome>,
    lease: Lease,
}

impl Ending for End {
    /// The other half is done with the epoch before the server can say that the call ended well.
    async fn end(self, context: CallContext, messages: Messages, ended: Result<(), Error>) -> Option<Error> {
        let Self { outcome, lease } = self;
        let epochs = lease.way();
        match (ended, outcome.why()) {
            (Ok(()), _) => {
                if outcome.all_sent.load(Ordering::Acquire) {
                    lease.keep(&messages);
                }
                None
            }
            (Err(error), Some(why)) if !is_told(&messages) => {
                Some(instead_of(why, error, Some(&*epochs), &context))
            }
            (ended, _) => epochs.told(ended).err(),
        }
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
        let (epochs, outcome) = (lease.way(), Arc::<Outcome>::default());
        let sending = Sending { bodies: lease.bodies(), tiles, outcome: Arc::clone(&outcome) };
        let start = single(&v1::PutBlocksRequest { part: Some(Part::Start(start)) });
        let messages = until(hop.context.cancel.clone(), start.chain(sending.messages()));
        let response = self.call(&hop.context, PUT_BLOCKS, OutgoingBody::request(messages)).await;
        let response = response.map_err(|failure| match (failure, outcome.why()) {
            // This side reset it before the server answered.
            (Failure::Unanswered(error), Some(why)) => {
                Failure::Unanswered(instead_of(why, error, Some(&*epochs), &hop.context))
            }
            (failure, _) => {
                epochs.note(&failure);
                failure
            }
        })?;
        let messages = Messages::of_response(response, self.message_bytes_max());
        let context = hop.context.clone();
        Ok(hop.bound(Box::pin(acks(context, messages, End { outcome, lease }))))
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
        let response = response.inspect_err(|failure| lease.way().note(failure))?;
        let messages = Messages::of_response(response, self.message_bytes_max());
        let (context, arrivals) = (hop.context.clone(), lease.arrivals());
        let reading = Named { context, lease, messages, arrivals, memory };
        Ok(hop.bound(Box::pin(answers(reading))))
    }
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

/// A read stream under way.
struct Named {
    context: CallContext,
    lease: Lease,
    messages: Messages,
    arrivals: Arrivals,
    memory: Option<Arc<dyn TileMemory>>,
}

impl Reading for Named {
    type Lease = Lease;

    fn into_lease(self) -> (Lease, Messages) {
        (self.lease, self.messages)
    }

    async fn next(&mut self) -> Result<Option<Option<TileMessage>>, Error> {
        let message = match self.messages.next().await {
            Ok(Some(message)) => message,
            Ok(None) => return self.lease.way().told(status(&self.context, &self.messages)).map(|()| None),
            Err(status) => return self.lease.way().told(Err(fault(&self.context, &status))),
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
}

impl Named {
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
        let epochs = self.lease.way();
        match epochs.told(ended) {
            Err(told) => told,
            Ok(()) => {
                epochs.failed();
                error
            }
        }
    }
}
