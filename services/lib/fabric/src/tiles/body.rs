//! The sending side: an HTTP/2 body of messages, the tiles among them lent.

use std::{
    any::Any,
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use futures::Stream;
use http::{HeaderMap, HeaderValue};
use http_body::Frame;
use longshore_proto::types::TileMessage;
use tonic::Status;

use super::encode::{get_tile, put_tile};
use crate::tcp::{KEPT, KEPT_VALUE};

/// One message to send.
#[derive(Debug)]
pub(crate) enum Outgoing {
    /// With its prefix.
    Encoded(Bytes),
    /// A `PutBlocksRequest`.
    Put(TileMessage),
    /// A `GetBlocksResponse`.
    Got(TileMessage),
}

type Source = Pin<Box<dyn Stream<Item = Result<Outgoing, Status>> + Send>>;

/// Messages as a body. On the server's side a status follows them.
pub(crate) struct OutgoingBody {
    source: Option<Source>,
    frames: VecDeque<Bytes>,
    status: bool,
    /// Says, when all is sent, whether the call's tile connection is kept.
    kept: Option<Arc<AtomicBool>>,
    /// What must last until the last byte is sent, which is later than the end of this.
    while_sent: Option<Arc<dyn Any + Send + Sync>>,
}

impl OutgoingBody {
    /// The messages of a client. An error resets the call.
    pub(crate) fn request(messages: impl Stream<Item = Result<Outgoing, Status>> + Send + 'static) -> Self {
        Self {
            source: Some(Box::pin(messages)),
            frames: VecDeque::new(),
            status: false,
            kept: None,
            while_sent: None,
        }
    }

    /// The answers of a server; the first error is the status of the call.
    pub(crate) fn response(messages: impl Stream<Item = Result<Outgoing, Status>> + Send + 'static) -> Self {
        Self {
            source: Some(Box::pin(messages)),
            frames: VecDeque::new(),
            status: true,
            kept: None,
            while_sent: None,
        }
    }

    /// The same, of a call with a tile connection.
    pub(crate) fn with_kept(self, kept: Arc<AtomicBool>) -> Self {
        Self { kept: Some(kept), ..self }
    }

    /// The same, with what must last until the last byte is sent.
    pub(crate) fn keeping(self, guard: Arc<dyn Any + Send + Sync>) -> Self {
        Self { while_sent: Some(guard), ..self }
    }

    /// For whoever knows when that is.
    pub(crate) fn take_kept_while_sent(&mut self) -> Option<Arc<dyn Any + Send + Sync>> {
        self.while_sent.take()
    }

    fn end(&mut self, status: Status) -> Option<Result<Frame<Bytes>, Status>> {
        // Whatever the call holds goes first: its tile connection, for instance.
        self.source = None;
        if !self.status {
            return (status.code() != tonic::Code::Ok).then_some(Err(status));
        }
        let mut trailers = HeaderMap::new();
        if self.kept.as_ref().is_some_and(|kept| kept.load(Ordering::Acquire)) {
            trailers.insert(KEPT, HeaderValue::from_static(KEPT_VALUE));
        }
        Some(status.add_header(&mut trailers).map(|()| Frame::trailers(trailers)))
    }
}

impl http_body::Body for OutgoingBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            if let Some(frame) = this.frames.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(frame))));
            }
            let Some(source) = this.source.as_mut() else { return Poll::Ready(None) };
            match ready!(source.as_mut().poll_next(cx)) {
                Some(Ok(Outgoing::Encoded(message))) => this.frames.push_back(message),
                Some(Ok(Outgoing::Put(tile))) => put_tile(&tile, &mut this.frames),
                Some(Ok(Outgoing::Got(tile))) => get_tile(&tile, &mut this.frames),
                Some(Err(status)) => return Poll::Ready(this.end(status)),
                None => return Poll::Ready(this.end(Status::ok(""))),
            }
        }
    }
}
