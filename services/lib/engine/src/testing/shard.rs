//! A shard in memory, the shortest that keeps the contract, with faults to order.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use async_trait::async_trait;
use futures::StreamExt;
use longshore_attention::{
    AttendItem, CpuExecutor, ExactBlock, Executor, HeadShape, PagedKv, Queries, Tile, TileShape, WorkList,
};
use longshore_blocks::{BlockKey, Geometry, Namespace, crc32c};
use longshore_fabric::{BoxStream, CallContext, Code, Error, Shard};
use longshore_proto::types::{
    AttendAnswer, AttendPartial, AttendQuery, Dtype, GetBlocks, GetSummaries, Identity, Lookup, OpenView,
    OpenedView, PutAck, PutOutcome, ShardStats, SummariesMessage, Tensor, TileMessage, WireTileShape,
};
use tokio::sync::mpsc;

use super::{
    faults::{Faults, break_off, strikes},
    sparse,
};

/// Tiles as they travel, by block and layer.
pub type Bodies = BTreeMap<(BlockKey, usize), Vec<u8>>;

type Key = (Namespace, BlockKey);
/// Blocks with their tiles in one layer, by stripe.
pub(super) type Stripes = BTreeMap<u64, Vec<(u64, Arc<Tile>)>>;

#[derive(Debug)]
struct View {
    namespace: Namespace,
    blocks: BTreeMap<u64, BlockKey>,
}

#[derive(Debug, Default)]
struct State {
    blocks: HashMap<Key, Vec<Arc<Tile>>>,
    views: HashMap<u64, View>,
    opened: u64,
    asked_to_open: u64,
    tiles_received: u64,
    tiles_sent: u64,
    damaged: HashSet<BlockKey>,
    stats: ShardStats,
}

/// A shard in memory; clones are the same shard.
#[derive(Debug, Clone)]
pub struct MemoryShard {
    heads: HeadShape,
    geometry: Geometry,
    shape: TileShape,
    layers: usize,
    /// What goes wrong.
    pub faults: Arc<Faults>,
    state: Arc<Mutex<State>>,
}

impl MemoryShard {
    /// An empty shard.
    pub fn new(heads: HeadShape, geometry: Geometry, shape: TileShape, layers: usize) -> Self {
        Self { heads, geometry, shape, layers, faults: Arc::default(), state: Arc::default() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no test panics while it holds a shard")
    }

    /// Bodies of all tiles, by block key and layer.
    pub fn bodies(&self) -> Bodies {
        let state = self.state();
        let tiles = state.blocks.iter().flat_map(|((_, key), tiles)| {
            tiles.iter().enumerate().map(|(layer, tile)| ((*key, layer), tile.as_bytes().to_vec()))
        });
        tiles.collect()
    }

    /// Open views.
    pub fn views(&self) -> usize {
        self.state().views.len()
    }

    /// Views that were opened so far.
    pub fn opened(&self) -> u64 {
        self.state().opened
    }

    /// Views that were asked for or appended to so far, whatever became of them.
    pub fn asked_to_open(&self) -> u64 {
        self.state().asked_to_open
    }

    /// Forgets every block and view.
    pub fn forget(&self) {
        let mut state = self.state();
        *state = State { opened: state.opened, ..State::default() };
    }

    /// Tiles that arrived so far, whatever became of them.
    pub fn tiles_received(&self) -> u64 {
        self.state().tiles_received
    }

    /// Tiles that went out so far.
    pub fn tiles_sent(&self) -> u64 {
        self.state().tiles_sent
    }

    /// Attention queries answered so far.
    pub fn attends(&self) -> u64 {
        self.state().stats.attend_total
    }

    fn put(
        &self,
        identity: &Identity,
        open: &mut HashMap<BlockKey, Vec<Option<Tile>>>,
        tile: &TileMessage,
    ) -> Option<PutOutcome> {
        let mut state = self.state();
        state.tiles_received += 1;
        if state.blocks.contains_key(&(identity.namespace, tile.key)) {
            // Another stream may have stored it since the first of its tiles came.
            open.remove(&tile.key);
            return Some(PutOutcome::Duplicate);
        }
        if crc32c(&tile.data) != tile.crc32c {
            return Some(PutOutcome::Corrupt);
        }
        let Ok(body) = Tile::from_bytes(self.shape, &tile.data) else { return Some(PutOutcome::Corrupt) };
        let tiles = open.entry(tile.key).or_insert_with(|| (0..self.layers).map(|_| None).collect());
        tiles[tile.layer as usize] = Some(body);
        if tiles.iter().any(Option::is_none) {
            return None;
        }
        let tiles = open.remove(&tile.key)?;
        let damaged = self.faults.corrupt_all_puts.load(Ordering::SeqCst)
            || (!state.damaged.contains(&tile.key) && strikes(&self.faults.corrupt_puts));
        if damaged {
            state.damaged.insert(tile.key);
            return Some(PutOutcome::Corrupt);
        }
        if strikes(&self.faults.refused_puts) {
            return Some(PutOutcome::NoSpace);
        }
        state
            .blocks
            .insert((identity.namespace, tile.key), tiles.into_iter().flatten().map(Arc::new).collect());
        state.stats.stored_total += 1;
        Some(PutOutcome::Stored)
    }

    fn answer(&self, query: &AttendQuery) -> Result<Vec<AttendPartial>, Error> {
        self.faults.check_here()?;
        if strikes(&self.faults.corrupt_attends) {
            return Err(Error::new(Code::DataLoss, "a tile did not match its checksum"));
        }
        if strikes(&self.faults.failed_attends) {
            return Err(Error::new(Code::Unavailable, "the shard is ill"));
        }
        let mut partials = Vec::new();
        for (index, item) in query.items.iter().enumerate() {
            let stripes = self.view_stripes(item.view_id, query.identity.namespace, query.layer)?;
            if let Some(visits) = &item.sparse {
                partials.extend(sparse::attend(self.heads, self.shape, index, &stripes, item, visits));
                continue;
            }
            for (stripe, tiles) in stripes {
                partials.push(self.attend_stripe(index, stripe, &tiles, item)?);
            }
        }
        if strikes(&self.faults.short_attends) {
            partials.pop();
        }
        self.state().stats.attend_total += 1;
        Ok(partials)
    }

    fn view_stripes(&self, view_id: u64, namespace: Namespace, layer: u32) -> Result<Stripes, Error> {
        let state = self.state();
        let missing = || Error::new(Code::NotFound, format!("view `{view_id}` is not open"));
        let view = state.views.get(&view_id).filter(|view| view.namespace == namespace);
        let mut stripes: Stripes = BTreeMap::new();
        for (&block, key) in &view.ok_or_else(missing)?.blocks {
            let tiles = state.blocks.get(&(namespace, *key)).ok_or_else(missing)?;
            let tile = Arc::clone(&tiles[layer as usize]);
            stripes.entry(self.geometry.stripe_of(block)).or_default().push((block, tile));
        }
        Ok(stripes)
    }

    fn attend_stripe(
        &self,
        index: usize,
        stripe: u64,
        tiles: &[(u64, Arc<Tile>)],
        item: &longshore_proto::types::AttendItem,
    ) -> Result<AttendPartial, Error> {
        let block_tokens = self.geometry.block_tokens();
        let exact = tiles.iter().enumerate().map(|(tile, (block, _))| ExactBlock {
            tile: tile as u32,
            first_position: block * u64::from(block_tokens),
            len: block_tokens,
        });
        let work = WorkList { exact: exact.collect(), ..WorkList::default() };
        let data: Vec<f32> =
            item.queries.data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let queries = Queries {
            shape: self.heads,
            first_position: item.first_position,
            scale: item.scale,
            data: &data,
        };
        let kv = StripeTiles { shape: self.shape, tiles };
        let computed =
            CpuExecutor::serial().attend(&[AttendItem { queries, kv: &kv, work: &work, initial: None }]);
        let partial = computed.map_err(|error| Error::new(Code::Internal, error.to_string()))?.remove(0);
        let (rows, heads, head_dim) = partial.shape();
        let data = partial.to_interleaved().iter().flat_map(|element| element.to_le_bytes()).collect();
        let shape = vec![rows as u64, heads as u64, 2 + head_dim as u64];
        Ok(AttendPartial { item: index as u32, stripe, partial: Tensor { dtype: Dtype::F32, shape, data } })
    }
}

pub(super) struct StripeTiles<'a> {
    pub(super) shape: TileShape,
    pub(super) tiles: &'a [(u64, Arc<Tile>)],
}

impl PagedKv for StripeTiles<'_> {
    fn shape(&self) -> TileShape {
        self.shape
    }

    fn len(&self) -> usize {
        self.tiles.len()
    }

    fn tile(&self, index: usize) -> &Tile {
        &self.tiles[index].1
    }
}

#[async_trait]
impl Shard for MemoryShard {
    async fn lookup(&self, _ctx: &CallContext, lookup: Lookup) -> Result<Vec<bool>, Error> {
        self.faults.check_awake().await?;
        let state = self.state();
        let held = |key: &BlockKey| state.blocks.contains_key(&(lookup.identity.namespace, *key));
        Ok(lookup.keys.iter().map(held).collect())
    }

    async fn put_blocks(
        &self,
        _ctx: &CallContext,
        identity: Identity,
        _shape: WireTileShape,
        tiles: mpsc::Receiver<TileMessage>,
    ) -> Result<BoxStream<PutAck>, Error> {
        self.faults.check_awake().await?;
        if strikes(&self.faults.failed_puts) {
            return Err(Error::new(Code::Unavailable, "the shard is ill"));
        }
        let (shard, open, told) = (self.clone(), HashMap::new(), HashSet::new());
        let acks = futures::stream::unfold(
            (shard, tiles, open, told),
            move |(shard, mut tiles, mut open, mut told)| async move {
                loop {
                    let tile = tiles.recv().await?;
                    if shard.faults.check_here().is_err() {
                        return None;
                    }
                    let Some(outcome) = shard.put(&identity, &mut open, &tile) else { continue };
                    if outcome == PutOutcome::Duplicate && !told.insert(tile.key) {
                        continue;
                    }
                    let delay = shard.faults.ack_delay_ms.load(Ordering::SeqCst);
                    tokio::time::sleep(Duration::from_millis(delay)).await;
                    let ack = PutAck { key: tile.key, outcome, message: String::new() };
                    return Some((Ok(ack), (shard, tiles, open, told)));
                }
            },
        );
        Ok(acks.boxed())
    }

    async fn get_blocks(
        &self,
        _ctx: &CallContext,
        get: GetBlocks,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        self.faults.check_awake().await?;
        let mut state = self.state();
        let mut answers = Vec::new();
        for key in get.keys {
            let Some(tiles) = state.blocks.get(&(get.identity.namespace, key)) else {
                answers.push(Ok(None));
                continue;
            };
            for (layer, tile) in tiles.iter().enumerate() {
                let data = bytes::Bytes::copy_from_slice(tile.as_bytes());
                let crc32c = crc32c(&data);
                answers.push(Ok(Some(TileMessage {
                    key,
                    layer: layer as u32,
                    data: data.into(),
                    crc32c,
                    place: None,
                })));
            }
        }
        if strikes(&self.faults.broken_gets) {
            break_off(&mut answers);
        }
        let stalls = strikes(&self.faults.stalled_gets);
        if stalls {
            answers.truncate(answers.len() / 2);
        }
        state.tiles_sent += answers.iter().filter(|answer| matches!(answer, Ok(Some(_)))).count() as u64;
        let answers = futures::stream::iter(answers);
        Ok(if stalls { answers.chain(futures::stream::pending()).boxed() } else { answers.boxed() })
    }

    async fn open_view(&self, _ctx: &CallContext, open: OpenView) -> Result<OpenedView, Error> {
        let delay = match open.append_to {
            None => &self.faults.open_delay_ms,
            Some(_) => &self.faults.append_delay_ms,
        };
        tokio::time::sleep(Duration::from_millis(delay.load(Ordering::SeqCst))).await;
        self.faults.check_awake().await?;
        if open.append_to.is_some() && strikes(&self.faults.failed_appends) {
            return Err(Error::new(Code::Unavailable, "the shard is ill"));
        }
        let mut state = self.state();
        state.asked_to_open += 1;
        if self.faults.alien_missing.load(Ordering::SeqCst) {
            return Ok(OpenedView::Missing(vec![BlockKey([0xee; 16])]));
        }
        let namespace = open.identity.namespace;
        let missing: Vec<BlockKey> = open
            .blocks
            .iter()
            .map(|(_, key)| *key)
            .filter(|key| !state.blocks.contains_key(&(namespace, *key)))
            .collect();
        if !missing.is_empty() {
            return Ok(OpenedView::Missing(missing));
        }
        let view_id = match open.append_to {
            Some(view_id) => view_id,
            None => {
                state.opened += 1;
                state.opened
            }
        };
        let view = match open.append_to {
            Some(view_id) => state.views.get_mut(&view_id),
            None => Some(state.views.entry(view_id).or_insert(View { namespace, blocks: BTreeMap::new() })),
        };
        let view = view.ok_or_else(|| Error::new(Code::NotFound, format!("view `{view_id}` is not open")))?;
        view.blocks.extend(open.blocks);
        Ok(OpenedView::Open { view_id })
    }

    async fn get_summaries(
        &self,
        _ctx: &CallContext,
        get: GetSummaries,
    ) -> Result<BoxStream<SummariesMessage>, Error> {
        self.faults.check_awake().await?;
        let mut messages = Vec::new();
        for layer in get.first_layer..self.layers as u32 {
            let stripes = self.view_stripes(get.view_id, get.identity.namespace, layer)?;
            messages.extend(sparse::summaries(&get, layer, &stripes).into_iter().map(Ok));
        }
        if strikes(&self.faults.misplaced_summaries) {
            messages.reverse();
        }
        if strikes(&self.faults.infinite_summaries)
            && let Some(Ok(message)) = messages.last_mut()
        {
            let ones = vec![f32::INFINITY; message.keys.data.len() / 4];
            message.keys = Tensor::from_f32(&message.keys.shape, &ones);
        }
        if strikes(&self.faults.broken_summaries) {
            break_off(&mut messages);
        }
        let together = self.faults.summaries_together.lock().expect("no test panics meanwhile").clone();
        let opens = async move {
            if let Some(together) = together {
                together.wait().await;
            }
        };
        let opened = futures::stream::once(opens).filter_map(|()| std::future::ready(None));
        Ok(opened.chain(futures::stream::iter(messages)).boxed())
    }

    async fn attend(
        &self,
        _ctx: &CallContext,
        queries: mpsc::Receiver<AttendQuery>,
    ) -> Result<BoxStream<AttendAnswer>, Error> {
        let shard = self.clone();
        let answers = futures::stream::unfold((shard, queries), |(shard, mut queries)| async move {
            let query = queries.recv().await?;
            let query_id = query.query_id;
            let delay = shard.faults.attend_delay_ms.load(Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(delay)).await;
            // What it says of being away is part of its answer.
            let _away = shard.faults.check_awake().await;
            let answer = match shard.answer(&query) {
                Ok(partials) => AttendAnswer::Partials { query_id, partials, last: true },
                Err(error) => {
                    let code = match error.code {
                        Code::NotFound => 5,
                        Code::DataLoss => 15,
                        Code::Unavailable => 14,
                        _ => 13,
                    };
                    AttendAnswer::Failed { query_id, code, message: error.message }
                }
            };
            Some((Ok(answer), (shard, queries)))
        });
        Ok(answers.boxed())
    }

    async fn close_view(&self, _ctx: &CallContext, view_id: u64) -> Result<(), Error> {
        self.state().views.remove(&view_id);
        Ok(())
    }

    async fn stats(&self, _ctx: &CallContext) -> Result<ShardStats, Error> {
        let state = self.state();
        Ok(ShardStats {
            blocks: state.blocks.len() as u64,
            views: state.views.len() as u64,
            ..state.stats.clone()
        })
    }
}
