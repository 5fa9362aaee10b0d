//! The way of events to the client: bounded, and aware of clients that stop reading.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::Stream;
use longshore_fabric::Error as CallError;
use longshore_proto::types::GenerateEvent;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::Error;

/// Events that may wait for the client.
const EVENTS_MAX: usize = 64;

/// Sending half.
#[derive(Debug)]
pub(crate) struct Outlet {
    sender: mpsc::Sender<Result<GenerateEvent, CallError>>,
    stall: Duration,
}

/// Receiving half. A request that is cut off without a last word ends with an error, never silently.
#[derive(Debug)]
pub(crate) struct Events {
    receiver: mpsc::Receiver<Result<GenerateEvent, CallError>>,
    draining: CancellationToken,
    ended: bool,
}

/// Both halves. `draining` tells why a request was cut off.
pub(crate) fn outlet(stall: Duration, draining: CancellationToken) -> (Outlet, Events) {
    let (sender, receiver) = mpsc::channel(EVENTS_MAX);
    (Outlet { sender, stall }, Events { receiver, draining, ended: false })
}

impl Events {
    fn cut_off(&self) -> CallError {
        if self.draining.is_cancelled() {
            return Error::Draining.into();
        }
        Error::Internal("the request ended without a result".to_owned()).into()
    }
}

impl Outlet {
    /// Sends an event; fails when the client went away or reads nothing for too long.
    pub(crate) async fn send(&self, event: GenerateEvent) -> Result<(), Error> {
        self.send_item(Ok(event)).await
    }

    /// Ends the stream with an error.
    pub(crate) async fn fail(&self, error: CallError) {
        if let Err(unsent) = self.send_item(Err(error)).await {
            tracing::debug!(error = %unsent, "nobody heard the error of a request");
        }
    }

    async fn send_item(&self, item: Result<GenerateEvent, CallError>) -> Result<(), Error> {
        match self.sender.send_timeout(item, self.stall).await {
            Ok(()) => Ok(()),
            Err(mpsc::error::SendTimeoutError::Closed(_)) => Err(Error::Cancelled),
            Err(mpsc::error::SendTimeoutError::Timeout(_)) => {
                Err(Error::ClientStalled { waited: self.stall })
            }
        }
    }

    /// Resolves when the client went away.
    pub(crate) async fn closed(&self) {
        self.sender.closed().await;
    }
}

impl Stream for Events {
    type Item = Result<GenerateEvent, CallError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let item = std::task::ready!(self.receiver.poll_recv(cx));
        self.ended = !matches!(&item, Some(Ok(event)) if !matches!(event, GenerateEvent::Finished(_)));
        Poll::Ready(Some(item.unwrap_or_else(|| Err(self.cut_off()))))
    }
}
