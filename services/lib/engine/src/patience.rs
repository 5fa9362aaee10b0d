//! Waiting for a shard no longer than it is worth, where others have the same blocks.

use std::time::Duration;

use longshore_fabric::CallContext;

use crate::{Error, ShardLink, error::check, intake::within};

/// Parts of the caller's time: one that a silent shard may take, the others for those that are asked instead.
const PARTS: u32 = 3;

/// `usual`, or less where the caller has little time: others need some too.
pub(crate) fn within_time(ctx: &CallContext, usual: Duration) -> Duration {
    ctx.time_left().map_or(usual, |left| usual.min(left / PARTS))
}

/// What a call to a shard ends with, waited for no longer than `patience` where there is one; then the shard is late.
pub(crate) async fn patiently<T>(
    link: &ShardLink,
    patience: Option<Duration>,
    call: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let Some(patience) = patience else { return call.await };
    tokio::time::timeout(patience, call).await.unwrap_or_else(|_| Err(late(link, patience)))
}

/// What is said of a shard that was waited for as long as `waited`.
pub(crate) fn late(link: &ShardLink, waited: Duration) -> Error {
    let waited_ms = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
    Error::Late { shard: link.id.clone(), waited_ms }
}

/// What a shard answers to one call or with one message: within the caller's time, and no later than `patience` allows.
pub(crate) async fn answer<T>(
    ctx: &CallContext,
    link: &ShardLink,
    patience: Option<Duration>,
    call: impl Future<Output = Result<T, longshore_fabric::Error>>,
) -> Result<T, Error> {
    let call = async {
        let answer = within(ctx, call).await.and_then(|answer| answer);
        answer.map_err(|source| Error::of_shard(ctx, &link.id, source))
    };
    let answer = patiently(link, patience, call).await;
    // Whoever went away meanwhile makes no shard late.
    if answer.is_err() {
        check(ctx)?;
    }
    answer
}
