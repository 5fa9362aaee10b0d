//! The client's side of the two methods that move tiles when those travel on a connection of their own (lane `tcp`).

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, stream};
use longshore_proto::{
    types::{PutAck, TileMemory, TileMessage},
    v1::{self, put_blocks_request::Part},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use tonic::Status;

use super::{
    call::fault,
    dial::{Dial, Lease},
    leased::{
        Ending, Leased, REST_PATIENCE, Reading, Way, acks, answers, instead_of, is_kept, is_told, status,
    },
    over::until,
    tiles::{Failure, TileChannels, single},
};
use crate::{
    BoxStream, CallContext, Code, Error,
    lane::Hop,
    tcp::{Buffers, Fault, Frame},
    tiles::{GET_BLOCKS, Messages, OutgoingBody, PUT_BLOCKS},
};

/// The half of a store stream that sends.
struct Sending {
    lease: Lease,
    /// The last frame is on its way, or there.
    last: Arc<AtomicBool>,
    /// For the half that ends the stream.
    sent: oneshot::Sender<Result<Lease, Unsent>>,
}

/// The half of a store stream that ends it.
struct Outcome {
    dial: Arc<Dial>,
    last: Arc<AtomicBool>,
    /// The connection, when all frames went.
    sent: oneshot::Receiver<Result<Lease, Unsent>>,
    /// How long it may take to come when the server has all frames.
    patience: Duration,
}

/// Why not all frames of a call went.
#[derive(Debug)]
struct Unsent {
    why: Error,
    /// Where the connection led, when it is to blame.
    dial: Option<Arc<Dial>>,
}

impl Unsent {
    fn instead_of(self, error: Error, context: &CallContext) -> Error {
        instead_of(self.why, error, self.dial.as_deref(), context)
    }
}

/// Both halves of a store stream on the connection of `lease`.
fn halves(lease: Lease) -> (Sending, Outcome) {
    let (last, (told, sent)) = (Arc::<AtomicBool>::default(), oneshot::channel());
    let (dial, patience) = (lease.way(), lease.patience().read);
    let sending = Sending { lease, last: Arc::clone(&last), sent: told };
    (sending, Outcome { dial, last, sent, patience })
}

impl Outcome {
    /// Why not all frames went, as far as it is known.
    fn unsent(&mut self) -> Option<Unsent> {
        self.sent.try_recv().ok()?.err()
    }

    /// The connection of a call that ended well. The server may say so before the half that sends has heard that its last frame is there.
    async fn lease(&mut self) -> Option<Lease> {
        if !self.last.load(Ordering::Acquire) {
            // Whatever the server says, it cannot have all frames.
            return None;
        }
        timeout(self.patience, &mut self.sent).await.ok()?.ok()?.ok()
    }
}

impl Ending for Outcome {
    async fn end(
        mut self,
        context: CallContext,
        messages: Messages,
        ended: Result<(), Error>,
    ) -> Option<Error> {
        let Err(error) = ended else {
            if is_kept(&messages)
                && let Some(lease) = self.lease().await
            {
                lease.give_back();
            }
            return None;
        };
        match self.unsent() {
            Some(unsent) if !is_told(&messages) => Some(unsent.instead_of(error, &context)),
            _ => self.dial.told::<()>(Err(error)).err(),
        }
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
    ) -> Result<BoxStream<PutAck>, Failure> {
        let (sending, mut outcome) = halves(lease);
        let start = single(&v1::PutBlocksRequest { part: Some(Part::Start(start)) });
        let nothing =
            stream::once(sending.send_all(tiles)).filter_map(|sent| std::future::ready(sent.err().map(Err)));
        let messages = until(hop.context.cancel.clone(), start.chain(nothing));
        let response = self.call(&hop.context, PUT_BLOCKS, OutgoingBody::request(messages)).await;
        let response = response.map_err(|failure| match (failure, outcome.unsent()) {
            // This side reset it before the server answered.
            (Failure::Unanswered(error), Some(unsent)) => {
                Failure::Unanswered(unsent.instead_of(error, &hop.context))
            }
            (failure, _) => {
                outcome.dial.note(&failure);
                failure
            }
        })?;
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
    ) -> Result<BoxStream<Option<TileMessage>>, Failure> {
        let request = v1::GetBlocksRequest { connection: Some(lease.wire()), ..get };
        let body = OutgoingBody::request(single(&request));
        let response = self.call(&hop.context, GET_BLOCKS, body).await;
        let response = response.inspect_err(|failure| lease.way().note(failure))?;
        let messages = Messages::of_response(response, self.message_bytes_max());
        let (context, buffers) = (hop.context.clone(), lease.buffers());
        let reading = Frames { context, lease, messages, status: None, memory, buffers };
        Ok(hop.bound(Box::pin(answers(reading))))
    }
}

impl Sending {
    /// Sends tiles as frames until there are no more. A failure resets the call, unless the server says first what is wrong.
    async fn send_all(mut self, mut tiles: mpsc::Receiver<TileMessage>) -> Result<(), Status> {
        let Err(fault) = self.send(&mut tiles).await else {
            let _nobody_waits_for_it = self.sent.send(Ok(self.lease));
            return Ok(());
        };
        let why_is_to_come = matches!(fault, Fault::Broken(_));
        let dial = fault.is_of_connection().then(|| self.lease.way());
        let why = fault.of_request();
        let _nobody_waits_for_it = self.sent.send(Err(Unsent { why: why.clone(), dial }));
        drop(self.lease);
        if why_is_to_come {
            tokio::time::sleep(REST_PATIENCE).await;
        }
        Err(why.into())
    }

    async fn send(&mut self, tiles: &mut mpsc::Receiver<TileMessage>) -> Result<(), Fault> {
        while let Some(tile) = tiles.recv().await {
            self.lease.stream().send_tile(&tile).await?;
        }
        self.last.store(true, Ordering::Release);
        self.lease.stream().send(Frame::End, &[]).await
    }
}

/// A read stream under way.
struct Frames {
    context: CallContext,
    lease: Lease,
    messages: Messages,
    /// How the call ended, which may be told before its last frames came.
    status: Option<Result<(), Error>>,
    memory: Option<Arc<dyn TileMemory>>,
    buffers: Buffers,
}

impl Reading for Frames {
    type Lease = Lease;

    fn into_lease(self) -> (Lease, Messages) {
        (self.lease, self.messages)
    }

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
}

impl Frames {
    /// The next frame, while the call goes on or soon after its end.
    async fn frame(&mut self) -> Result<Result<Frame, Fault>, Error> {
        loop {
            // A good status may come while frames are under way, which may pause then as within a body; after another one they only
            // tell why.
            let read = self.lease.patience().read;
            let of = |status: &Result<(), Error>| status.as_ref().map_or(REST_PATIENCE, |()| read);
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
            Some(Err(error)) => {
                if Dial::is_at_fault(&error) {
                    self.lease.way().failed();
                }
                error
            }
            _ => {
                self.lease.way().failed();
                fault.of_answer()
            }
        }
    }
}

#[cfg(test)]
mod tests;
