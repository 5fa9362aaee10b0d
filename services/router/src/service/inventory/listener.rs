//! One listener: what one shard tells of the blocks of one namespace, again and again.

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;
use longshore_blocks::{Namespace, ShardId};
use longshore_fabric::{CallContext, Code, Error as CallError};
use longshore_proto::types::{Identity, InventoryChange, InventoryNews, WatchInventory};
use longshore_routing::{InventoryIndex, News, Untaken};
use tokio_util::sync::CancellationToken;

use super::Inventories;

/// Pause before a stream that ended is begun again.
const RETRY: Duration = Duration::from_secs(1);
/// The longest pause, where there was no room or where a shard tells nothing: twice as long every time until then.
const RETRY_LAST: Duration = Duration::from_secs(300);
/// Shards tell their digest every five seconds: one that is silent for so long is not listened to.
const SILENCE: Duration = Duration::from_secs(20);

/// How a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// It can be begun again.
    Broken,
    /// There is no room for what it tells.
    Full,
    /// Another listener has its place.
    Replaced,
}

/// How long to wait before a stream is begun again.
#[derive(Debug, Default)]
struct Pause {
    last: Duration,
}

impl Pause {
    fn after(&mut self, ended: &Result<Ended, CallError>) -> Duration {
        let longer = (self.last * 2).clamp(RETRY, RETRY_LAST);
        self.last = match ended {
            Ok(Ended::Full) => longer,
            Err(error) if error.code == Code::ResourceExhausted => {
                longer.max(error.retry_after.unwrap_or_default()).min(RETRY_LAST)
            }
            // What this start of the shard does not offer it will not offer; where nobody knows of its starts it may be another one.
            Err(error) if error.code == Code::Unimplemented => RETRY_LAST,
            Ok(_) | Err(_) => Duration::ZERO,
        };
        self.last.max(RETRY)
    }
}

/// Listens to one shard. What it wrote to the index goes with it, unless another listener took its place.
#[derive(Debug)]
pub(super) struct Listener {
    own: Arc<Inventories>,
    namespace: Namespace,
    shard: ShardId,
    address: String,
    /// Its name among those that write to the index.
    writer: u64,
}

impl Listener {
    /// Takes the place of whoever listened before; `None` when `stop` fired, so that nobody takes a place after he was to leave it.
    pub(super) fn new(
        own: Arc<Inventories>,
        namespace: Namespace,
        shard: &ShardId,
        address: &str,
        stop: &CancellationToken,
    ) -> Option<Self> {
        let mut book = own.book();
        if stop.is_cancelled() {
            return None;
        }
        book.last_writer += 1;
        let writer = book.last_writer;
        book.writers.insert((namespace, shard.clone()), writer);
        drop(book);
        Some(Self { own, namespace, shard: shard.clone(), address: address.to_owned(), writer })
    }

    /// Listens until it is told to end.
    pub(super) async fn run(self, end: &CancellationToken) {
        let mut pause = Pause::default();
        loop {
            let ended = tokio::select! {
                ended = self.watch(&mut pause) => ended,
                () = end.cancelled() => return,
            };
            if ended == Ok(Ended::Replaced) {
                return;
            }
            self.change(|index| index.lost(self.namespace, &self.shard));
            let wait = pause.after(&ended);
            if let Err(error) = ended {
                tracing::debug!(shard = %self.shard, %error, ?wait, "a shard tells nothing of its blocks");
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = end.cancelled() => return,
            }
        }
    }

    async fn watch(&self, pause: &mut Pause) -> Result<Ended, CallError> {
        let after = self.change(|index| index.position(self.namespace, &self.shard)).flatten();
        let shard_map_epoch = self.own.cluster.borrow().epoch();
        let identity =
            Identity { deployment: self.own.deployment, namespace: self.namespace, shard_map_epoch };
        let ctx = CallContext::new("inventory");
        let _ends_with_this = ctx.cancel.clone().drop_guard();
        let client = self.own.connector.shard(&self.address)?;
        let begun = client.watch_inventory(&ctx, WatchInventory { identity, after });
        let Ok(begun) = tokio::time::timeout(SILENCE, begun).await else { return Ok(Ended::Broken) };
        let mut stream = begun?;
        while let Ok(Some(news)) = tokio::time::timeout(SILENCE, stream.next()).await {
            match self.take(news?) {
                // What it told so far had room: the next pause is a short one again.
                Some(Ok(())) if self.is_current() => *pause = Pause::default(),
                Some(Ok(())) => {}
                Some(Err(Untaken::OutOfStep)) => return Ok(Ended::Broken),
                Some(Err(Untaken::Full)) => return Ok(Ended::Full),
                None => return Ok(Ended::Replaced),
            }
        }
        Ok(Ended::Broken)
    }

    /// `None` when another listener has the place of this one.
    fn take(&self, news: InventoryNews) -> Option<Result<(), Untaken>> {
        let InventoryNews { incarnation, reset, events, told, blocks, digest } = news;
        let held = |change: InventoryChange| change == InventoryChange::Stored;
        let events: Vec<_> =
            events.into_iter().map(|(number, key, change)| (number, key, held(change))).collect();
        let stored = events.iter().filter(|(_, _, held)| *held).count() as u64;
        let gone = events.len() as u64 - stored;
        let news = News { incarnation, reset, events, told, blocks, digest };
        let taken = self.change(|index| index.take(self.namespace, &self.shard, &news))?;
        let metrics = &self.own.metrics;
        metrics.stored.inc_by(stored);
        metrics.gone.inc_by(gone);
        metrics.resets.inc_by(u64::from(reset));
        match taken {
            Ok(()) => {}
            Err(Untaken::OutOfStep) => _ = metrics.out_of_step.inc(),
            Err(Untaken::Full) => _ = metrics.full.inc(),
        }
        Some(taken)
    }

    /// Whether all that the shard holds has been told and had room.
    fn is_current(&self) -> bool {
        self.change(|index| index.position(self.namespace, &self.shard)).flatten().is_some()
    }

    /// Changes the index, unless another listener has the place of this one.
    fn change<T>(&self, change: impl FnOnce(&mut InventoryIndex) -> T) -> Option<T> {
        let mut book = self.own.book();
        if book.writers.get(&(self.namespace, self.shard.clone())) != Some(&self.writer) {
            return None;
        }
        let result = change(&mut book.index);
        self.own.metrics.blocks.set(book.index.blocks() as i64);
        self.own.metrics.current.set(book.index.current() as i64);
        Some(result)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.change(|index| index.forget(self.namespace, &self.shard));
        let mut book = self.own.book();
        let place = (self.namespace, self.shard.clone());
        if book.writers.get(&place) == Some(&self.writer) {
            book.writers.remove(&place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_where_there_is_no_room_and_end_with_it() {
        let mut pause = Pause::default();
        let waits: Vec<u64> = (0..11).map(|_| pause.after(&Ok(Ended::Full)).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        assert_eq!(pause.after(&Ok(Ended::Broken)), RETRY);
        let full = CallError::new(Code::ResourceExhausted, "full").with_retry_after(Duration::from_secs(3));
        let waits = [1, 2].map(|_| pause.after(&Err(full.clone())).as_secs());
        assert_eq!(waits, [3, 6], "no sooner than the shard says");
        assert_eq!(pause.after(&Err(CallError::new(Code::Unavailable, "gone"))), RETRY);
        assert_eq!(pause.after(&Err(CallError::new(Code::Unimplemented, "never"))), RETRY_LAST);
    }
}
