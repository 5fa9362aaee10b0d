//! How long a stream goes on: until its caller leaves, its deadline passes or the process stops.

use longshore_chassis::Tasks;
use longshore_fabric::CallContext;

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
