//! Messages out of an HTTP/2 body, each in the pieces in which the connection read it.

use std::{future::poll_fn, pin::Pin};

use bytes::Buf;
use http::HeaderMap;
use http_body::Body as _;
use tonic::{Status, body::Body};

use super::{PREFIX_BYTES, Rope};

/// The messages of one direction of a call. Bodies are read no faster than messages are asked for: what the peer may send ahead is
/// bounded by the windows of its connection.
#[derive(Debug)]
pub(crate) struct Messages {
    body: Body,
    read: Rope,
    /// Bytes of the message whose prefix was read.
    expected: Option<usize>,
    limit: usize,
    trailers: Option<HeaderMap>,
    ended: bool,
}

impl Messages {
    /// Reads `body`; refuses messages of more than `limit` bytes before it reads them.
    pub(crate) fn new(body: Body, limit: usize) -> Self {
        Self { body, read: Rope::default(), expected: None, limit, trailers: None, ended: false }
    }

    /// Those of a response. One without messages has its status among the headers.
    pub(crate) fn of_response(response: http::Response<Body>, limit: usize) -> Self {
        let (parts, body) = response.into_parts();
        let trailers = parts.headers.contains_key(Status::GRPC_STATUS).then_some(parts.headers);
        Self { trailers, ..Self::new(body, limit) }
    }

    /// The next message; `None` at the end. Dropping the future loses nothing.
    pub(crate) async fn next(&mut self) -> Result<Option<Rope>, Status> {
        let Some(expected) = self.begin().await? else { return Ok(None) };
        loop {
            if let Some(message) = self.read.take_front(expected) {
                self.expected = None;
                return Ok(Some(message));
            }
            self.fill_or_cut_short().await?;
        }
    }

    /// Waits for the begin of the next message and tells its bytes; `None` at the end. Dropping the future loses nothing.
    pub(crate) async fn begin(&mut self) -> Result<Option<usize>, Status> {
        loop {
            if let Some(expected) = self.prefix()? {
                return Ok(Some(expected));
            }
            if self.ended && !self.read.has_remaining() {
                return Ok(None);
            }
            self.fill_or_cut_short().await?;
        }
    }

    async fn fill_or_cut_short(&mut self) -> Result<(), Status> {
        if self.ended {
            // In the words of Tonic, which `refusal` says anew.
            return Err(Status::internal("Unexpected EOF decoding stream."));
        }
        self.fill().await
    }

    /// What came behind the last message, for the client's end of a call.
    pub(crate) fn trailers(&self) -> Option<&HeaderMap> {
        self.trailers.as_ref()
    }

    async fn fill(&mut self) -> Result<(), Status> {
        match poll_fn(|cx| Pin::new(&mut self.body).poll_frame(cx)).await {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => self.read.push(data),
                Err(frame) => self.trailers = frame.into_trailers().ok(),
            },
            Some(Err(status)) => return Err(status),
            None => self.ended = true,
        }
        Ok(())
    }

    /// Bytes of the message that begins what was read.
    fn prefix(&mut self) -> Result<Option<usize>, Status> {
        if self.expected.is_some() || self.read.remaining() < PREFIX_BYTES {
            return Ok(self.expected);
        }
        let compressed = self.read.get_u8();
        let bytes = self.read.get_u32() as usize;
        if compressed != 0 {
            return Err(Status::unimplemented("compressed messages are not supported"));
        }
        if bytes > self.limit {
            let limit = self.limit;
            return Err(Status::out_of_range(format!(
                "Error, decoded message length too large: found {bytes} bytes, the limit is: {limit} bytes"
            )));
        }
        self.expected = Some(bytes);
        Ok(self.expected)
    }
}
