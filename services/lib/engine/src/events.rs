//! The answer stream of a worker: bounded, with a seat kept free for the last word, and a cancellation when it is dropped.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use futures::Stream;
use longshore_fabric::{BoxStream, Error};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

/// What became of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendOutcome<T> {
    /// The reader will see it.
    Sent,
    /// The reader is slow; the event comes back.
    Full(T),
    /// Nobody reads any more.
    Gone,
}

/// Sends the events of one call.
#[derive(Debug)]
pub struct EventSender<T> {
    events: mpsc::Sender<Result<T, Error>>,
    last: mpsc::OwnedPermit<Result<T, Error>>,
}

/// An event stream of at most `capacity` unread events. Dropping the stream fires `cancel`.
pub fn event_channel<T: Send + 'static>(
    capacity: usize,
    cancel: CancellationToken,
) -> (EventSender<T>, BoxStream<T>) {
    let (events, receiver) = mpsc::channel(capacity.max(1) + 1);
    let last = events.clone().try_reserve_owned().expect("a new channel has room for the last event");
    (EventSender { events, last }, Box::pin(EventStream { receiver, _cancel_on_drop: cancel.drop_guard() }))
}

impl<T> EventSender<T> {
    /// Sends without waiting.
    pub fn try_send(&self, event: T) -> SendOutcome<T> {
        match self.events.try_send(Ok(event)) {
            Ok(()) => SendOutcome::Sent,
            Err(mpsc::error::TrySendError::Full(Ok(event))) => SendOutcome::Full(event),
            Err(_) => SendOutcome::Gone,
        }
    }

    /// The channel itself, for a task that waits until the reader has caught up.
    pub fn channel(&self) -> mpsc::Sender<Result<T, Error>> {
        self.events.clone()
    }

    /// Whether nobody reads any more.
    pub fn is_gone(&self) -> bool {
        self.events.is_closed()
    }

    /// Sends the last event; never waits, however slow the reader is.
    pub fn finish(self, last: Result<T, Error>) {
        drop(self.last.send(last));
    }
}

struct EventStream<T> {
    receiver: mpsc::Receiver<Result<T, Error>>,
    _cancel_on_drop: DropGuard,
}

impl<T> Stream for EventStream<T> {
    type Item = Result<T, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.receiver.poll_recv(cx)
    }
}
