//! One sequence: a prefix of blocks on the shards, named by views, and the blocks after it in this process.

mod answer;
mod prefill;
mod views;

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use longshore_attention::{PagedKv, Promise, Tile, TileShape};
use longshore_blocks::{BlockKey, BlockPlace, Geometry, KeyChain, crc32c};
use longshore_compute::ComputePool;
use longshore_proto::types::{Identity, TileMessage};

use crate::{Engine, Error, ShardLinks};

use answer::Answer;
pub use answer::AnswerVisits;
pub(crate) use prefill::SparsePrefill;
pub(crate) use views::{View, ViewPart};

/// Lease of views until a caller names another one.
const LEASE_MS: u32 = 60_000;

/// One block in this process: a tile per layer, shared with senders once it is full.
#[derive(Debug, Clone)]
pub struct LocalBlock {
    tiles: Vec<Arc<Tile>>,
}

impl LocalBlock {
    /// An empty block of `layers` zeroed tiles.
    pub fn zeroed(shape: TileShape, layers: usize) -> Self {
        Self { tiles: (0..layers).map(|_| Arc::new(Tile::zeroed(shape))).collect() }
    }

    /// A full block that came from elsewhere, one tile per layer.
    pub fn from_tiles(tiles: impl IntoIterator<Item = impl Into<Arc<Tile>>>) -> Self {
        Self { tiles: tiles.into_iter().map(Into::into).collect() }
    }

    /// The tile of one layer.
    pub fn tile(&self, layer: usize) -> &Tile {
        &self.tiles[layer]
    }
}

/// Lets the bytes of a tile travel without a copy.
struct TileBody(Arc<Tile>);

impl AsRef<[u8]> for TileBody {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

/// The KV of one sequence. Blocks `[0, remote_blocks)` lie on their shards, later ones here; within every stripe the
/// remote blocks thus come first, which the canonical order of summation needs. Dropping it closes its views in the background.
#[derive(Debug)]
pub struct Sequence {
    identity: Identity,
    geometry: Geometry,
    shape: TileShape,
    layers: usize,
    chain: KeyChain,
    done: u64,
    under_way: u64,
    remote_blocks: u64,
    views: Vec<View>,
    lease_ms: u32,
    /// See [`crate::EngineOptions::patience`].
    patience: Duration,
    local: VecDeque<LocalBlock>,
    links: Arc<ShardLinks>,
    broken: Option<&'static str>,
    prefill: Option<SparsePrefill>,
    answer: Option<Answer>,
}

impl Sequence {
    /// An empty sequence whose blocks will lie on the shards of `links`.
    pub fn new(engine: &Engine, identity: Identity, links: Arc<ShardLinks>) -> Self {
        Self {
            identity,
            geometry: engine.geometry(),
            shape: engine.tile_shape(),
            layers: engine.backend().config().layers,
            chain: KeyChain::new(identity.namespace, engine.geometry()),
            done: 0,
            under_way: 0,
            remote_blocks: 0,
            views: Vec::new(),
            lease_ms: LEASE_MS,
            patience: engine.options().patience,
            local: VecDeque::new(),
            links,
            broken: None,
            prefill: None,
            answer: None,
        }
    }

    /// What the KV depends on.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The shards that hold its blocks.
    pub fn links(&self) -> &Arc<ShardLinks> {
        &self.links
    }

    /// Tokens whose K and V exist in every layer; the position of the next one.
    pub fn position(&self) -> u64 {
        self.done
    }

    /// Block and stripe sizes.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Why it can only be closed, if so.
    pub fn broken(&self) -> Option<&'static str> {
        self.broken
    }

    /// Leading blocks that lie on shards.
    pub fn remote_blocks(&self) -> u64 {
        self.remote_blocks
    }

    /// Full blocks, remote and local.
    pub fn full_blocks(&self) -> u64 {
        self.geometry.full_blocks(self.done)
    }

    /// Bytes of the tiles in this process.
    pub fn local_bytes(&self) -> u64 {
        self.local.len() as u64 * self.block_bytes()
    }

    /// Bytes of one block over all layers.
    pub fn block_bytes(&self) -> u64 {
        (self.shape.bytes() * self.layers) as u64
    }

    /// Key of a full block; the keys of blocks that a step fills exist while the step runs.
    pub fn key(&self, block: u64) -> Option<BlockKey> {
        self.chain.keys().get(block as usize).copied()
    }

    /// Indices of the shards that `block` goes to, see [`ShardLinks::candidates`].
    pub fn candidates(&self, block: u64) -> Result<Vec<usize>, Error> {
        self.links.candidates(&self.chain.stripe_seed(block))
    }

    /// Index of the shard that comes first for `block`, whose stripe's predecessors are full.
    pub fn owner(&self, block: u64) -> Result<usize, Error> {
        self.links.owner(&self.chain.stripe_seed(block))
    }

    /// Blocks that the step under way fills: full after it, not before.
    pub fn filling(&self) -> Range<u64> {
        self.geometry.full_blocks(self.done)..self.geometry.full_blocks(self.done + self.under_way)
    }

    /// The tile of a full local block in one layer, as it travels; `None` when it is not here or not full.
    pub fn tile_message(&self, block: u64, layer: usize) -> Option<TileMessage> {
        let key = self.key(block)?;
        let index = usize::try_from(block.checked_sub(self.remote_blocks)?).ok()?;
        let tile = self.local.get(index)?.tiles.get(layer)?;
        let data = Bytes::from_owner(TileBody(Arc::clone(tile)));
        let crc32c = crc32c(&data);
        let place = BlockPlace { stripe_seed: self.chain.stripe_seed(block), index: block };
        Some(TileMessage { key, layer: layer as u32, data: data.into(), crc32c, place: Some(place) })
    }

    /// All tiles of a full local block; `None` when it is not here or not full.
    pub fn block_messages(&self, block: u64) -> Option<Vec<TileMessage>> {
        (0..self.layers).map(|layer| self.tile_message(block, layer)).collect()
    }

    /// The local blocks as a KV source; tile `i` is block `remote_blocks + i`.
    pub(crate) fn layer(&self, layer: usize) -> LayerTiles<'_> {
        LayerTiles { shape: self.shape, blocks: &self.local, layer }
    }

    /// Blocks that have keys at positions before `end`.
    pub(crate) fn blocks_before(&self, end: u64) -> u64 {
        end.div_ceil(u64::from(self.geometry.block_tokens()))
    }

    /// What lies on shards, and where.
    pub(crate) fn views(&self) -> &[View] {
        &self.views
    }

    /// Makes room for `tokens` and hashes them. Until [`Self::commit`] a failure leaves the sequence broken.
    pub(crate) fn begin(&mut self, tokens: &[u32]) -> Result<(), Error> {
        if let Some(cause) = self.broken {
            return Err(Error::Broken(cause));
        }
        self.check_prefill()?;
        self.broken = Some("a step over it failed");
        self.under_way = tokens.len() as u64;
        self.chain.push(tokens);
        let blocks = self.blocks_before(self.done + self.under_way);
        while self.remote_blocks + (self.local.len() as u64) < blocks {
            self.local.push_back(LocalBlock::zeroed(self.shape, self.layers));
        }
        Ok(())
    }

    /// The local blocks that the step under way writes to.
    fn open_blocks(&self) -> Range<usize> {
        let first = self.done / u64::from(self.geometry.block_tokens());
        let end = self.blocks_before(self.done + self.under_way);
        (first - self.remote_blocks) as usize..(end - self.remote_blocks) as usize
    }

    /// The tiles of one layer that the step under way writes to, as they are, and the token of the first of them that its first row becomes.
    pub(crate) fn open_tiles(&self, layer: usize) -> (usize, Vec<&Tile>) {
        let offset = self.done % u64::from(self.geometry.block_tokens());
        (offset as usize, self.local.range(self.open_blocks()).map(|block| block.tile(layer)).collect())
    }

    /// Writes K and V of the step's rows in one layer, f32 `[rows, kv_heads, head_dim]` each; blocks in parallel. The tiles get the promised
    /// versions, where there are any: one for each.
    pub(crate) fn write(
        &mut self,
        pool: &ComputePool,
        layer: usize,
        (keys, values): (&[f32], &[f32]),
        promised: Vec<Promise>,
    ) -> Result<(), Error> {
        let width = self.shape.kv_heads * self.shape.head_dim;
        let (block_tokens, done, end) =
            (self.shape.block_tokens as u64, self.done, self.done + self.under_way);
        let (first, blocks) = (done / block_tokens, self.open_blocks());
        let failure = Mutex::new(None);
        let promised = promised.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
        let mut blocks: Vec<(&mut LocalBlock, Option<Promise>)> =
            self.local.range_mut(blocks).zip(promised).collect();
        pool.run_chunks(&mut blocks, 1, |index, block| {
            let (block, promise) = &mut block[0];
            let start = (first + index as u64) * block_tokens;
            let (from, to) = (start.max(done), (start + block_tokens).min(end));
            let elements = (from - done) as usize * width..(to - done) as usize * width;
            let (offset, keys, values) =
                ((from - start) as usize, &keys[elements.clone()], &values[elements]);
            let tile = Arc::make_mut(&mut block.tiles[layer]);
            let written = match promise.take() {
                Some(promise) => tile.write_promised(promise, offset, keys, values),
                None => tile.write(offset, keys, values),
            };
            if let Err(error) = written {
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        });
        let failure = failure.into_inner().unwrap_or_else(PoisonError::into_inner);
        failure.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Ends a step whose every layer was written.
    pub(crate) fn commit(&mut self) {
        self.count_answer();
        self.done += self.under_way;
        self.under_way = 0;
        self.broken = None;
    }

    fn break_off(&mut self, cause: &'static str) {
        self.broken = Some(cause);
    }
}

/// The local tiles of one sequence in one layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerTiles<'a> {
    shape: TileShape,
    blocks: &'a VecDeque<LocalBlock>,
    layer: usize,
}

impl PagedKv for LayerTiles<'_> {
    fn shape(&self) -> TileShape {
        self.shape
    }

    fn len(&self) -> usize {
        self.blocks.len()
    }

    fn tile(&self, index: usize) -> &Tile {
        self.blocks[index].tile(self.layer)
    }
}
