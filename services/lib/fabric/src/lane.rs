//! What every lane does around a call: a child token that fires when the caller lets go, the deadline, cancellation.

use std::{
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures::{FutureExt, Stream};
use tokio::time::{Instant, Sleep};
use tokio_util::{
    sync::{DropGuard, WaitForCancellationFutureOwned},
    task::task_tracker::TaskTrackerToken,
};

use crate::{BoxStream, CallContext, Code, Error, Lane};

/// One call on its way to a service. The service sees `context`, whose token fires when the caller cancels, or drops the
/// call's future or its answer stream. A panic of the service becomes an `Internal` error.
#[derive(Debug)]
pub(crate) struct Hop {
    pub(crate) context: CallContext,
    held: Held,
}

/// Dropped when the call ends, however it ends.
#[derive(Debug)]
struct Held {
    _guard: DropGuard,
    _counted: Option<TaskTrackerToken>,
}

impl Hop {
    /// Enters a call of `caller`.
    pub(crate) fn new(caller: &CallContext) -> Self {
        let context = CallContext { lane: Lane::Local, ..caller.child() };
        let held = Held { _guard: context.cancel.clone().drop_guard(), _counted: None };
        Self { context, held }
    }

    /// The same, of a call that came over `lane`.
    pub(crate) fn over(mut self, lane: Lane) -> Self {
        self.context.lane = lane;
        self
    }

    /// The same, counted as long as it lasts.
    pub(crate) fn holding(mut self, counted: TaskTrackerToken) -> Self {
        self.held._counted = Some(counted);
        self
    }

    /// Waits for a single answer.
    pub(crate) async fn answer<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let call = AssertUnwindSafe(within(&self.context, call));
        call.catch_unwind().await.unwrap_or_else(|_| Err(panicked()))
    }

    /// Waits for an answer stream; the stream stays under deadline and cancellation.
    pub(crate) async fn stream<T: Send + 'static>(
        self,
        call: impl Future<Output = Result<BoxStream<T>, Error>>,
    ) -> Result<BoxStream<T>, Error> {
        let stream = self.answer(call).await?;
        Ok(self.bound(stream))
    }

    /// Puts `stream` under this call's deadline and cancellation.
    pub(crate) fn bound<T: Send + 'static>(self, stream: BoxStream<T>) -> BoxStream<T> {
        let Self { context, held } = self;
        Box::pin(Bounded {
            inner: Some((stream, held)),
            cancelled: Box::pin(context.cancel.cancelled_owned()),
            deadline: context.deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline))),
        })
    }
}

fn panicked() -> Error {
    Error::new(Code::Internal, "the service panicked")
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

/// A stream under deadline and cancellation. What the call holds is dropped at the first end or error.
struct Bounded<T> {
    inner: Option<(BoxStream<T>, Held)>,
    cancelled: Pin<Box<WaitForCancellationFutureOwned>>,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl<T> Stream for Bounded<T> {
    type Item = Result<T, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some((inner, _)) = this.inner.as_mut() else {
            return Poll::Ready(None);
        };
        let item = if this.cancelled.as_mut().poll(cx).is_ready() {
            Some(Err(cancelled()))
        } else if this.deadline.as_mut().is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready()) {
            Some(Err(deadline_exceeded()))
        } else {
            let polled = catch_unwind(AssertUnwindSafe(|| inner.as_mut().poll_next(cx)));
            ready!(polled.unwrap_or_else(|_| Poll::Ready(Some(Err(panicked())))))
        };
        if !matches!(item, Some(Ok(_))) {
            this.inner = None;
        }
        Poll::Ready(item)
    }
}
