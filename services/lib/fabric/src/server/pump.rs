//! Request streams into channels. No task moves the messages: the pump is polled by whoever waits for the answer, so that
//! it ends with the call.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::refusal::from_request;
use crate::{
    BoxStream, Error,
    lane::{Hop, within},
};

/// Messages that may wait between the wire and the service.
pub(super) const QUEUE: usize = 16;
/// Answers that the pump may give before the service gave its stream.
const EARLY_MAX: usize = 1024;
/// How long a stream that a client keeps open for later may be idle once the drain has started.
const DRAIN_IDLE: Duration = Duration::from_secs(1);

/// What becomes of one message.
pub(super) enum Step<T, A> {
    /// The service gets it.
    Forward(T),
    /// It is answered here and the service never sees it.
    Answer(A),
    /// It says nothing.
    Skip,
}

/// Moves `incoming` into `sender` until either ends. Yields answers to messages that the service must not see; an error
/// ends the call. With `draining`, ends when nothing comes for a while after that fired.
pub(super) fn pump<I, M, T, A, F>(
    incoming: I,
    sender: mpsc::Sender<T>,
    draining: Option<CancellationToken>,
    convert: F,
) -> BoxStream<A>
where
    I: Stream<Item = Result<M, Status>> + Send + Unpin + 'static,
    M: Send + 'static,
    T: Send + 'static,
    A: Send + 'static,
    F: FnMut(M) -> Result<Step<T, A>, Error> + Send + 'static,
{
    let state = Pump { incoming, sender, draining, convert };
    Box::pin(futures::stream::unfold(Some(state), |state| async move {
        let mut pump = state?;
        match pump.advance().await {
            Ok(Some(answer)) => Some((Ok(answer), Some(pump))),
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    }))
}

struct Pump<I, T, F> {
    incoming: I,
    sender: mpsc::Sender<T>,
    draining: Option<CancellationToken>,
    convert: F,
}

impl<I, T, F> Pump<I, T, F> {
    /// Moves messages until one has to be answered here; `None` at the end.
    async fn advance<M, A>(&mut self) -> Result<Option<A>, Error>
    where
        I: Stream<Item = Result<M, Status>> + Unpin,
        F: FnMut(M) -> Result<Step<T, A>, Error>,
    {
        loop {
            let message = tokio::select! {
                message = self.incoming.next() => message.transpose().map_err(|status| from_request(&status))?,
                () = idle_in_drain(self.draining.as_ref()) => None,
                // A service that wants no more messages need not be fed; its answer is under way.
                () = self.sender.closed() => None,
            };
            let Some(message) = message else {
                return Ok(None);
            };
            match (self.convert)(message)? {
                Step::Forward(item) => {
                    if self.sender.send(item).await.is_err() {
                        return Ok(None);
                    }
                }
                Step::Answer(answer) => return Ok(Some(answer)),
                Step::Skip => {}
            }
        }
    }
}

async fn idle_in_drain(draining: Option<&CancellationToken>) {
    match draining {
        Some(draining) => {
            draining.cancelled().await;
            tokio::time::sleep(DRAIN_IDLE).await;
        }
        None => std::future::pending().await,
    }
}

/// Runs `call` while `pump` feeds it; the answer stream goes on feeding it.
pub(super) async fn converse<A: Send + 'static>(
    hop: Hop,
    pump: BoxStream<A>,
    call: impl Future<Output = Result<BoxStream<A>, Error>> + Send,
) -> Result<BoxStream<A>, Error> {
    let conversation = conversation(&hop, pump, call).await?;
    Ok(hop.bound(conversation))
}

/// The same, whose answers are still to be put under the call's deadline and cancellation, with whatever becomes of them.
pub(super) async fn conversation<A: Send + 'static>(
    hop: &Hop,
    pump: BoxStream<A>,
    call: impl Future<Output = Result<BoxStream<A>, Error>> + Send,
) -> Result<BoxStream<A>, Error> {
    let mut pump = pump.fuse();
    let mut early = VecDeque::new();
    let feeding = async {
        tokio::pin!(call);
        loop {
            let answer = tokio::select! {
                biased;
                opened = &mut call => return opened,
                Some(answer) = pump.next(), if early.len() < EARLY_MAX => answer?,
                else => return call.await,
            };
            early.push_back(answer);
        }
    };
    let answers = hop.answer(feeding).await?;
    Ok(Box::pin(Conversation { early, pump: Some(pump), answers }))
}

/// The service's answers and the pump's; ends with the service's.
struct Conversation<A> {
    early: VecDeque<A>,
    pump: Option<futures::stream::Fuse<BoxStream<A>>>,
    answers: BoxStream<A>,
}

// Nothing in it is pinned in place.
impl<A> Unpin for Conversation<A> {}

impl<A> Stream for Conversation<A> {
    type Item = Result<A, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(answer) = self.early.pop_front() {
            return Poll::Ready(Some(Ok(answer)));
        }
        if let Some(pump) = self.pump.as_mut() {
            match pump.poll_next_unpin(cx) {
                Poll::Ready(Some(answer)) => return Poll::Ready(Some(answer)),
                Poll::Ready(None) => self.pump = None,
                Poll::Pending => {}
            }
        }
        self.answers.poll_next_unpin(cx)
    }
}

/// The first message of a stream, which carries the parameters.
pub(super) async fn first<M>(hop: &Hop, incoming: &mut Streaming<M>) -> Result<M, Error> {
    let message =
        within(&hop.context, async { incoming.message().await.map_err(|status| from_request(&status)) })
            .await?;
    message.ok_or_else(start_missing)
}

/// The stream did not begin with its parameters.
pub(super) fn start_missing() -> Error {
    Error::invalid("start", "is missing: the first message of the stream must carry it")
}

/// The stream repeated its parameters.
pub(super) fn start_repeated() -> Error {
    Error::invalid("start", "is allowed in the first message of the stream only")
}
