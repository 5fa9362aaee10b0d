//! The client's side of the two methods that move tiles when those travel on a connection of their own (lane `tcp`).

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{Stream, StreamExt, stream};
use longshore_proto::{
    types::{PutAck, TileMemory, TileMessage},
    v1::{self, put_blocks_request::Part},
};
use tokio::sync::mpsc;
use tonic::Status;

use super::{
    call::fault,
    dial::{Dial, Lease},
    tiles::{TileChannels, decoded, single},
};
use crate::{
    BoxStream, CallContext, Code, Error,
    lane::Hop,
    tcp::{Buffers, Fault, Frame, KEPT, KEPT_VALUE},
    tiles::{GET_BLOCKS, Messages, OutgoingBody, PUT_BLOCKS},
};

/// How long the status of a call may come after its tile connection broke: it says why. And how long frames may come after the status.
const REST_PATIENCE: Duration = Duration::from_secs(1);
/// How long the next frame may take after a good status: as long as within a body.
const REST_OF_GOOD: Duration = Duration::from_secs(10);

/// What became of a call's tile connection.
#[derive(Debug, Clone, Default)]
struct Outcome(Arc<Mutex<Sent>>);

#[derive(Debug, Default)]
enum Sent {
    /// Not all frames went yet.
    #[default]
    Some,
    /// All went.
    All(Box<Lease>),
    /// It failed.
    Failed(Error, Arc<Dial>),
}

impl Outcome {
    fn set(&self, sent: Sent) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = sent;
    }

    fn take(&self) -> Sent {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl TileChannels {
    /// A store stream with its tiles on the connection of `lease`.
    pub(super) async fn put_streamed(
        &self,
        hop: Hop,
        start: v1::PutBlocksStart,
        tiles: mpsc::Receiver<TileMessage>,
        lease: Lease,
    ) -> Result<BoxStream<PutAck>, Error> {
        let (outcome, dial) = (Outcome::default(), lease.dial());
        let start = single(&v1::PutBlocksRequest { part: Some(Part::Start(start)) });
        let nothing = stream::once(send_all(lease, tiles, outcome.clone()))
            .filter_map(|sent| std::future::ready(sent.err().map(Err)));
        let messages = start.chain(nothing).take_until(hop.context.cancel.clone().cancelled_owned());
        let response = self.call(&hop.context, PUT_BLOCKS, OutgoingBody::request(messages)).await;
        let response = response.inspect_err(|error| forget(&dial, error))?;
        let messages = Messages::of_response(response, self.message_bytes_max());
        let context = hop.context.clone();
        Ok(hop.bound(Box::pin(acks(context, messages, outcome))))
    }

    /// A read stream with its answers on the connection of `lease`.
    pub(super) async fn get_streamed(
        &self,
        hop: Hop,
        get: v1::GetBlocksRequest,
        memory: Option<Arc<dyn TileMemory>>,
        lease: Lease,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        let request = v1::GetBlocksRequest { connection: Some(lease.wire()), ..get };
        let body = OutgoingBody::request(single(&request));
        let response = self.call(&hop.context, GET_BLOCKS, body).await;
        let response = response.inspect_err(|error| forget(&lease.dial(), error))?;
        let messages = Messages::of_response(response, self.message_bytes_max());
        let (context, buffers) = (hop.context.clone(), lease.buffers());
        let reading = Reading { context, lease, messages, status: None, memory, buffers };
        Ok(hop.bound(Box::pin(reading.answers())))
    }
}

/// A server that knows the connection no more has forgotten the others too.
fn forget(dial: &Dial, error: &Error) {
    if error.code == Code::Unavailable {
        dial.failed();
    }
}

/// Sends tiles as frames until there are no more. A failure resets the call, unless the server says first what is wrong.
async fn send_all(
    mut lease: Lease,
    mut tiles: mpsc::Receiver<TileMessage>,
    outcome: Outcome,
) -> Result<(), Status> {
    match send(&mut lease, &mut tiles).await {
        Ok(()) => {
            outcome.set(Sent::All(Box::new(lease)));
            Ok(())
        }
        Err(fault) => {
            let why_is_to_come = matches!(fault, Fault::Broken(_));
            let error = fault.of_request();
            outcome.set(Sent::Failed(error.clone(), lease.dial()));
            drop(lease);
            if why_is_to_come {
                tokio::time::sleep(REST_PATIENCE).await;
            }
            Err(error.into())
        }
    }
}

async fn send(lease: &mut Lease, tiles: &mut mpsc::Receiver<TileMessage>) -> Result<(), Fault> {
    while let Some(tile) = tiles.recv().await {
        lease.stream().send_tile(&tile).await?;
    }
    lease.stream().send(Frame::End, &[]).await
}

/// The acknowledgements of a store stream, then its status.
fn acks(
    context: CallContext,
    messages: Messages,
    outcome: Outcome,
) -> impl Stream<Item = Result<PutAck, Error>> + Send + 'static {
    stream::unfold(Some((context, messages, outcome)), |state| async move {
        let (context, mut messages, outcome) = state?;
        let ended = match messages.next().await {
            Ok(Some(message)) => {
                let ack = decoded(message).and_then(|answer: v1::PutBlocksResponse| {
                    PutAck::try_from(answer).map_err(|fault| Error::bad_answer(&fault))
                });
                let rest = ack.is_ok().then_some((context, messages, outcome));
                return Some((ack, rest));
            }
            Ok(None) => status(&context, &messages),
            Err(status) => Err(fault(&context, &status)),
        };
        match (ended, outcome.take()) {
            (Ok(()), Sent::All(lease)) => {
                keep(*lease, &messages);
                None
            }
            (Ok(()), _) => None,
            // A call that this side reset has no better reason than that for which it did.
            (Err(error), Sent::Failed(why, dial)) if is_of_transport(&error) => {
                dial.failed();
                Some((Err(why), None))
            }
            (Err(error), _) => Some((Err(error), None)),
        }
    })
}

fn is_of_transport(error: &Error) -> bool {
    matches!(error.code, Code::Cancelled | Code::Unavailable | Code::Internal)
}

/// The status that ended a call.
fn status(context: &CallContext, messages: &Messages) -> Result<(), Error> {
    match messages.trailers().map(Status::from_header_map) {
        Some(Some(status)) if status.code() == tonic::Code::Ok => Ok(()),
        Some(Some(status)) => Err(fault(context, &status)),
        _ => Err(fault(context, &Status::unavailable("the answer ended without a status"))),
    }
}

/// Keeps a connection for the next call if the server keeps it too.
fn keep(lease: Lease, messages: &Messages) {
    let kept = messages.trailers().and_then(|trailers| trailers.get(KEPT));
    if kept.is_some_and(|kept| kept == KEPT_VALUE) {
        lease.give_back();
    }
}

/// A read stream under way.
struct Reading {
    context: CallContext,
    lease: Lease,
    messages: Messages,
    /// How the call ended, which may be told before its last frames came.
    status: Option<Result<(), Error>>,
    memory: Option<Arc<dyn TileMemory>>,
    buffers: Buffers,
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
        let frame = match self.frame().await? {
            Ok(frame) => frame,
            Err(fault) => return Err(self.why(fault).await),
        };
        match frame {
            Frame::Tile(head) => {
                match self.lease.stream().tile(head, self.memory.as_deref(), &self.buffers).await {
                    Ok(tile) => Ok(Some(Some(tile))),
                    Err(fault) => Err(self.why(fault).await),
                }
            }
            Frame::Missing => Ok(Some(None)),
            Frame::End => {
                let end = self.end().await;
                end.map(|()| None)
            }
        }
    }

    /// The next frame, while the call goes on or soon after its end.
    async fn frame(&mut self) -> Result<Result<Frame, Fault>, Error> {
        loop {
            // A good status may come while frames are under way; after another one they only tell why.
            let of = |status: &Result<(), Error>| status.as_ref().map_or(REST_PATIENCE, |()| REST_OF_GOOD);
            let limit = self.status.as_ref().map(of);
            tokio::select! {
                frame = self.lease.stream().next(limit) => return Ok(frame),
                message = self.messages.next(), if self.status.is_none() => self.note(message)?,
            }
        }
    }

    /// A call whose answers are frames has no messages.
    fn note(&mut self, message: Result<Option<crate::tiles::Rope>, Status>) -> Result<(), Error> {
        self.status = Some(match message {
            Ok(None) => status(&self.context, &self.messages),
            Err(status) => Err(fault(&self.context, &status)),
            Ok(Some(_)) => {
                let text = "the answer of the peer makes no sense: a message beside the frames of the call";
                return Err(Error::new(Code::DataLoss, text));
            }
        });
        Ok(())
    }

    /// The status of the call, after its last frame.
    async fn end(&mut self) -> Result<(), Error> {
        if self.status.is_none() {
            let patience = self.lease.patience().read;
            let Ok(message) = tokio::time::timeout(patience, self.messages.next()).await else {
                return Err(Fault::Late(patience).of_answer());
            };
            self.note(message)?;
        }
        self.status.take().unwrap_or(Ok(()))
    }

    /// Why the connection failed: as the server's status says, if that comes soon and says anything.
    async fn why(&mut self, fault: Fault) -> Error {
        if !matches!(fault, Fault::Nonsense { .. }) && self.status.is_none() {
            let soon = tokio::time::timeout(REST_PATIENCE, self.messages.next()).await;
            if let Ok(message) = soon
                && let Err(error) = self.note(message)
            {
                return error;
            }
        }
        match self.status.take() {
            Some(Err(error)) => error,
            _ => {
                self.lease.dial().failed();
                fault.of_answer()
            }
        }
    }
}
