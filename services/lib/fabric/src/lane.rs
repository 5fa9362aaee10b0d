//! What every lane does around a call: a child token that fires when the caller lets go, the deadline, cancellation.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use futures::Stream;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::{CancellationToken, DropGuard, WaitForCancellationFutureOwned};

use crate::{BoxStream, CallContext, Code, Error};

/// One call on its way to a service. The service sees `context`, whose token fires when the caller cancels, or drops the
/// call's future or its answer stream.
#[derive(Debug)]
pub(crate) struct Hop {
    pub(crate) context: CallContext,
    guard: DropGuard,
}

impl Hop {
    /// Enters a call of `caller`.
    pub(crate) fn new(caller: &CallContext) -> Self {
        let context = caller.child();
        let guard = context.cancel.clone().drop_guard();
        Self { context, guard }
    }

    /// Waits for a single answer.
    pub(crate) async fn answer<T>(self, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        within(&self.context, call).await
    }

    /// Waits for an answer stream; the stream stays under deadline and cancellation.
    pub(crate) async fn stream<T: Send + 'static>(
        self,
        call: impl Future<Output = Result<BoxStream<T>, Error>>,
    ) -> Result<BoxStream<T>, Error> {
        let stream = within(&self.context, call).await?;
        Ok(self.bound(stream))
    }

    /// Puts `stream` under this call's deadline and cancellation.
    pub(crate) fn bound<T: Send + 'static>(self, stream: BoxStream<T>) -> BoxStream<T> {
        let Self { context, guard } = self;
        Box::pin(Bounded {
            inner: Some(stream),
            cancelled: Box::pin(context.cancel.cancelled_owned()),
            deadline: context.deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline))),
            _guard: Some(guard),
        })
    }
}

/// The caller went away.
pub(crate) fn cancelled() -> Error {
    Error::new(Code::Cancelled, "the call was cancelled")
}

/// The deadline passed.
pub(crate) fn deadline_exceeded() -> Error {
    Error::new(Code::DeadlineExceeded, "the deadline of the call passed")
}

/// Runs `call` until it ends, its caller cancels, or its deadline passes.
pub(crate) async fn within<T>(
    context: &CallContext,
    call: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::select! {
        biased;
        () = context.cancel.cancelled() => Err(cancelled()),
        () = sleep_until(context.deadline) => Err(deadline_exceeded()),
        result = call => result,
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Ends when `cancel` fires, so that a request stream does not outlive its call.
pub(crate) fn until_cancelled<S: Stream>(
    cancel: CancellationToken,
    stream: S,
) -> impl Stream<Item = S::Item> {
    futures::StreamExt::take_until(stream, cancel.cancelled_owned())
}

struct Bounded<T> {
    inner: Option<BoxStream<T>>,
    cancelled: Pin<Box<WaitForCancellationFutureOwned>>,
    deadline: Option<Pin<Box<Sleep>>>,
    _guard: Option<DropGuard>,
}

impl<T> Bounded<T> {
    fn end(&mut self) {
        self.inner = None;
        self._guard = None;
    }
}

impl<T> Stream for Bounded<T> {
    type Item = Result<T, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some(inner) = this.inner.as_mut() else {
            return Poll::Ready(None);
        };
        if this.cancelled.as_mut().poll(cx).is_ready() {
            this.end();
            return Poll::Ready(Some(Err(cancelled())));
        }
        if this.deadline.as_mut().is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready()) {
            this.end();
            return Poll::Ready(Some(Err(deadline_exceeded())));
        }
        let item = std::task::ready!(inner.as_mut().poll_next(cx));
        if !matches!(item, Some(Ok(_))) {
            this.end();
        }
        Poll::Ready(item)
    }
}
