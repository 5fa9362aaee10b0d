//! Shards that die or hang when a test says so, with everything that is under way on them.

use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt;
use longshore_fabric::{BoxStream, CallContext, Code, Error, Shard};
use longshore_kvstore::KvStore;
use longshore_proto::types::{
    AttendAnswer, AttendQuery, GetBlocks, Identity, Lookup, OpenView, OpenedView, PutAck, ShardStats,
    TileMessage, WireTileShape,
};
use tokio::sync::{mpsc, watch};

/// What becomes of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It answers.
    Alive,
    /// It is gone: every call fails at once.
    Dead,
    /// It takes what comes and never answers.
    Hung,
}

/// A shard with a fate. It is never in the same process for its callers, so that all goes over streams.
#[derive(Debug)]
pub struct Mortal {
    inner: Arc<KvStore>,
    fate: watch::Receiver<Fate>,
}

impl Mortal {
    /// `inner` as `fate` lets it be seen.
    pub fn new(inner: Arc<KvStore>, fate: watch::Receiver<Fate>) -> Self {
        Self { inner, fate }
    }

    async fn alive(&self) -> Result<(), Error> {
        let mut fate = self.fate.clone();
        loop {
            match *fate.borrow_and_update() {
                Fate::Alive => return Ok(()),
                Fate::Dead => return Err(gone()),
                Fate::Hung => {}
            }
            if fate.changed().await.is_err() {
                return Err(gone());
            }
        }
    }

    /// A stream that ends with an error when the shard dies, and falls silent when it hangs.
    fn mortal<T: Send + 'static>(&self, inner: BoxStream<T>) -> BoxStream<T> {
        let state = Some((inner, self.fate.clone()));
        Box::pin(futures::stream::unfold(state, |state| async move {
            let (mut inner, mut fate) = state?;
            loop {
                let now = *fate.borrow_and_update();
                match now {
                    Fate::Dead => return Some((Err(gone()), None)),
                    Fate::Hung => {
                        if fate.changed().await.is_err() {
                            return Some((Err(gone()), None));
                        }
                    }
                    Fate::Alive => tokio::select! {
                        item = inner.next() => return item.map(|item| (item, Some((inner, fate)))),
                        changed = fate.changed() => if changed.is_err() {
                            return inner.next().await.map(|item| (item, Some((inner, fate))));
                        },
                    },
                }
            }
        }))
    }
}

fn gone() -> Error {
    Error::new(Code::Unavailable, "the shard is gone")
}

#[async_trait]
impl Shard for Mortal {
    async fn lookup(&self, ctx: &CallContext, lookup: Lookup) -> Result<Vec<bool>, Error> {
        self.alive().await?;
        self.inner.lookup(ctx, lookup).await
    }

    async fn put_blocks(
        &self,
        ctx: &CallContext,
        identity: Identity,
        shape: WireTileShape,
        tiles: mpsc::Receiver<TileMessage>,
    ) -> Result<BoxStream<PutAck>, Error> {
        self.alive().await?;
        Ok(self.mortal(self.inner.put_blocks(ctx, identity, shape, tiles).await?))
    }

    async fn get_blocks(
        &self,
        ctx: &CallContext,
        get: GetBlocks,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        self.alive().await?;
        Ok(self.mortal(self.inner.get_blocks(ctx, get).await?))
    }

    async fn open_view(&self, ctx: &CallContext, open: OpenView) -> Result<OpenedView, Error> {
        self.alive().await?;
        self.inner.open_view(ctx, open).await
    }

    async fn attend(
        &self,
        ctx: &CallContext,
        queries: mpsc::Receiver<AttendQuery>,
    ) -> Result<BoxStream<AttendAnswer>, Error> {
        self.alive().await?;
        Ok(self.mortal(self.inner.attend(ctx, queries).await?))
    }

    async fn close_view(&self, ctx: &CallContext, view_id: u64) -> Result<(), Error> {
        self.alive().await?;
        self.inner.close_view(ctx, view_id).await
    }

    async fn stats(&self, ctx: &CallContext) -> Result<ShardStats, Error> {
        self.alive().await?;
        self.inner.stats(ctx).await
    }
}
