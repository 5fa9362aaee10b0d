//! How long a stream goes on: until its caller leaves, its deadline passes or the process stops, or nobody takes what it has.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures::{StreamExt as _, future::ready};
use longshore_blocks::{Namespace, pool::Resource};
use longshore_chassis::Tasks;
use longshore_fabric::{BoxStream, CallContext, Error as CallError};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;

use crate::{Error, store::Store};

/// Kinds of streams that are ended when their caller stalls.
pub(crate) const STREAMS: [&str; 5] = ["put", "get", "summaries", "attend", "watch"];

/// Resolves when nobody wants the stream's results any more, with the reason.
async fn ended(store: &Store, ctx: &CallContext, tasks: &Tasks) -> Error {
    let deadline = async {
        match ctx.deadline {
            Some(deadline) => tokio::time::sleep_until(deadline).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = ctx.cancel.cancelled() => Error::Cancelled,
        () = deadline => Error::DeadlineExceeded,
        () = tasks.cancelled() => Error::ShuttingDown { shard: store.identity().shard_id.clone() },
    }
}

/// Where a stream's items go. A caller that takes none for the stall time ends the stream: what it keeps would be kept for ever.
#[derive(Debug)]
pub(crate) struct Outlet<T> {
    items: mpsc::Sender<Result<T, CallError>>,
    /// What kind of stream it is, for metrics and people.
    stream: &'static str,
    /// What a caller does that takes nothing.
    stalling: &'static str,
    /// Items for which there was room. Several may wait for it: the caller stalls when none of them gets any.
    sent: AtomicU64,
}

/// What became of an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    /// The caller has it, or there is room until it takes it.
    Yes,
    /// The caller went away: nobody wants further ones.
    Gone,
}

/// A kind of stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kind {
    /// Name of the task that serves one.
    pub(crate) task: &'static str,
    /// Name for metrics and people, one of [`STREAMS`].
    pub(crate) stream: &'static str,
    /// What a caller does that takes nothing.
    pub(crate) stalling: &'static str,
    /// Items that may be unread before the stream waits.
    pub(crate) unread: usize,
}

/// A stream of what `work` sends through its outlet, in a task of its own, until it is done, its caller leaves or nobody wants it any
/// more. When that is told by an error it comes last, and arrives although the caller reads nothing for a while and all room is taken.
/// `work` is dropped where it is.
pub(crate) fn run<T, W>(
    (store, tasks, ctx): (&Arc<Store>, &Tasks, &CallContext),
    kind: Kind,
    work: impl FnOnce(Arc<Store>, Arc<Outlet<T>>) -> W,
) -> BoxStream<T>
where
    T: Send + 'static,
    W: Future<Output = Result<(), Error>> + Send + 'static,
{
    let (items, taken) = mpsc::channel(kind.unread);
    let (end, answer) = ending(taken);
    let (stream, stalling) = (kind.stream, kind.stalling);
    let outlet = Arc::new(Outlet { items, stream, stalling, sent: AtomicU64::new(0) });
    let work = work(Arc::clone(store), Arc::clone(&outlet));
    let (store, ctx, scope) = (Arc::clone(store), ctx.clone(), tasks.clone());
    tasks.spawn(kind.task, async move {
        let failure = tokio::select! {
            ended = work => ended.err(),
            reason = ended(&store, &ctx, &scope) => Some(reason),
            () = outlet.closed() => None,
        };
        if let Some(error) = failure {
            let _caller_is_gone = end.send(error.into());
        }
    });
    answer
}

impl<T> Outlet<T> {
    /// Sends an item, waiting for room.
    pub(crate) async fn send(&self, store: &Store, item: T) -> Result<Taken, Error> {
        let stall_ms = store.config().stall_ms;
        let mut seen = self.sent.load(Relaxed);
        loop {
            match tokio::time::timeout(Duration::from_millis(stall_ms), self.items.reserve()).await {
                Ok(Ok(room)) => {
                    self.sent.fetch_add(1, Relaxed);
                    room.send(Ok(item));
                    return Ok(Taken::Yes);
                }
                Ok(Err(_)) => return Ok(Taken::Gone),
                Err(_) if self.sent.load(Relaxed) != seen => seen = self.sent.load(Relaxed),
                Err(_) => break,
            }
        }
        store.metrics.stalled(self.stream);
        Err(Error::Stalled { stream: self.stream, what: self.stalling, stall_ms })
    }

    /// Resolves when the caller went away.
    async fn closed(&self) {
        self.items.closed().await;
    }
}

/// A stream of what comes through `items`, and then of the error that the sender ended it with, if any: that arrives although its caller
/// reads nothing for a while and `items` is full.
fn ending<T: Send + 'static>(
    items: mpsc::Receiver<Result<T, CallError>>,
) -> (oneshot::Sender<CallError>, BoxStream<T>) {
    let (end, ended) = oneshot::channel::<CallError>();
    let last = futures::stream::once(ended).filter_map(|error| ready(error.ok().map(Err)));
    (end, Box::pin(ReceiverStream::new(items).chain(last)))
}

/// A stream's place among those that read.
#[derive(Debug)]
pub(crate) struct Place {
    store: Arc<Store>,
    tenant: Namespace,
    kind: Resource,
}

impl Place {
    pub(crate) fn take(store: &Arc<Store>, tenant: Namespace, kind: Resource) -> Result<Self, Error> {
        store.with_pool(|pool, _| pool.open_stream(tenant, kind))?;
        Ok(Self { store: Arc::clone(store), tenant, kind })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.store.with_pool(|pool, _| pool.close_stream(self.tenant, self.kind));
    }
}
