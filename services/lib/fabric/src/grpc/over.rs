//! Requests whose call is over while their window is closed. Hyper asks a request for nothing more until there is room for what it has of
//! it, so the request does not learn that its caller left, and as long as it is not ended neither does the server, which keeps what it has
//! of the call. But hyper gives every request that goes on a task of its own. When that is dropped HTTP/2 resets the stream, window or not.

use std::{
    cell::RefCell,
    pin::Pin,
    task::{Context, Poll},
};

use futures::{Stream, StreamExt, stream::TakeUntil};
use hyper::rt::Executor;
use hyper_util::rt::TokioExecutor;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

thread_local! {
    /// What was asked for messages in the task that is being polled on this thread: `None` outside of tasks that might give a request its own.
    static ASKED: RefCell<Option<Asked>> = const { RefCell::new(None) };
}

/// The request that was asked last, as far as it is known.
#[derive(Debug, Default)]
struct Asked {
    /// Fires when the call of the request is over.
    over: Option<CancellationToken>,
}

/// A request whose task ends with its call: `messages` until `over` fires, whatever became of those before.
pub(super) fn until<S: Stream>(over: CancellationToken, messages: S) -> Until<S> {
    let messages = Box::pin(messages.take_until(over.clone().cancelled_owned()));
    Until { over, messages }
}

/// See [`until`].
pub(super) struct Until<S: Stream> {
    over: CancellationToken,
    messages: Pin<Box<TakeUntil<S, WaitForCancellationFutureOwned>>>,
}

impl<S: Stream> Stream for Until<S> {
    type Item = S::Item;

    /// The task of the connection asks first, to see whether the whole request goes at once. If it does not, the next task that the
    /// connection begins is the request's.
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<S::Item>> {
        ASKED.with_borrow_mut(|asked| {
            if let Some(asked) = asked {
                asked.over = Some(self.over.clone());
            }
        });
        self.messages.as_mut().poll_next(cx)
    }
}

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Runs the tasks of a client's connections.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tasks;

impl Executor<Task> for Tasks {
    fn execute(&self, task: Task) {
        TokioExecutor::new().execute(Running::begin(task));
    }
}

/// A task of a connection, dropped when it sends a request whose call is over. What a task asks for itself never makes it end: it may be
/// that of the connection.
struct Running {
    task: Option<Task>,
    over: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
}

impl Running {
    /// A task that ends with the request that was asked last where it is begun. Where that went at once already it is the task which waits
    /// for the answer: nobody wants that either once the call is over.
    fn begin(task: Task) -> Self {
        let over = ASKED.with_borrow_mut(|asked| asked.as_mut().and_then(|asked| asked.over.take()));
        Self { task: Some(task), over: over.map(|over| Box::pin(over.cancelled_owned())) }
    }
}

impl Future for Running {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.over.as_mut().is_some_and(|over| over.as_mut().poll(cx).is_ready()) {
            self.task = None;
        }
        // A request's own task begins no other.
        let begins = self.over.is_none().then(Asked::default);
        let Some(task) = &mut self.task else { return Poll::Ready(()) };
        let outer = ASKED.replace(begins);
        let polled = task.as_mut().poll(cx);
        ASKED.set(outer);
        if polled.is_ready() {
            self.task = None;
        }
        polled
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use futures::{FutureExt, stream};

    use super::*;

    type Request = Until<stream::Iter<std::ops::Range<u8>>>;

    /// The task of a connection that asks a request `times` and gives it a task then, which waits for room for ever.
    fn connection(
        requests: Vec<(Request, Arc<()>)>,
        times: usize,
        begun: Arc<Mutex<Vec<Running>>>,
    ) -> Running {
        let mut requests = requests.into_iter();
        let task = std::future::poll_fn(move |cx| {
            if let Some((mut request, held)) = requests.next() {
                for _ in 0..times {
                    assert!(request.poll_next_unpin(cx).is_ready());
                }
                let pipe = async move {
                    let _held = held;
                    while request.next().await.is_some() {}
                    std::future::pending::<()>().await;
                };
                begun.lock().unwrap().push(Running::begin(Box::pin(pipe)));
                // That waits for its answer.
                begun.lock().unwrap().push(Running::begin(Box::pin(std::future::pending())));
            }
            Poll::Pending
        });
        Running::begin(Box::pin(task))
    }

    #[tokio::test]
    async fn the_task_of_a_request_ends_with_its_call_and_no_other_does() {
        // However often the connection asks before it gives the request its own task.
        for times in [1, 2, 3, 8] {
            let (over, other) = (CancellationToken::new(), CancellationToken::new());
            let [held, of_other] = [Arc::new(()), Arc::new(())];
            let begun = Arc::new(Mutex::new(Vec::new()));
            let requests = vec![
                (until(over.clone(), stream::iter(0..9)), held.clone()),
                (until(other.clone(), stream::iter(0..9)), of_other.clone()),
            ];
            let mut connection = connection(requests, times, Arc::clone(&begun));
            assert_eq!([(&mut connection).now_or_never(), (&mut connection).now_or_never()], [None, None]);
            let mut tasks = std::mem::take(&mut *begun.lock().unwrap());
            let mut ended = || tasks.iter_mut().map(|task| task.now_or_never().is_some()).collect::<Vec<_>>();
            assert_eq!(ended(), [false; 4]);
            over.cancel();
            assert_eq!(ended(), [true, false, false, false]);
            assert_eq!((Arc::strong_count(&held), Arc::strong_count(&of_other)), (1, 2));
            other.cancel();
            assert_eq!((&mut connection).now_or_never(), None, "it goes on");
        }
    }

    #[tokio::test]
    async fn outside_of_tasks_nothing_is_noted() {
        let over = CancellationToken::new();
        let mut request = until(over.clone(), stream::iter(0..9));
        assert_eq!(request.next().await, Some(0));
        over.cancel();
        let mut task = Running::begin(Box::pin(std::future::pending()));
        assert_eq!((&mut task).now_or_never(), None);
    }
}
