//! How long a stream goes on: until its caller leaves, its deadline passes or the process stops.

use futures::{StreamExt as _, future::ready};
use longshore_chassis::Tasks;
use longshore_fabric::{BoxStream, CallContext, Error as CallError};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;

use crate::{Error, store::Store};

/// Resolves when nobody wants the stream's results any more, with the reason.
pub(crate) async fn ended(store: &Store, ctx: &CallContext, tasks: &Tasks) -> Error {
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

/// A stream of what comes through `items`, and then of the error that the sender ended it with, if any: that arrives although its caller
/// reads nothing for a while and `items` is full.
pub(crate) fn ending<T: Send + 'static>(
    items: mpsc::Receiver<Result<T, CallError>>,
) -> (oneshot::Sender<CallError>, BoxStream<T>) {
    let (end, ended) = oneshot::channel::<CallError>();
    let last = futures::stream::once(ended).filter_map(|error| ready(error.ok().map(Err)));
    (end, Box::pin(ReceiverStream::new(items).chain(last)))
}
