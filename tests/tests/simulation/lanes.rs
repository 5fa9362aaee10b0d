//! A lane over the simulated network, and what is checked of every message on it.

use std::sync::{Arc, atomic::Ordering::SeqCst};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use longshore_blocks::crc32c;
use longshore_engine::within;
use longshore_fabric::{
    BoxStream, CallContext, Code, Connector, Decoder, Describer, Error, Inference, Prefiller, Shard,
};
use longshore_kvstore::KvStore;
use longshore_proto::types::{
    AttendAnswer, AttendQuery, GetBlocks, Identity, Lookup, OpenView, OpenedView, PutAck, ShardStats,
    TileMessage, WireTileShape,
};
use longshore_tests::truth;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::network::{Life, Network, Origin, broken};

/// What a simulation breaks on purpose, so that its checks can be seen to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sabotage {
    /// Nothing.
    None,
    /// Damaged tiles get the checksum of what they are now.
    Checksums,
    /// Shards are told the epoch that they want to hear.
    Epochs,
    /// The disks of all shards fail at once.
    Disks,
    /// Shards that are drained are stopped before they are.
    Drains,
}

/// Makes lanes from one process to the others.
#[derive(Debug, Clone)]
pub(crate) struct SimConnector {
    pub(crate) network: Arc<Network>,
    pub(crate) from: Origin,
    pub(crate) sabotage: Sabotage,
}

impl Connector for SimConnector {
    fn shard(&self, address: &str) -> Result<Arc<dyn Shard>, Error> {
        let node = address.strip_prefix("local:kv-").and_then(|node| node.parse().ok());
        let to = node.ok_or_else(|| Error::new(Code::InvalidArgument, format!("`{address}` is no shard")))?;
        let Self { network, from, sabotage } = self.clone();
        Ok(Arc::new(SimShard { network, from, to, sabotage }))
    }

    fn prefiller(&self, _address: &str) -> Result<Arc<dyn Prefiller>, Error> {
        Err(not_simulated())
    }

    fn decoder(&self, _address: &str) -> Result<Arc<dyn Decoder>, Error> {
        Err(not_simulated())
    }

    fn inference(&self, _address: &str) -> Result<Arc<dyn Inference>, Error> {
        Err(not_simulated())
    }

    fn describer(&self, _address: &str) -> Result<Arc<dyn Describer>, Error> {
        Err(not_simulated())
    }
}

fn not_simulated() -> Error {
    Error::new(Code::Unimplemented, "the simulation has shards and their clients only")
}

/// Whether who asks in another epoch must be refused.
#[derive(Debug, Clone, Copy)]
enum Fence {
    /// The call names none.
    None,
    Epoch(u64),
    /// The same of a question by which shards decide about their own copies: one that is drained refuses it in any epoch.
    Peek(u64),
}

/// A shard at the other end of the network.
#[derive(Debug)]
struct SimShard {
    network: Arc<Network>,
    from: Origin,
    to: usize,
    sabotage: Sabotage,
}

impl SimShard {
    /// Carries a question there, asks `call` and carries its answer back.
    async fn ask<T, F>(
        &self,
        ctx: &CallContext,
        fence: Fence,
        call: impl FnOnce(Arc<KvStore>, CallContext) -> F + Send,
    ) -> Result<(T, Life), Error>
    where
        T: Send,
        F: Future<Output = Result<T, Error>> + Send,
    {
        let context = ctx.child();
        let trip = async {
            self.network.pass(self.from, self.to).await?;
            let Some(life) = self.network.life(self.to) else {
                // Nobody listens there: the answer comes from the machine.
                return Err(broken());
            };
            let before = *life.epoch.borrow();
            let answer = tokio::select! {
                biased;
                () = life.dead.cancelled() => return Err(broken()),
                answer = call(Arc::clone(&life.store), context) => answer,
            };
            let after = *life.epoch.borrow();
            self.check_fence(fence, (before, after), &life, answer.as_ref().err());
            self.network.pass(self.origin(&life), self.from.node).await?;
            answer.map(|answer| (answer, life))
        };
        within(ctx, trip).await?
    }

    fn origin(&self, life: &Life) -> Origin {
        Origin { node: self.to, life: life.number }
    }

    /// A caller of another epoch is refused, whatever it asks.
    fn check_fence(&self, fence: Fence, (before, after): (u64, u64), life: &Life, error: Option<&Error>) {
        let asked = match fence {
            Fence::Epoch(asked) => asked,
            Fence::Peek(asked) if !life.drained.load(SeqCst) => asked,
            _ => return,
        };
        let refused = error.is_some_and(|error| error.code == Code::FailedPrecondition);
        if before == after && refused != (asked != before) {
            let what = format!("shard {} in epoch {before} was asked in {asked}: {error:?}", self.to);
            self.network.violated(format!("fence: {what}"));
        }
    }

    /// The identity as the shard hears it.
    fn told(&self, identity: Identity) -> Identity {
        match (self.sabotage, self.network.life(self.to)) {
            (Sabotage::Epochs, Some(life)) => Identity { shard_map_epoch: *life.epoch.borrow(), ..identity },
            _ => identity,
        }
    }

    fn stream(&self, ctx: &CallContext) -> Stream {
        Stream {
            network: Arc::clone(&self.network),
            from: self.from,
            to: self.to,
            sabotage: self.sabotage,
            broken: CancellationToken::new(),
            ctx: ctx.child(),
        }
    }
}

/// One call with a stream.
#[derive(Clone)]
struct Stream {
    network: Arc<Network>,
    from: Origin,
    to: usize,
    sabotage: Sabotage,
    /// Fires when the connection breaks.
    broken: CancellationToken,
    ctx: CallContext,
}

impl Stream {
    /// Resolves when nothing more comes or goes.
    async fn over(&self, dead: &CancellationToken) -> Error {
        tokio::select! {
            biased;
            () = self.ctx.cancel.cancelled() => Error::new(Code::Cancelled, "the call was cancelled"),
            () = self.broken.cancelled() => broken(),
            () = dead.cancelled() => broken(),
        }
    }

    /// Carries tiles there, in order, until their sender or the call ends.
    async fn carry(
        self,
        mut tiles: mpsc::Receiver<TileMessage>,
        into: mpsc::Sender<TileMessage>,
        life: Life,
    ) {
        let all = async {
            while let Some(tile) = tiles.recv().await {
                let flip = self.network.pass(self.from, self.to).await?;
                let tile = self.arrived(tile, flip);
                if into.send(tile).await.is_err() {
                    return Ok(());
                }
            }
            // The end of the stream is a message too.
            self.network.pass(self.from, self.to).await.map(|_| ())
        };
        let ended = tokio::select! {
            biased;
            _ = self.over(&life.dead) => Ok(()),
            ended = all => ended,
        };
        if ended.is_err() {
            self.broken.cancel();
        }
    }

    /// A tile as it comes out of the network. One that its reader would take for sound has the right bytes.
    fn arrived(&self, mut tile: TileMessage, flip: Option<u64>) -> TileMessage {
        if let Some(flip) = flip {
            let mut bytes = tile.data.to_vec();
            let at = (flip >> 3) as usize % bytes.len();
            bytes[at] ^= 1 << (flip & 7);
            if self.sabotage == Sabotage::Checksums {
                tile.crc32c = crc32c(&bytes);
            }
            tile.data = bytes.into();
        }
        if tile.data.matches(tile.crc32c) && !truth::is_right(&tile) {
            self.network.violated(format!("wrong byte: block {} layer {} on the wire", tile.key, tile.layer));
        }
        tile
    }

    /// Carries answers back, in order.
    fn answers<T: Send + 'static>(
        self,
        inner: BoxStream<T>,
        life: Life,
        arrived: impl Fn(&Self, T, Option<u64>) -> T + Send + Sync + 'static,
    ) -> BoxStream<T> {
        let ends_the_call = self.ctx.cancel.clone().drop_guard();
        let state = (Some(inner), self, arrived, life, ends_the_call);
        Box::pin(stream::unfold(state, |(inner, this, arrived, life, guard)| async move {
            let mut inner = inner?;
            let item = tokio::select! {
                biased;
                error = this.over(&life.dead) => return Some((Err(error), (None, this, arrived, life, guard))),
                item = inner.next() => item,
            };
            let back = Origin { node: this.to, life: life.number };
            let passed = tokio::select! {
                biased;
                error = this.over(&life.dead) => Err(error),
                passed = this.network.pass(back, this.from.node) => passed,
            };
            match (item, passed) {
                (_, Err(error)) => {
                    this.broken.cancel();
                    Some((Err(error), (None, this, arrived, life, guard)))
                }
                (Some(Ok(item)), Ok(flip)) => {
                    let item = arrived(&this, item, flip);
                    Some((Ok(item), (Some(inner), this, arrived, life, guard)))
                }
                (Some(Err(error)), Ok(_)) => Some((Err(error), (None, this, arrived, life, guard))),
                (None, Ok(_)) => None,
            }
        }))
    }
}

#[async_trait]
impl Shard for SimShard {
    async fn lookup(&self, ctx: &CallContext, mut lookup: Lookup) -> Result<Vec<bool>, Error> {
        let epoch = lookup.identity.shard_map_epoch;
        let fence = if lookup.peek { Fence::Peek(epoch) } else { Fence::Epoch(epoch) };
        lookup.identity = self.told(lookup.identity);
        let call = move |store: Arc<KvStore>, ctx| async move { store.lookup(&ctx, lookup).await };
        self.ask(ctx, fence, call).await.map(|(held, _)| held)
    }

    async fn put_blocks(
        &self,
        ctx: &CallContext,
        identity: Identity,
        shape: WireTileShape,
        tiles: mpsc::Receiver<TileMessage>,
    ) -> Result<BoxStream<PutAck>, Error> {
        let stream = self.stream(ctx);
        let (into, arriving) = mpsc::channel(1);
        let (epoch, own, told) = (identity.shard_map_epoch, stream.ctx.clone(), self.told(identity));
        let call =
            |store: Arc<KvStore>, _| async move { store.put_blocks(&own, told, shape, arriving).await };
        let (acks, life) = self.ask(ctx, Fence::Epoch(epoch), call).await?;
        self.network.tasks.spawn(stream.clone().carry(tiles, into, life.clone()));
        Ok(stream.answers(acks, life, |_, ack, _| ack))
    }

    async fn get_blocks(
        &self,
        ctx: &CallContext,
        mut get: GetBlocks,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        let stream = self.stream(ctx);
        let (epoch, own) = (get.identity.shard_map_epoch, stream.ctx.clone());
        get.identity = self.told(get.identity);
        let call = |store: Arc<KvStore>, _| async move { store.get_blocks(&own, get).await };
        let (tiles, life) = self.ask(ctx, Fence::Epoch(epoch), call).await?;
        let arrived =
            |this: &Stream, tile: Option<TileMessage>, flip| tile.map(|tile| this.arrived(tile, flip));
        Ok(stream.answers(tiles, life, arrived))
    }

    async fn open_view(&self, ctx: &CallContext, mut open: OpenView) -> Result<OpenedView, Error> {
        let epoch = open.identity.shard_map_epoch;
        open.identity = self.told(open.identity);
        let call = move |store: Arc<KvStore>, ctx| async move { store.open_view(&ctx, open).await };
        self.ask(ctx, Fence::Epoch(epoch), call).await.map(|(opened, _)| opened)
    }

    async fn attend(
        &self,
        _ctx: &CallContext,
        _queries: mpsc::Receiver<AttendQuery>,
    ) -> Result<BoxStream<AttendAnswer>, Error> {
        Err(not_simulated())
    }

    async fn close_view(&self, ctx: &CallContext, view_id: u64) -> Result<(), Error> {
        let call = move |store: Arc<KvStore>, ctx| async move { store.close_view(&ctx, view_id).await };
        self.ask(ctx, Fence::None, call).await.map(|_| ())
    }

    async fn stats(&self, ctx: &CallContext) -> Result<ShardStats, Error> {
        let call = |store: Arc<KvStore>, ctx| async move { store.stats(&ctx).await };
        self.ask(ctx, Fence::None, call).await.map(|(stats, _)| stats)
    }
}
