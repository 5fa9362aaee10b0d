//! Answers that nobody reads. HTTP/2 asks an answer for nothing while its reader leaves the window closed, so the answer learns neither of
//! its deadline nor of what its service thinks of such readers, and keeps what it has. It can be let go of only with its connection.

use std::{
    collections::HashMap,
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Frame, SizeHint};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use crate::{TileTraffic, shm::Connection};

/// How often answers are looked at while one may wait.
const LOOKS: u32 = 8;
/// So often at most.
const LOOK_MIN: Duration = Duration::from_millis(10);

/// The answers under way at a listener; clones share them.
#[derive(Debug, Clone)]
pub(super) struct Unread {
    patience: Duration,
    begun: Instant,
    answers: Arc<Mutex<Answers>>,
    traffic: TileTraffic,
}

#[derive(Debug, Default)]
struct Answers {
    last: u64,
    under_way: HashMap<u64, Answer>,
}

#[derive(Debug)]
struct Answer {
    /// Since when its reader is to take what the answer gave, in microseconds from the beginning of the listener; [`SERVICE`] while it is
    /// the service that has nothing.
    waits_since: Arc<AtomicU64>,
    sever: CancellationToken,
}

/// The turn is not the reader's.
const SERVICE: u64 = u64::MAX;

impl Unread {
    /// A connection may keep an answer waiting for `patience`.
    pub(super) fn new(patience: Duration, traffic: TileTraffic) -> Self {
        Self { patience, begun: Instant::now(), answers: Arc::default(), traffic }
    }

    /// Ends connections whose readers take nothing, for as long as it is polled.
    pub(super) async fn watch(&self) {
        let mut looks = tokio::time::interval((self.patience / LOOKS).max(LOOK_MIN));
        loop {
            looks.tick().await;
            self.end_late();
        }
    }

    fn end_late(&self) {
        let now = self.now();
        let patience = self.patience.as_micros() as u64;
        let is_late = |answer: &Answer| match answer.waits_since.load(Ordering::Acquire) {
            SERVICE => false,
            since => now.saturating_sub(since) >= patience,
        };
        let answers = self.answers();
        let late =
            answers.under_way.values().filter(|answer| is_late(answer) && !answer.sever.is_cancelled());
        for answer in late {
            answer.sever.cancel();
            self.traffic.ended_unread();
            let patience_ms = self.patience.as_millis() as u64;
            tracing::warn!(patience_ms, "a connection is closed: an answer on it was not read");
        }
    }

    fn now(&self) -> u64 {
        self.begun.elapsed().as_micros() as u64
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same answer, looked after.
    fn over(&self, body: Body, sever: CancellationToken) -> Watched {
        let waits_since = Arc::new(AtomicU64::new(self.now()));
        let mut answers = self.answers();
        answers.last += 1;
        let number = answers.last;
        answers.under_way.insert(number, Answer { waits_since: Arc::clone(&waits_since), sever });
        drop(answers);
        Watched { body, waits_since, number, unread: self.clone() }
    }
}

/// An answer that tells whose turn it is.
struct Watched {
    body: Body,
    waits_since: Arc<AtomicU64>,
    number: u64,
    unread: Unread,
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = Status;

    /// Hyper asks for a frame before it knows of room for it, and for the next when there was some: a frame that was given and
    /// not asked beyond is one that the reader leaves.
    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.waits_since.store(SERVICE, Ordering::Release);
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        self.waits_since.store(self.unread.now(), Ordering::Release);
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.unread.answers().under_way.remove(&self.number);
    }
}

impl<S> Layer<S> for Unread {
    type Service = Watching<S>;

    fn layer(&self, service: S) -> Watching<S> {
        Watching { service, unread: self.clone() }
    }
}

/// A service whose answers are looked after.
#[derive(Debug, Clone)]
pub(super) struct Watching<S> {
    service: S,
    unread: Unread,
}

impl<S> Service<Request<Body>> for Watching<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let connection = request.extensions().get::<Connection>();
        let sever = connection.map(|connection| connection.sever.clone()).unwrap_or_default();
        let (unread, answer) = (self.unread.clone(), self.service.call(request));
        Box::pin(async move {
            let answer = answer.await?;
            Ok(answer.map(|body| Body::new(unread.over(body, sever))))
        })
    }
}

#[cfg(test)]
mod tests;
