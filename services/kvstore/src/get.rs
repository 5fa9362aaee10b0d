//! Get streams: tiles go out as they lie in memory or on disk, verified again. While some go out the next ones are read and verified.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use futures::{StreamExt as _, future::try_join_all, stream};
use longshore_attention::Tile;
use longshore_blocks::{
    BlockKey, Namespace, crc32c,
    pool::{Page, Payload, SealedBlock},
    tier::{Extent, Tier},
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

/// Bytes of blocks that one stream reads ahead of what goes out, beyond one block.
const AHEAD_BYTES: usize = 12 << 20;
/// Blocks that it reads at a time, at most.
const AHEAD_BLOCKS: usize = 8;
/// Bytes of one block on disk that one thread reads; larger blocks are read by several.
const PART_BYTES: usize = 2 << 20;

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
pub(crate) fn layers(first: u32, layers: Option<u32>, held: u32) -> Result<Range<u32>, Error> {
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

async fn send(store: &Arc<Store>, get: GetBlocks, layers: Range<u32>, tiles: &Tiles) -> Result<(), Error> {
    let namespace = get.identity.namespace;
    let block_bytes = store.identity().tile_shape.bytes() * layers.len();
    let ahead = (AHEAD_BYTES / block_bytes).clamp(1, AHEAD_BLOCKS);
    let reads = get.keys.into_iter().map(|key| store.read(namespace, key, layers.clone()));
    let mut blocks = stream::iter(reads).buffered(ahead);
    while let Some(block) = blocks.next().await {
        let messages = match block? {
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
    async fn read(
        self: &Arc<Self>,
        namespace: Namespace,
        key: BlockKey,
        layers: Range<u32>,
    ) -> Result<Option<Vec<TileMessage>>, Error> {
        let Some(block) = self.with_pool(|pool, now| pool.get(namespace, key, now)) else { return Ok(None) };
        if block.tier() == Tier::Disk {
            self.wish(std::iter::once(block.generation()));
        }
        if let Payload::Disk(extent) = block.payload() {
            return self.read_parts(&block, &extent, layers).await;
        }
        let reader = self.clone();
        self.off_reactor(move || reader.messages(&block, layers)).await
    }

    /// Reads a block on disk, in parts when it is large; with all other streams no more parts at a time than there are readers.
    async fn read_parts(
        self: &Arc<Self>,
        block: &Arc<SealedBlock<Arc<Tile>>>,
        extent: &Arc<Extent>,
        layers: Range<u32>,
    ) -> Result<Option<Vec<TileMessage>>, Error> {
        let Some(disk) = self.disk() else { return Err(self.panicked()) };
        let step = (PART_BYTES / self.identity().tile_shape.bytes()).max(1);
        let parts = layers.clone().step_by(step).map(|first| {
            let part = first..layers.end.min(first.saturating_add(step as u32));
            let (reader, block, extent) = (self.clone(), block.clone(), extent.clone());
            async move {
                // Never closed while the shard is there.
                let permit = disk.get_permits.clone().acquire_owned().await.map_err(|_| self.panicked())?;
                let read = move || {
                    let _one_of_few = permit;
                    reader.read_layers(&block, &extent, part)
                };
                Ok::<_, Error>(self.off_reactor(read).await?.ok())
            }
        });
        let parts: Option<Vec<_>> = try_join_all(parts).await?.into_iter().collect();
        let tiles = parts.map(|parts| layers.zip(parts.into_iter().flatten()));
        Ok(tiles.map(|tiles| tiles.map(|(layer, tile)| message(block, layer, tile)).collect()))
    }

    /// The same of all layers, off the reactor and without counting as a use.
    pub(crate) async fn read_here(
        self: &Arc<Self>,
        namespace: Namespace,
        key: BlockKey,
    ) -> Option<Vec<TileMessage>> {
        let block = self.with_pool(|pool, _| pool.peek_block(namespace, key))?;
        let (layers, reader) = (self.identity().layers, self.clone());
        self.off_reactor(move || reader.messages(&block, 0..layers)).await.ok()?
    }

    fn messages(&self, block: &SealedBlock<Arc<Tile>>, layers: Range<u32>) -> Option<Vec<TileMessage>> {
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
pub(crate) fn is_sound(pages: &[Page<Arc<Tile>>], layers: Range<u32>) -> bool {
    let pages = &pages[layers.start as usize..layers.end as usize];
    pages.iter().all(|page| crc32c(page.payload.as_bytes()) == page.crc32c)
}
