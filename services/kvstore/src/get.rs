//! Get streams: tiles go out as they lie in memory or on disk, verified again. While some go out the next ones are read and verified.

mod ahead;

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use futures::future::try_join_all;
use longshore_attention::Tile;
use longshore_blocks::{
    BlockKey, Namespace, combine_crc32c, crc32c,
    pool::{Generation, Page, Payload, Resource, SealedBlock},
    tier::{Extent, Tier},
};
use longshore_chassis::Tasks;
use longshore_fabric::{BoxStream, CallContext};
use longshore_proto::types::{GetBlocks, HeadPart, TileData, TileMessage, TileOrder};

pub(crate) use ahead::Places;

use ahead::Reads;

use crate::{
    Error, lifetime,
    lifetime::{Kind, Outlet, Place, Taken},
    store::{LOOKUP_STEP_KEYS, Store, check_count},
};

const KIND: Kind = Kind { task: "kvstore-get", stream: "get", stalling: "no tile was taken", unread: 8 };

/// Bytes of blocks that one stream reads ahead of what goes out, and one block at least; where too many do, it reads block by block.
const AHEAD_BYTES: usize = 12 << 20;
/// Blocks that it reads at a time, at most.
const AHEAD_BLOCKS: usize = 8;
/// Bytes of one block on disk that one thread reads; larger blocks are read by several.
const PART_BYTES: usize = 2 << 20;

/// What is read of each block.
#[derive(Debug, Clone)]
struct Wanted {
    layers: Range<u32>,
    /// KV heads; none: whole tiles.
    heads: Option<Range<u32>>,
}

/// Starts a get stream, of some KV heads or of whole tiles.
pub(crate) fn start(
    store: &Arc<Store>,
    tasks: &Tasks,
    ctx: &CallContext,
    get: GetBlocks,
    heads: Option<Range<u32>>,
) -> Result<BoxStream<Option<TileMessage>>, Error> {
    store.check_identity(&get.identity)?;
    check_count("keys", get.keys.len())?;
    check_heads(heads.as_ref(), store.identity().tile_shape.kv_heads)?;
    let wanted = Wanted { layers: layers(get.first_layer, get.layers, store.identity().layers)?, heads };
    let place = Place::take(store, get.identity.namespace, Resource::Readers)?;
    let (lane, lanes) = (ctx.lane, store.metrics.lanes.clone());
    lanes.get(lane);
    let answer = lifetime::run((store, tasks, ctx), KIND, move |store, tiles| async move {
        let _place = place;
        send(&store, get, wanted, &tiles).await
    });
    let counted = futures::StreamExt::inspect(answer, move |tile| {
        if let Ok(Some(tile)) = tile {
            lanes.sent(lane, tile.data.len() as u64);
        }
    });
    Ok(Box::pin(counted))
}

fn check_heads(heads: Option<&Range<u32>>, held: usize) -> Result<(), Error> {
    match heads {
        Some(heads) if heads.is_empty() || heads.end as usize > held => {
            let problem =
                format!("are {} to {} (exclusive), tiles have {held} KV heads", heads.start, heads.end);
            Err(Error::invalid("heads", problem))
        }
        _ => Ok(()),
    }
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

async fn send(
    store: &Arc<Store>,
    get: GetBlocks,
    wanted: Wanted,
    tiles: &Outlet<Option<TileMessage>>,
) -> Result<(), Error> {
    let namespace = get.identity.namespace;
    store.touch_all(namespace, &get.keys).await?;
    let layers = wanted.layers.clone();
    let rounds = match get.order {
        TileOrder::Blocks => vec![layers],
        TileOrder::Layers => layers.map(|layer| layer..layer + 1).collect(),
    };
    let place = store.disk().map(|disk| disk.ahead.take(namespace));
    let ahead_bytes = if matches!(place, Some(None)) { 0 } else { AHEAD_BYTES };
    let mut asked = get.keys.into_iter().map(|key| (key, None)).collect();
    for layers in rounds {
        let wanted = Wanted { layers, ..wanted.clone() };
        match send_round(store, namespace, asked, &wanted, ahead_bytes, tiles).await? {
            Some(found) => asked = found,
            None => break,
        }
    }
    Ok(())
}

/// A key, and the block that it must still be, where some of that was sent.
type Asked = (BlockKey, Option<Generation>);

/// Sends what is wanted of each block and tells which blocks were there; none when the caller is gone.
async fn send_round(
    store: &Arc<Store>,
    namespace: Namespace,
    asked: Vec<Asked>,
    wanted: &Wanted,
    ahead_bytes: usize,
    tiles: &Outlet<Option<TileMessage>>,
) -> Result<Option<Vec<Asked>>, Error> {
    let block_bytes = store.identity().tile_shape.bytes() * wanted.layers.len();
    let ahead = if ahead_bytes == 0 { 0 } else { (ahead_bytes / block_bytes).clamp(1, AHEAD_BLOCKS) };
    let reads = asked.into_iter().map(|(key, of)| async move {
        let read = store.read(namespace, key, of, wanted.clone()).await;
        read.map(|read| (key, read))
    });
    let (mut blocks, mut found) = (Reads::new(reads, ahead), Vec::new());
    while let Some(block) = blocks.next().await {
        let messages = match block? {
            (key, Some((generation, tiles))) => {
                found.push((key, Some(generation)));
                tiles.into_iter().map(Some).collect()
            }
            (_, None) => vec![None],
        };
        for message in messages {
            if blocks.beside(tiles.send(store, message)).await? == Taken::Gone {
                return Ok(None);
            }
        }
    }
    Ok(Some(found))
}

/// A tile, or some heads of it. None when the tile does not match its checksum, which only reads of heads look at.
fn message(
    block: &SealedBlock<Arc<Tile>>,
    layer: u32,
    tile: Arc<Tile>,
    heads: Option<&Range<u32>>,
) -> Option<TileMessage> {
    let (stored, shape) = (block.checksums()[layer as usize], tile.shape());
    let (key, whole) = (block.key(), Bytes::from_owner(Body(tile)));
    let Some(heads) = heads else {
        return Some(TileMessage { key, layer, data: whole.into(), crc32c: stored, place: None });
    };
    let part = HeadPart::of(&whole, shape.kv_heads, heads.start);
    let own = part.head_crc32cs[heads.start as usize..heads.end as usize].iter();
    let crc32c = own.fold(0, |crc, head| combine_crc32c(crc, *head, shape.head_bytes()));
    let body =
        whole.slice(heads.start as usize * shape.head_bytes()..heads.end as usize * shape.head_bytes());
    let is_sound = part.tile_crc32c == stored;
    let data = TileData::from(body).of_heads(part);
    is_sound.then_some(TileMessage { key, layer, data, crc32c, place: None })
}

/// A tile's body, lent to a message without a copy.
struct Body(Arc<Tile>);

impl AsRef<[u8]> for Body {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl Store {
    /// Counts a use of blocks that are about to be read, from the tail of a prefix to its head, a step at a time.
    async fn touch_all(self: &Arc<Self>, namespace: Namespace, keys: &[BlockKey]) -> Result<(), Error> {
        let touch = move |store: &Self, keys: &[BlockKey]| {
            let steps = keys.chunks(LOOKUP_STEP_KEYS).rev();
            steps.for_each(|step| store.with_pool(|pool, now| pool.touch_all(namespace, step, now)));
        };
        if keys.len() <= LOOKUP_STEP_KEYS {
            touch(self, keys);
            return Ok(());
        }
        let (store, keys) = (self.clone(), keys.to_vec());
        self.off_reactor(move || touch(&store, &keys)).await
    }

    /// What is wanted of a block's tiles, wherever they lie, checked. A block with a bad one is dropped and as good as missing, and so is
    /// another one than `of`, whose tiles may differ.
    async fn read(
        self: &Arc<Self>,
        namespace: Namespace,
        key: BlockKey,
        of: Option<Generation>,
        wanted: Wanted,
    ) -> Result<Option<(Generation, Vec<TileMessage>)>, Error> {
        let held = self.with_pool(|pool, _| pool.peek_block(namespace, key));
        let Some(block) = held.filter(|held| of.is_none_or(|of| of == held.generation())) else {
            return Ok(None);
        };
        let generation = block.generation();
        if block.tier() == Tier::Disk && of.is_none() {
            self.wish(std::iter::once(generation));
        }
        let tiles = if let Payload::Disk(extent) = block.payload() {
            self.read_parts(namespace, &block, &extent, wanted).await?
        } else {
            let (reader, turn) = (self.clone(), self.read_turns().turn(namespace).await);
            let read = move || {
                let _turn = turn;
                reader.messages(&block, &wanted)
            };
            self.off_reactor(read).await?
        };
        Ok(tiles.map(|tiles| (generation, tiles)))
    }

    /// Reads a block on disk, in parts when it is large; with all other streams no more parts at a time than there are readers.
    async fn read_parts(
        self: &Arc<Self>,
        namespace: Namespace,
        block: &Arc<SealedBlock<Arc<Tile>>>,
        extent: &Arc<Extent>,
        wanted: Wanted,
    ) -> Result<Option<Vec<TileMessage>>, Error> {
        let Some(disk) = self.disk() else { return Err(self.panicked()) };
        let step = (PART_BYTES / self.identity().tile_shape.bytes()).max(1);
        let Wanted { layers, heads } = wanted;
        let parts = layers.clone().step_by(step).map(|first| {
            let part = first..layers.end.min(first.saturating_add(step as u32));
            let (reader, block, extent, heads) = (self.clone(), block.clone(), extent.clone(), heads.clone());
            async move {
                let turn = disk.get_turns.turn(namespace).await;
                let read = move || -> Option<Vec<TileMessage>> {
                    let _one_of_few = turn;
                    // Whole tiles are read, since only they have a checksum that was stored.
                    let tiles = reader.read_layers(&block, &extent, part.clone()).ok()?;
                    let tiles = part.zip(tiles);
                    tiles.map(|(layer, tile)| message(&block, layer, tile, heads.as_ref())).collect()
                };
                self.off_reactor(read).await
            }
        });
        let parts: Option<Vec<Vec<TileMessage>>> = try_join_all(parts).await?.into_iter().collect();
        Ok(parts.map(|parts| parts.into_iter().flatten().collect()))
    }

    /// All layers of a block, off the reactor and without counting as a use.
    pub(crate) async fn read_here(
        self: &Arc<Self>,
        namespace: Namespace,
        key: BlockKey,
    ) -> Option<Vec<TileMessage>> {
        let block = self.with_pool(|pool, _| pool.peek_block(namespace, key))?;
        let (wanted, reader) = (Wanted { layers: 0..self.identity().layers, heads: None }, self.clone());
        self.off_reactor(move || reader.messages(&block, &wanted)).await.ok()?
    }

    fn messages(&self, block: &SealedBlock<Arc<Tile>>, wanted: &Wanted) -> Option<Vec<TileMessage>> {
        let Wanted { layers, heads } = wanted;
        let (tiles, is_checked): (Vec<_>, bool) = match block.payload() {
            Payload::Memory(pages) => {
                // The proof of a range of heads takes every byte of the tile, too.
                let is_checked = heads.is_none();
                if is_checked && !is_sound(&pages, layers.clone()) {
                    self.condemn(block);
                    return None;
                }
                (layers.clone().map(|at| pages[at as usize].payload.clone()).collect(), is_checked)
            }
            Payload::Disk(extent) => (self.read_layers(block, &extent, layers.clone()).ok()?, true),
        };
        let tiles = layers.clone().zip(tiles);
        let messages: Option<Vec<_>> =
            tiles.map(|(layer, tile)| message(block, layer, tile, heads.as_ref())).collect();
        if messages.is_none() && !is_checked {
            self.condemn(block);
        }
        messages
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
