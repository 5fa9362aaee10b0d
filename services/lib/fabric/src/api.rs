//! The service traits. A service crate implements its own; `grpc` implements them as clients.
//!
//! Calls that take a channel give their stream as soon as they know that they want the work: callers may begin to feed
//! the channel only then, and a failure may come from the call or, later, as the last item of the stream.

use std::{fmt::Debug, ops::Range, pin::Pin, sync::Arc};

use async_trait::async_trait;
use longshore_proto::types::{
    AttendAnswer, AttendQuery, BlockPage, DecodeEvent, DecodeStart, Describe, DrainStats, GenerateEvent,
    GenerateStart, GetBlocks, GetSummaries, Identity, InventoryNews, ListBlocks, Lookup, ModelDescription,
    OpenView, OpenedView, PrefillEvent, PrefillStart, PromptChunk, PutAck, ScrubStarted, ShardStats,
    SummariesMessage, TileMemory, TileMessage, WatchInventory, WireTileShape,
};
use tokio::sync::mpsc;

use crate::{CallContext, Code, Error, StripePartial};

/// A stream of results; dropping it cancels the call.
pub type BoxStream<T> = Pin<Box<dyn futures::Stream<Item = Result<T, Error>> + Send + 'static>>;

/// A KV shard.
#[async_trait]
pub trait Shard: Send + Sync + Debug {
    /// One bool per key: held complete?
    async fn lookup(&self, ctx: &CallContext, lookup: Lookup) -> Result<Vec<bool>, Error>;
    /// Stores tiles; one acknowledgement per block, as soon as all its layers verified. Closing `tiles` ends the call;
    /// blocks that are incomplete then are dropped, as they are when the answer stream is dropped.
    async fn put_blocks(
        &self,
        ctx: &CallContext,
        identity: Identity,
        shape: WireTileShape,
        tiles: mpsc::Receiver<TileMessage>,
    ) -> Result<BoxStream<PutAck>, Error>;
    /// Reads tiles, block-major; `None` for a block that is not held (once per block).
    async fn get_blocks(
        &self,
        ctx: &CallContext,
        get: GetBlocks,
    ) -> Result<BoxStream<Option<TileMessage>>, Error>;
    /// The same, with bodies read straight into `memory` where the lane can do that (`TileData::landed` tells); otherwise they come as
    /// they do from [`Self::get_blocks`].
    async fn get_blocks_into(
        &self,
        ctx: &CallContext,
        get: GetBlocks,
        _memory: Arc<dyn TileMemory>,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        self.get_blocks(ctx, get).await
    }
    /// Memory for the bodies of tiles that others put here, so that a lane can read them to where they stay.
    fn tile_memory(&self) -> Option<Arc<dyn TileMemory>> {
        None
    }
    /// Reads `heads` of the KV heads of tiles: as [`Self::get_blocks`], but each body is that part of its tile, with what proves it
    /// ([`TileMessage::copy_heads`]).
    async fn get_heads(
        &self,
        _ctx: &CallContext,
        _get: GetBlocks,
        _heads: Range<u32>,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        Err(Error::new(Code::Unimplemented, "this shard reads whole tiles only"))
    }
    /// Opens a view or appends to one.
    async fn open_view(&self, ctx: &CallContext, open: OpenView) -> Result<OpenedView, Error>;
    /// Reads the summaries of a view's blocks: layer by layer, blocks in the order of the view, some in each message. Shards that
    /// make none refuse.
    async fn get_summaries(
        &self,
        _ctx: &CallContext,
        _get: GetSummaries,
    ) -> Result<BoxStream<SummariesMessage>, Error> {
        Err(Error::new(Code::Unimplemented, "this shard makes no summaries of blocks"))
    }
    /// Answers queries; the stream ends after `queries` closed and everything was answered.
    async fn attend(
        &self,
        ctx: &CallContext,
        queries: mpsc::Receiver<AttendQuery>,
    ) -> Result<BoxStream<AttendAnswer>, Error>;
    /// Answers a query on the calling compute thread, where the shard lies in this process: partials ascending by item and
    /// stripe, each finite. `None` where it lies elsewhere; then only [`Self::attend`] answers. Blocks for as long as the
    /// query computes, so never on a reactor thread.
    fn attend_here(&self, _query: &AttendQuery) -> Option<Result<Vec<StripePartial>, Error>> {
        None
    }
    /// Whether [`Self::attend_here`] answers.
    fn is_here(&self) -> bool {
        false
    }
    /// Releases a view; unknown ids are no error.
    async fn close_view(&self, ctx: &CallContext, view_id: u64) -> Result<(), Error>;
    /// Occupancy and counters.
    async fn stats(&self, ctx: &CallContext) -> Result<ShardStats, Error>;
    /// Tells which blocks come and go, for as long as the stream is read.
    async fn watch_inventory(
        &self,
        _ctx: &CallContext,
        _watch: WatchInventory,
    ) -> Result<BoxStream<InventoryNews>, Error> {
        Err(Error::new(Code::Unimplemented, "this shard tells no inventory"))
    }
    /// Lists held blocks, of all tenants, a page at a time; may check their bytes.
    async fn list_blocks(&self, _ctx: &CallContext, _list: ListBlocks) -> Result<BlockPage, Error> {
        Err(Error::new(Code::Unimplemented, "this shard lists no blocks"))
    }
    /// Asks for a round of the scrubber at so many bytes a second, or at the usual rate; joins one that was asked for before.
    async fn start_scrub(
        &self,
        _ctx: &CallContext,
        _bytes_per_second: Option<u64>,
    ) -> Result<ScrubStarted, Error> {
        Err(Error::new(Code::Unimplemented, "this shard has no scrubber"))
    }
    /// Asks the shard to hand its blocks to the others, or (`cancel`) to stop doing so.
    async fn drain(&self, _ctx: &CallContext, _cancel: bool) -> Result<DrainStats, Error> {
        Err(Error::new(Code::Unimplemented, "this shard cannot be drained"))
    }
}

/// A prefill worker.
#[async_trait]
pub trait Prefiller: Send + Sync + Debug {
    /// Computes and stores every full block that is not cached. `tokens` are chunks of the prompt from position 0 on.
    async fn prefill(
        &self,
        ctx: &CallContext,
        start: PrefillStart,
        tokens: mpsc::Receiver<Vec<u32>>,
    ) -> Result<BoxStream<PrefillEvent>, Error>;
}

/// A decode worker.
#[async_trait]
pub trait Decoder: Send + Sync + Debug {
    /// Continues a sequence. `tokens` are chunks of prompt and earlier answer from position 0 on. `Code::NotFound` says
    /// that blocks are missing from the store.
    async fn decode(
        &self,
        ctx: &CallContext,
        start: DecodeStart,
        tokens: mpsc::Receiver<Vec<u32>>,
    ) -> Result<BoxStream<DecodeEvent>, Error>;
}

/// The front door.
#[async_trait]
pub trait Inference: Send + Sync + Debug {
    /// Streams a prompt in and its answer out; the prompt ends when `prompt` closes.
    async fn generate(
        &self,
        ctx: &CallContext,
        start: GenerateStart,
        prompt: mpsc::Receiver<PromptChunk>,
    ) -> Result<BoxStream<GenerateEvent>, Error>;
    /// Text to token ids.
    async fn tokenize(
        &self,
        ctx: &CallContext,
        model: &str,
        text: &str,
        skip_special_tokens: bool,
    ) -> Result<Vec<u32>, Error>;
    /// Models of this cluster.
    async fn list_models(&self, ctx: &CallContext) -> Result<Vec<ModelDescription>, Error>;
}

/// Any process.
#[async_trait]
pub trait Describer: Send + Sync + Debug {
    /// This process and whom it knows.
    async fn describe(&self, ctx: &CallContext) -> Result<Describe, Error>;
}

/// Makes clients from addresses: `http://host:port` (grpc lane) or `local:id` (local lane). Cheap to call: connections are
/// pooled and made lazily, so it fails only for addresses that make no sense.
pub trait Connector: Send + Sync + Debug {
    /// Client of a shard.
    fn shard(&self, address: &str) -> Result<Arc<dyn Shard>, Error>;
    /// Client of a prefill worker.
    fn prefiller(&self, address: &str) -> Result<Arc<dyn Prefiller>, Error>;
    /// Client of a decode worker.
    fn decoder(&self, address: &str) -> Result<Arc<dyn Decoder>, Error>;
    /// Client of a router.
    fn inference(&self, address: &str) -> Result<Arc<dyn Inference>, Error>;
    /// Client of any process.
    fn describer(&self, address: &str) -> Result<Arc<dyn Describer>, Error>;
}
