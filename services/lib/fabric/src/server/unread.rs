//! Answers that nobody reads. Hyper asks an answer for nothing while its reader leaves the window closed, so the answer learns neither of
//! its deadline nor of what its service thinks of such readers, and keeps what it has; h2 keeps frames that were not sent. Both let go of it
//! when the reader resets the stream, or with the connection.

use std::{
    any::Any,
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
use http::{Request, Response, uri::PathAndQuery};
use http_body::{Body as _, Frame, SizeHint};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use crate::{TileTraffic, shm::Connection};

/// How often answers are looked at while one may wait.
const LOOKS: u32 = 8;
/// So often at most.
const LOOK_MIN: Duration = Duration::from_millis(10);

/// Most bytes of a frame, so that whoever reads a large tile slowly is seen to go on: as many as an HTTP/2 frame has at most.
const FRAME_BYTES_MAX: usize = 1 << 20;

/// The answers under way at a listener; clones share them.
#[derive(Debug, Clone)]
pub(super) struct Unread {
    /// None: answers wait as long as it takes.
    patience: Option<Duration>,
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
    method: Option<PathAndQuery>,
}

/// The turn is not the reader's.
const SERVICE: u64 = u64::MAX;

/// What an answer has as long as any of it is under way, in the extensions of a response.
#[derive(Clone)]
pub(super) struct Keeps(pub(super) Arc<dyn Any + Send + Sync>);

impl Unread {
    /// A connection may keep an answer waiting for `patience`.
    pub(super) fn new(patience: Option<Duration>, traffic: TileTraffic) -> Self {
        Self { patience, begun: Instant::now(), answers: Arc::default(), traffic }
    }

    /// Ends connections whose readers take nothing, for as long as it is polled.
    pub(super) async fn watch(&self) {
        let Some(patience) = self.patience else { return std::future::pending().await };
        let pause = (patience / LOOKS).max(LOOK_MIN);
        loop {
            let before = Instant::now();
            tokio::time::sleep(pause).await;
            if before.elapsed() > pause + patience / 2 {
                // It was this process that stood still.
                self.pardon();
            }
            self.end_late(patience);
        }
    }

    fn pardon(&self) {
        let now = self.now();
        for answer in self.answers().under_way.values() {
            let later = |since| (since != SERVICE).then_some(now);
            let _turn_of_the_service =
                answer.waits_since.fetch_update(Ordering::AcqRel, Ordering::Acquire, later);
        }
    }

    fn end_late(&self, patience: Duration) {
        let (now, patience_us) = (self.now(), patience.as_micros() as u64);
        let is_late = |answer: &Answer| match answer.waits_since.load(Ordering::Acquire) {
            SERVICE => false,
            since => now.saturating_sub(since) >= patience_us,
        };
        let answers = self.answers();
        let late =
            answers.under_way.values().filter(|answer| is_late(answer) && !answer.sever.is_cancelled());
        for Answer { sever, method, .. } in late {
            sever.cancel();
            self.traffic.ended_unread();
            let method = method.as_ref().map(PathAndQuery::as_str);
            let patience_ms = patience.as_millis() as u64;
            tracing::warn!(patience_ms, method, "a connection is closed: an answer on it was not read");
        }
    }

    fn now(&self) -> u64 {
        self.begun.elapsed().as_micros() as u64
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same answer, looked after.
    fn over(
        &self,
        body: Body,
        sever: CancellationToken,
        method: Option<PathAndQuery>,
        keeps: Option<Keeps>,
    ) -> Watched {
        let waits_since = Arc::new(AtomicU64::new(self.now()));
        let mut answers = self.answers();
        answers.last += 1;
        let number = answers.last;
        let answer = Answer { waits_since: Arc::clone(&waits_since), sever, method };
        answers.under_way.insert(number, answer);
        drop(answers);
        let unread = self.clone();
        let under_way = Arc::new(UnderWay { number, unread, _keeps: keeps.map(|keeps| keeps.0) });
        Watched { body, rest: Bytes::new(), waits_since, under_way }
    }
}

/// An answer is looked after until this is dropped: by its body and by every frame that is not sent yet. HTTP/2 may have frames when
/// the body is long gone.
struct UnderWay {
    number: u64,
    unread: Unread,
    _keeps: Option<Arc<dyn Any + Send + Sync>>,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.unread.answers().under_way.remove(&self.number);
    }
}

/// Bytes of an answer that is looked after.
struct Part {
    bytes: Bytes,
    _under_way: Arc<UnderWay>,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// An answer that tells whose turn it is.
struct Watched {
    body: Body,
    /// Of the frame that goes out.
    rest: Bytes,
    waits_since: Arc<AtomicU64>,
    under_way: Arc<UnderWay>,
}

impl Watched {
    /// The next part of a frame of bytes.
    fn part(&mut self) -> Frame<Bytes> {
        let bytes = self.rest.split_to(self.rest.len().min(FRAME_BYTES_MAX));
        Frame::data(Bytes::from_owner(Part { bytes, _under_way: Arc::clone(&self.under_way) }))
    }

    fn poll_inner(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if !self.rest.is_empty() {
            return Poll::Ready(Some(Ok(self.part())));
        }
        Poll::Ready(match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Ok(frame)) => Some(Ok(match frame.into_data() {
                Ok(bytes) => {
                    self.rest = bytes;
                    self.part()
                }
                Err(trailers) => trailers,
            })),
            ended => ended,
        })
    }
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
        let frame = ready!(self.poll_inner(cx));
        self.waits_since.store(self.under_way.unread.now(), Ordering::Release);
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (rest, body) = (self.rest.len() as u64, self.body.size_hint());
        let mut hint = SizeHint::new();
        hint.set_lower(body.lower() + rest);
        if let Some(upper) = body.upper() {
            hint.set_upper(upper + rest);
        }
        hint
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
        let method = request.uri().path_and_query().cloned();
        let (unread, answer) = (self.unread.clone(), self.service.call(request));
        Box::pin(async move {
            let mut answer = answer.await?;
            let keeps = answer.extensions_mut().remove::<Keeps>();
            Ok(answer.map(|body| Body::new(unread.over(body, sever, method, keeps))))
        })
    }
}

#[cfg(test)]
mod tests;
