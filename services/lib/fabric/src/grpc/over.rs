//! Requests whose call is over while their window is closed. Hyper asks a request for nothing more until there is room for what it has of
//! it, so the request does not learn that its caller left, and as long as it is not ended neither does the server, which keeps what it has
//! of the call. But hyper gives every request that goes on a task of its own. When that is dropped HTTP/2 resets the stream, window or not.

use std::{
    cell::RefCell,
    pin::Pin,
    task::{Context, Poll},
};

use futures::Stream;
use hyper::rt::Executor;
use hyper_util::rt::TokioExecutor;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

thread_local! {
    /// What the task that is being polled on this thread sends: `None` outside of such tasks.
    static SENDS: RefCell<Option<Sends>> = const { RefCell::new(None) };
}

/// The request that a task sends, as far as it is known.
#[derive(Debug, Default)]
struct Sends {
    /// Fires when the call of the request is over.
    over: Option<CancellationToken>,
}

/// A request whose task ends with its call: `messages` until `over` fires, whatever became of those before.
pub(super) fn until<S: Stream>(over: CancellationToken, messages: S) -> Until<S> {
    Until { over, messages: Box::pin(messages), asked: Asked::Never }
}

/// See [`until`].
#[derive(Debug)]
pub(super) struct Until<S> {
    over: CancellationToken,
    messages: Pin<Box<S>>,
    asked: Asked,
}

/// How often a request was asked for a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Never,
    Once,
    Often,
}

impl<S: Stream> Stream for Until<S> {
    type Item = S::Item;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<S::Item>> {
        match self.asked {
            // By the task of the connection, which tries whether the whole request goes at once.
            Asked::Never => self.asked = Asked::Once,
            // It does not: the request gets its own task.
            Asked::Once => {
                self.asked = Asked::Often;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Asked::Often => SENDS.with_borrow_mut(|sends| {
                if let Some(sends) = sends {
                    sends.over.get_or_insert_with(|| self.over.clone());
                }
            }),
        }
        self.messages.as_mut().poll_next(cx)
    }
}

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Runs the tasks of a client's connections.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tasks;

impl Executor<Task> for Tasks {
    fn execute(&self, task: Task) {
        TokioExecutor::new().execute(Running { task: Some(task), over: None });
    }
}

/// A task of a connection, dropped when it sends a request whose call is over.
struct Running {
    task: Option<Task>,
    over: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
}

impl Running {
    fn is_over(&mut self, cx: &mut Context<'_>) -> bool {
        self.over.as_mut().is_some_and(|over| over.as_mut().poll(cx).is_ready())
    }
}

impl Future for Running {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.is_over(cx) {
            self.task = None;
        }
        let Some(task) = &mut self.task else { return Poll::Ready(()) };
        let outer = SENDS.replace(Some(Sends::default()));
        let polled = task.as_mut().poll(cx);
        let sends = SENDS.replace(outer);
        if polled.is_ready() {
            self.task = None;
            return polled;
        }
        if self.over.is_none()
            && let Some(over) = sends.and_then(|sends| sends.over)
        {
            self.over = Some(Box::pin(over.cancelled_owned()));
            if self.is_over(cx) {
                self.task = None;
                return Poll::Ready(());
            }
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::{FutureExt, StreamExt, stream};

    use super::*;

    /// A task that sends `messages` as hyper does, and then waits for room.
    fn stuck(messages: Until<stream::Iter<std::ops::Range<u8>>>, held: Arc<()>) -> Running {
        let task = async move {
            let _held = held;
            messages.take(3).for_each(|_| std::future::ready(())).await;
            std::future::pending::<()>().await;
        };
        Running { task: Some(Box::pin(task)), over: None }
    }

    #[tokio::test]
    async fn a_task_that_waits_for_room_ends_with_its_call_and_no_other_does() {
        let (over, other) = (CancellationToken::new(), CancellationToken::new());
        let [held, of_other] = [Arc::new(()), Arc::new(())];
        let mut task = stuck(until(over.clone(), stream::iter(0..9)), held.clone());
        let mut beside = stuck(until(other, stream::iter(0..9)), of_other.clone());
        for _ in 0..3 {
            assert_eq!(((&mut task).now_or_never(), (&mut beside).now_or_never()), (None, None));
        }
        over.cancel();
        assert_eq!(((&mut task).now_or_never(), (&mut beside).now_or_never()), (Some(()), None));
        assert_eq!((Arc::strong_count(&held), Arc::strong_count(&of_other)), (1, 2));
    }

    #[tokio::test]
    async fn the_task_that_asks_first_is_the_connections_and_does_not_end() {
        let over = CancellationToken::new();
        let mut messages = until(over.clone(), stream::iter(0..9));
        let mut seen = Vec::new();
        // It asks until there is nothing for the moment.
        while let Some(Some(message)) = messages.next().now_or_never() {
            seen.push(message);
        }
        assert_eq!(seen, [0]);
        let mut connection = Running {
            task: Some(Box::pin(async move {
                let _messages = messages;
                std::future::pending::<()>().await;
            })),
            over: None,
        };
        over.cancel();
        assert_eq!((&mut connection).now_or_never(), None);
    }
}
