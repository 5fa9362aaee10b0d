//! Get streams: tiles go out as they lie in memory or on disk, verified again.

use std::sync::Arc;

use bytes::Bytes;
use longshore_attention::Tile;
use longshore_blocks::{
    BlockKey, crc32c,
    pool::{Page, Payload, SealedBlock},
    tier::Tier,
};
use longshore_chassis::Tasks;
use longshore_fabric::{BoxStream, CallContext};
use longshore_proto::types::{GetBlocks, TileMessage};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    Error, lifetime,
    store::{Store, check_count},
};

/// Tiles that may be unread before the stream waits.
const TILES_UNREAD_MAX: usize = 8;

/// Starts a get stream.
pub(crate) fn start(
    store: &Arc<Store>,
    tasks: &Tasks,
    ctx: &CallContext,
    get: GetBlocks,
) -> Result<BoxStream<Option<TileMessage>>, Error> {
    store.check_identity(&get.identity)?;
    check_count("keys", get.keys.len())?;
    let layers = layers(get.first_layer, get.layers, store.identity().layers)?;
    let (lane, lanes) = (ctx.lane, store.metrics.lanes.clone());
    lanes.get(lane);
    let (tiles, answer) = mpsc::channel(TILES_UNREAD_MAX);
    let (store, ctx, scope) = (store.clone(), ctx.clone(), tasks.clone());
    tasks.spawn("kvstore-get", async move {
        let failure = tokio::select! {
            ended = send(&store, get, layers, &tiles) => ended.err(),
            reason = lifetime::ended(&store, &ctx, &scope) => Some(reason),
            () = tiles.closed() => None,
        };
        if let Some(error) = failure {
            let _caller_is_gone = tiles.try_send(Err(error.into()));
        }
    });
    let counted = futures::StreamExt::inspect(ReceiverStream::new(answer), move |tile| {
        if let Ok(Some(tile)) = tile {
            lanes.sent(lane, tile.data.len() as u64);
        }
    });
    Ok(Box::pin(counted))
}

/// First and end layer that were asked for, of those that blocks have.
pub(crate) fn layers(first: u32, layers: Option<u32>, held: u32) -> Result<std::ops::Range<u32>, Error> {
    if first >= held {
        return Err(Error::invalid("first_layer", format!("is {first}, blocks have {held} layers")));
    }
    let left = held - first;
    match layers {
        Some(count) if count == 0 || count > left => {
            let problem = format!("is {count}, must be from 1 to {left} from layer {first} on");
            Err(Error::invalid("layers", problem))
        }
        count => Ok(first..first + count.unwrap_or(left)),
    }
}

type Tiles = mpsc::Sender<Result<Option<TileMessage>, longshore_fabric::Error>>;

async fn send(
    store: &Arc<Store>,
    get: GetBlocks,
    layers: std::ops::Range<u32>,
    tiles: &Tiles,
) -> Result<(), Error> {
    for key in get.keys {
        let (reader, range) = (store.clone(), layers.clone());
        let block = store.off_reactor(move || reader.read(get.identity.namespace, key, range)).await?;
        let messages = match block {
            Some(tiles) => tiles.into_iter().map(Some).collect(),
            None => vec![None],
        };
        for message in messages {
            if tiles.send(Ok(message)).await.is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

fn message(block: &SealedBlock<Arc<Tile>>, layer: u32, tile: Arc<Tile>) -> TileMessage {
    let crc32c = block.checksums()[layer as usize];
    TileMessage { key: block.key(), layer, data: Bytes::from_owner(Body(tile)).into(), crc32c, place: None }
}

/// A tile's body, lent to a message without a copy.
struct Body(Arc<Tile>);

impl AsRef<[u8]> for Body {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl Store {
    /// The tiles of a block in `layers`, wherever they lie, checked. A block with a bad one is dropped and as good as missing.
    fn read(
        &self,
        namespace: longshore_blocks::Namespace,
        key: BlockKey,
        layers: std::ops::Range<u32>,
    ) -> Option<Vec<TileMessage>> {
        let block = self.with_pool(|pool, now| pool.get(namespace, key, now))?;
        if block.tier() == Tier::Disk {
            self.wish(std::iter::once(block.generation()));
        }
        self.messages(&block, layers)
    }

    /// The same of all layers, off the reactor and without counting as a use.
    pub(crate) async fn read_here(
        self: &Arc<Self>,
        namespace: longshore_blocks::Namespace,
        key: BlockKey,
    ) -> Option<Vec<TileMessage>> {
        let block = self.with_pool(|pool, _| pool.peek_block(namespace, key))?;
        let (layers, reader) = (self.identity().layers, self.clone());
        self.off_reactor(move || reader.messages(&block, 0..layers)).await.ok()?
    }

    fn messages(
        &self,
        block: &SealedBlock<Arc<Tile>>,
        layers: std::ops::Range<u32>,
    ) -> Option<Vec<TileMessage>> {
        let tiles: Vec<_> = match block.payload() {
            Payload::Memory(pages) if !is_sound(&pages, layers.clone()) => {
                self.condemn(block);
                return None;
            }
            Payload::Memory(pages) => layers.clone().map(|at| pages[at as usize].payload.clone()).collect(),
            Payload::Disk(extent) => self.read_layers(block, &extent, layers.clone()).ok()?,
        };
        Some(layers.zip(tiles).map(|(layer, tile)| message(block, layer, tile)).collect())
    }

    /// Drops a block whose bytes changed since they were stored.
    pub(crate) fn condemn(&self, block: &SealedBlock<Arc<Tile>>) {
        tracing::warn!(shard = %self.identity().shard_id, block = %block.key(), "a stored tile does not match its checksum: dropping its block");
        self.with_pool(|pool, _| pool.condemn(block.generation()));
    }
}

/// Whether the tiles of these layers match their checksums.
pub(crate) fn is_sound(pages: &[Page<Arc<Tile>>], layers: std::ops::Range<u32>) -> bool {
    let pages = &pages[layers.start as usize..layers.end as usize];
    pages.iter().all(|page| crc32c(page.payload.as_bytes()) == page.crc32c)
}
