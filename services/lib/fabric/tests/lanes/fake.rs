//! A shard and a router that are just large enough to talk to.

use std::{
    collections::HashMap,
    ops::Deref,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures::StreamExt;
use longshore_blocks::{BlockKey, Deployment, Namespace, crc32c};
use longshore_fabric::{BoxStream, CallContext, Code, Describer, Error, Inference, Shard};
use longshore_proto::types::*;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;

/// Layers of a block.
pub(crate) const LAYERS: u32 = 2;
/// A lookup that asks for this key never ends.
pub(crate) const STUCK: BlockKey = BlockKey([0xff; 16]);
/// A lookup that asks for this key fails with every detail.
pub(crate) const FAULTY: BlockKey = BlockKey([0xfe; 16]);
/// A lookup that asks for this key panics.
pub(crate) const PANICS: BlockKey = BlockKey([0xfd; 16]);
/// The shard ends a store stream that brings this key, and a read stream that asks for it after many tiles, as [`ended`] says.
pub(crate) const ENDED: BlockKey = BlockKey([0xfc; 16]);
/// A query over this view is answered with a wrong shape.
pub(crate) const MISSHAPEN_VIEW: u64 = 666;
/// A query over this view is answered in [`PIECES`] messages, with a stripe each.
pub(crate) const PIECES_VIEW: u64 = 777;
pub(crate) const PIECES: u64 = 6;
/// Tokens of a prompt that the router accepts.
pub(crate) const PROMPT_TOKENS_MAX: usize = 200_000;

/// KV heads of tiles that are read by heads.
pub(crate) const HEADS: u32 = 4;

pub(crate) fn identity() -> Identity {
    let deployment = Deployment::from_bytes([1; 32]);
    Identity { deployment, namespace: Namespace::from_bytes([2; 32]), shard_map_epoch: 3 }
}

pub(crate) fn shape() -> WireTileShape {
    WireTileShape { block_tokens: 16, kv_heads: 1, head_dim: 4, dtype: Dtype::F32, layout: 1, layers: LAYERS }
}

pub(crate) fn tile(key: BlockKey, layer: u32, bytes: usize) -> TileMessage {
    let data = bytes::Bytes::from(vec![key.0[0] ^ layer as u8; bytes]);
    TileMessage { key, layer, crc32c: crc32c(&data), data: data.into(), place: None }
}

pub(crate) fn lookup(keys: &[BlockKey]) -> Lookup {
    Lookup { identity: identity(), keys: keys.to_vec(), peek: false }
}

pub(crate) fn queries(view_id: u64, rows: u64) -> AttendItem {
    let values: Vec<f32> = (0..rows * 2 * 4).map(|value| value as f32).collect();
    let queries = Tensor::from_f32(&[rows, 2, 4], &values);
    AttendItem { view_id, first_position: 64, queries, scale: 0.5, sparse: None }
}

/// Why the shard ends what has to do with [`ENDED`].
pub(crate) fn ended() -> Error {
    let error = Error::new(Code::Unavailable, "the shard ends this stream; hint: open it again");
    error.with_field("keys").with_retry_after(Duration::from_millis(250))
}

/// A fake that test and lane share.
#[derive(Debug)]
pub(crate) struct Served<T>(pub(crate) Arc<T>);

impl<T> Deref for Served<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

#[derive(Debug, Default)]
pub(crate) struct FakeShard {
    pub(crate) blocks: Mutex<HashMap<BlockKey, Vec<TileMessage>>>,
    pub(crate) views: Mutex<HashMap<u64, Vec<(u64, BlockKey)>>>,
    pub(crate) next_view: AtomicU64,
    /// The context of the last lookup, store or read stream.
    pub(crate) seen: Mutex<Option<CallContext>>,
    /// Store streams are refused for this reason.
    pub(crate) refusal: Mutex<Option<Error>>,
    /// Store streams of other namespaces than [`identity`]'s, whose tiles are kept and not taken while there is a list of them.
    pub(crate) kept: Mutex<Option<Vec<Kept>>>,
    /// A stuck call noticed that its caller went away.
    pub(crate) gone: Notify,
    tasks: tokio_util::task::TaskTracker,
}

/// A store stream whose tiles nobody takes; it ends with this.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) tiles: mpsc::Receiver<TileMessage>,
    _until: oneshot::Sender<()>,
}

impl FakeShard {
    fn holds(&self, key: &BlockKey) -> bool {
        self.blocks.lock().unwrap().get(key).is_some_and(|tiles| tiles.len() == LAYERS as usize)
    }

    /// Never ends by itself. Whether the token fires is what counts: the future may be dropped before it looks.
    fn stuck<T: Send>(self: &Arc<Self>, ctx: &CallContext) -> impl Future<Output = T> + Send + use<T> {
        let (this, cancel) = (Arc::clone(self), ctx.cancel.clone());
        self.tasks.spawn(async move {
            cancel.cancelled().await;
            this.gone.notify_one();
        });
        std::future::pending()
    }

    /// Verifies, as a shard must: lanes do not.
    fn store(&self, tile: TileMessage) -> Option<Result<PutAck, Error>> {
        if tile.key == ENDED {
            return Some(Err(ended()));
        }
        if !tile.data.matches(tile.crc32c) {
            self.blocks.lock().unwrap().remove(&tile.key);
            let message = format!("layer {} does not match its checksum", tile.layer);
            return Some(Ok(PutAck { key: tile.key, outcome: PutOutcome::Corrupt, message }));
        }
        // A copy of its own, as a shard makes one: memory that is lent goes back.
        let tile = TileMessage { data: bytes::Bytes::from(tile.data.clone()).into(), ..tile };
        let mut blocks = self.blocks.lock().unwrap();
        let tiles = blocks.entry(tile.key).or_default();
        let key = tile.key;
        tiles.push(tile);
        let done = tiles.len() == LAYERS as usize;
        done.then(|| Ok(PutAck { key, outcome: PutOutcome::Stored, message: String::new() }))
    }

    fn attend_to(&self, query: &AttendQuery) -> Vec<AttendAnswer> {
        let query_id = query.query_id;
        let pieces = query.items.iter().any(|item| item.view_id == PIECES_VIEW);
        let stripes = if pieces { PIECES } else { 1 };
        let answer = |stripe| self.stripe(query, stripe).map(|partials| (partials, stripe + 1 == stripes));
        let answers = (0..stripes).map(|stripe| match answer(stripe) {
            Ok((partials, last)) => AttendAnswer::Partials { query_id, partials, last },
            Err(message) => AttendAnswer::Failed { query_id, code: 5, message },
        });
        answers.collect()
    }

    /// Partials of all items in one stripe: the number of the row, and of the stripe where it is not the first, are in them.
    fn stripe(&self, query: &AttendQuery, stripe: u64) -> Result<Vec<AttendPartial>, String> {
        let mut partials = Vec::new();
        for (item, index) in query.items.iter().zip(0..) {
            let known = [MISSHAPEN_VIEW, PIECES_VIEW].contains(&item.view_id)
                || self.views.lock().unwrap().contains_key(&item.view_id);
            if !known {
                return Err(format!("`items[{index}].view_id` is not open"));
            }
            let rows = item.queries.shape[0] - u64::from(item.view_id == MISSHAPEN_VIEW);
            let values: Vec<f32> =
                (0..rows * 2).flat_map(|row| [0.0, 1.0, row as f32, stripe as f32, 0.0, 0.0]).collect();
            let partial = Tensor::from_f32(&[rows, 2, 6], &values);
            partials.push(AttendPartial { item: index, stripe, partial });
        }
        Ok(partials)
    }
}

/// Some of the [`HEADS`] heads of a tile.
fn part_of(tile: &TileMessage, heads: &std::ops::Range<u32>) -> TileMessage {
    let whole = bytes::Bytes::from(tile.data.clone());
    let head_bytes = whole.len() / HEADS as usize;
    let body = whole.slice(heads.start as usize * head_bytes..heads.end as usize * head_bytes);
    let part = HeadPart::of(&whole, HEADS as usize, heads.start);
    let crc32c = longshore_blocks::crc32c(&body);
    TileMessage { data: TileData::from(body).of_heads(part), crc32c, ..tile.clone() }
}

#[async_trait]
impl Shard for Served<FakeShard> {
    async fn lookup(&self, ctx: &CallContext, lookup: Lookup) -> Result<Vec<bool>, Error> {
        *self.seen.lock().unwrap() = Some(ctx.clone());
        match lookup.keys.first() {
            Some(&STUCK) => return self.0.stuck(ctx).await,
            Some(&PANICS) => panic!("as asked"),
            Some(&FAULTY) => {
                let error = Error::new(Code::ResourceExhausted, "the `queue` is full, hint: wait");
                return Err(error.with_field("keys").with_retry_after(Duration::from_millis(250)));
            }
            _ => {}
        }
        Ok(lookup.keys.iter().map(|key| self.holds(key)).collect())
    }

    async fn put_blocks(
        &self,
        ctx: &CallContext,
        identity: Identity,
        _: WireTileShape,
        tiles: mpsc::Receiver<TileMessage>,
    ) -> Result<BoxStream<PutAck>, Error> {
        *self.seen.lock().unwrap() = Some(ctx.clone());
        if let Some(refusal) = self.refusal.lock().unwrap().clone() {
            return Err(refusal);
        }
        if identity != self::identity()
            && let Some(kept) = &mut *self.kept.lock().unwrap()
        {
            let (until, ended) = oneshot::channel();
            kept.push(Kept { tiles, _until: until });
            return Ok(Box::pin(futures::stream::once(ended).filter_map(|_| std::future::ready(None))));
        }
        let this = Arc::clone(&self.0);
        let acks = ReceiverStream::new(tiles).filter_map(move |tile| std::future::ready(this.store(tile)));
        Ok(Box::pin(acks))
    }

    async fn get_blocks(
        &self,
        ctx: &CallContext,
        get: GetBlocks,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        *self.seen.lock().unwrap() = Some(ctx.clone());
        if get.keys == [ENDED] {
            let tiles = (0..40).map(|_| Ok(Some(tile(ENDED, 0, 1 << 20))));
            return Ok(Box::pin(futures::stream::iter(tiles.chain([Err(ended())]))));
        }
        if get.keys == [STUCK] {
            let first = futures::stream::iter([Ok(None)]);
            return Ok(Box::pin(first.chain(futures::stream::once(self.0.stuck(ctx)))));
        }
        let blocks = self.blocks.lock().unwrap();
        let end = get.layers.map_or(LAYERS, |layers| get.first_layer + layers);
        let asked = |tile: &&TileMessage| (get.first_layer..end).contains(&tile.layer);
        let read = |key: &BlockKey| match blocks.get(key) {
            Some(tiles) => tiles.iter().filter(asked).cloned().map(Some).collect(),
            None => vec![None],
        };
        let mut tiles: Vec<_> = get.keys.iter().flat_map(read).collect();
        if get.order == TileOrder::Layers {
            tiles.sort_by_key(|tile| tile.as_ref().map_or(get.first_layer, |tile| tile.layer));
        }
        let tiles: Vec<_> = tiles.into_iter().map(Ok).collect();
        Ok(Box::pin(futures::stream::iter(tiles)))
    }

    async fn get_heads(
        &self,
        ctx: &CallContext,
        get: GetBlocks,
        heads: std::ops::Range<u32>,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        let tiles = self.get_blocks(ctx, get).await?;
        Ok(Box::pin(tiles.map(move |tile| Ok(tile?.map(|tile| part_of(&tile, &heads))))))
    }

    async fn open_view(&self, _: &CallContext, open: OpenView) -> Result<OpenedView, Error> {
        let missing: Vec<_> =
            open.blocks.iter().map(|(_, key)| *key).filter(|key| !self.holds(key)).collect();
        if !missing.is_empty() {
            return Ok(OpenedView::Missing(missing));
        }
        let view_id = open.append_to.unwrap_or_else(|| self.next_view.fetch_add(1, Ordering::SeqCst) + 1);
        self.views.lock().unwrap().entry(view_id).or_default().extend(open.blocks);
        Ok(OpenedView::Open { view_id })
    }

    async fn attend(
        &self,
        _: &CallContext,
        mut queries: mpsc::Receiver<AttendQuery>,
    ) -> Result<BoxStream<AttendAnswer>, Error> {
        let (sender, answers) = mpsc::channel(4);
        let this = Arc::clone(&self.0);
        self.tasks.spawn(async move {
            while let Some(query) = queries.recv().await {
                for answer in this.attend_to(&query) {
                    if sender.send(Ok(answer)).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Box::pin(ReceiverStream::new(answers)))
    }

    async fn close_view(&self, _: &CallContext, view_id: u64) -> Result<(), Error> {
        self.views.lock().unwrap().remove(&view_id);
        Ok(())
    }

    async fn stats(&self, _: &CallContext) -> Result<ShardStats, Error> {
        let (blocks, views) =
            (self.blocks.lock().unwrap().len() as u64, self.views.lock().unwrap().len() as u64);
        Ok(ShardStats { shard_id: "fake".to_owned(), blocks, views, ..ShardStats::default() })
    }

    async fn list_blocks(&self, _: &CallContext, list: ListBlocks) -> Result<BlockPage, Error> {
        Ok(BlockPage { blocks: Vec::new(), next: list.after })
    }

    async fn start_scrub(
        &self,
        _: &CallContext,
        bytes_per_second: Option<u64>,
    ) -> Result<ScrubStarted, Error> {
        Ok(ScrubStarted { round: 3, bytes_per_second: bytes_per_second.unwrap_or(7) })
    }

    async fn drain(&self, _: &CallContext, cancel: bool) -> Result<DrainStats, Error> {
        Ok(DrainStats { draining: !cancel, moved_blocks: 5, ..DrainStats::default() })
    }
}

/// Refuses prompts beyond its limit, either before it gives its stream or inside of it.
#[derive(Debug, Default)]
pub(crate) struct FakeRouter {
    pub(crate) refuse_in_stream: bool,
    /// Most tokens that it ever had to hold.
    pub(crate) read: AtomicU64,
}

async fn read(this: &FakeRouter, prompt: &mut mpsc::Receiver<PromptChunk>) -> Result<usize, Error> {
    let mut tokens = 0;
    while let Some(chunk) = prompt.recv().await {
        tokens += match chunk {
            PromptChunk::Tokens(chunk) => chunk.len(),
            PromptChunk::Text(text) => text.len(),
            PromptChunk::Message(message) => message.content.len(),
        };
        this.read.store(tokens as u64, Ordering::SeqCst);
        if tokens > PROMPT_TOKENS_MAX {
            return Err(Error::new(Code::OutOfRange, "the prompt is too long").with_field("tokens"));
        }
    }
    Ok(tokens)
}

#[async_trait]
impl Inference for Served<FakeRouter> {
    async fn generate(
        &self,
        _: &CallContext,
        start: GenerateStart,
        mut prompt: mpsc::Receiver<PromptChunk>,
    ) -> Result<BoxStream<GenerateEvent>, Error> {
        let accepted = move |tokens: usize| GenerateEvent::Accepted {
            request_id: start.request_id.clone(),
            prompt_tokens: tokens as u64,
            cached_tokens: 0,
            model: start.model.clone(),
            prefill_policy: start.prefill_policy.clone(),
        };
        let this = Arc::clone(&self.0);
        if !this.refuse_in_stream {
            let tokens = read(&this, &mut prompt).await?;
            return Ok(Box::pin(futures::stream::iter([Ok(accepted(tokens))])));
        }
        let reading = async move { read(&this, &mut prompt).await.map(accepted) };
        Ok(Box::pin(futures::stream::once(reading)))
    }

    async fn tokenize(&self, _: &CallContext, _: &str, text: &str, skip: bool) -> Result<Vec<u32>, Error> {
        let begin = (!skip).then_some(1);
        Ok(begin.into_iter().chain(text.bytes().map(u32::from)).collect())
    }

    async fn list_models(&self, _: &CallContext) -> Result<Vec<ModelDescription>, Error> {
        Ok(vec![ModelDescription {
            name: "fake".to_owned(),
            architecture: "llama".to_owned(),
            max_context_tokens: 8192,
            vocabulary: 256,
            tile_shape: shape(),
            kv_bytes_per_token: 64,
            deployment: identity().deployment,
        }])
    }
}

#[async_trait]
impl Describer for Served<FakeRouter> {
    async fn describe(&self, _: &CallContext) -> Result<Describe, Error> {
        let this = Member {
            id: "fake".to_owned(),
            role: Role::Router,
            address: "local:fake".to_owned(),
            incarnation: 1,
            weight: 0,
            healthy: true,
            host: String::new(),
            zone: String::new(),
        };
        let members = vec![this.clone()];
        Ok(Describe { this, members, epoch: 3, models: Vec::new(), version: "0.1.0".to_owned() })
    }
}
