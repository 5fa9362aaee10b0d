//! The traits over the registry: looks the service up at each call and puts the call under its caller's context.

use std::{ops::Range, sync::Arc};

use async_trait::async_trait;
use longshore_proto::types::{
    AttendAnswer, AttendQuery, BlockPage, DecodeEvent, DecodeStart, Describe, DrainStats, GenerateEvent,
    GenerateStart, GetBlocks, GetSummaries, Identity, InventoryNews, ListBlocks, Lookup, ModelDescription,
    OpenView, OpenedView, PrefillEvent, PrefillStart, PromptChunk, PutAck, ScrubStarted, ShardStats,
    SummariesMessage, TileMessage, WatchInventory, WireTileShape,
};
use tokio::sync::mpsc;

use super::Registry;
use crate::{
    BoxStream, CallContext, Decoder, Describer, Error, Inference, Prefiller, Shard, StripePartial, lane::Hop,
};

/// Client of the services with one id.
#[derive(Debug)]
pub(super) struct Local {
    registry: Arc<Registry>,
    id: String,
}

impl Local {
    pub(super) fn new(registry: Arc<Registry>, id: String) -> Self {
        Self { registry, id }
    }

    fn shard(&self) -> Result<Arc<dyn Shard>, Error> {
        self.registry.shards.get(&self.id)
    }

    fn inference(&self) -> Result<Arc<dyn Inference>, Error> {
        self.registry.inferences.get(&self.id)
    }
}

#[async_trait]
impl Shard for Local {
    async fn lookup(&self, ctx: &CallContext, lookup: Lookup) -> Result<Vec<bool>, Error> {
        let (shard, hop) = (self.shard()?, Hop::new(ctx));
        hop.answer(shard.lookup(&hop.context, lookup)).await
    }

    async fn put_blocks(
        &self,
        ctx: &CallContext,
        identity: Identity,
        shape: WireTileShape,
        tiles: mpsc::Receiver<TileMessage>,
    ) -> Result<BoxStream<PutAck>, Error> {
        let (shard, hop) = (self.shard()?, Hop::new(ctx));
        let context = hop.context.clone();
        hop.stream(shard.put_blocks(&context, identity, shape, tiles)).await
    }

    async fn get_blocks(
        &self,
        ctx: &CallContext,
        get: GetBlocks,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        let (shard, hop) = (self.shard()?, Hop::new(ctx));
        let context = hop.context.clone();
        hop.stream(shard.get_blocks(&context, get)).await
    }

    async fn get_heads(
        &self,
        ctx: &CallContext,
        get: GetBlocks,
        heads: Range<u32>,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        let (shard, hop) = (self.shard()?, Hop::new(ctx));
        let context = hop.context.clone();
        hop.stream(shard.get_heads(&context, get, heads)).await
    }

    async fn open_view(&self, ctx: &CallContext, open: OpenView) -> Result<OpenedView, Error> {
        let (shard, hop) = (self.shard()?, Hop::new(ctx));
        hop.answer(shard.open_view(&hop.context, open)).await
    }

    async fn get_summaries(
        &self,
        ctx: &CallContext,
        get: GetSummaries,
    ) -> Result<BoxStream<SummariesMessage>, Error> {
        let (shard, hop) = (self.shard()?, Hop::new(ctx));
        let context = hop.context.clone();
        hop.stream(shard.get_summaries(&context, get)).await
    }

    async fn attend(
        &self,
        ctx: &CallContext,
        queries: mpsc::Receiver<AttendQuery>,
    ) -> Result<BoxStream<AttendAnswer>, Error> {
        let (shard, hop) = (self.shard()?, Hop::new(ctx));
        let context = hop.context.clone();
        hop.stream(shard.attend(&context, queries)).await
    }

    fn is_here(&self) -> bool {
        self.shard().is_ok_and(|shard| shard.is_here())
    }

    fn attend_here(&self, query: &AttendQuery) -> Option<Result<Vec<StripePartial>, Error>> {
        match self.shard() {
            Ok(shard) => shard.attend_here(query),
            Err(error) => Some(Err(error)),
        }
    }

    async fn close_view(&self, ctx: &CallContext, view_id: u64) -> Result<(), Error> {
        let (shard, hop) = (self.shard()?, Hop::new(ctx));
        hop.answer(shard.close_view(&hop.context, view_id)).await
    }

    async fn stats(&self, ctx: &CallContext) -> Result<ShardStats, Error> {
        let (shard, hop) = (self.shard()?, Hop::new(ctx));
        hop.answer(shard.stats(&hop.context)).await
    }

    async fn watch_inventory(
        &self,
        ctx: &CallContext,
        watch: WatchInventory,
    ) -> Result<BoxStream<InventoryNews>, Error> {
        let (shard, hop) = (self.shard()?, Hop::new(ctx));
        let context = hop.context.clone();
        hop.stream(shard.watch_inventory(&context, watch)).await
    }

    async fn list_blocks(&self, ctx: &CallContext, list: ListBlocks) -> Result<BlockPage, Error> {
        let (shard, hop) = (self.shard()?, Hop::new(ctx));
        hop.answer(shard.list_blocks(&hop.context, list)).await
    }

    async fn start_scrub(
        &self,
        ctx: &CallContext,
        bytes_per_second: Option<u64>,
    ) -> Result<ScrubStarted, Error> {
        let (shard, hop) = (self.shard()?, Hop::new(ctx));
        hop.answer(shard.start_scrub(&hop.context, bytes_per_second)).await
    }

    async fn drain(&self, ctx: &CallContext, cancel: bool) -> Result<DrainStats, Error> {
        let (shard, hop) = (self.shard()?, Hop::new(ctx));
        hop.answer(shard.drain(&hop.context, cancel)).await
    }
}

#[async_trait]
impl Prefiller for Local {
    async fn prefill(
        &self,
        ctx: &CallContext,
        start: PrefillStart,
        tokens: mpsc::Receiver<Vec<u32>>,
    ) -> Result<BoxStream<PrefillEvent>, Error> {
        let (worker, hop) = (self.registry.prefillers.get(&self.id)?, Hop::new(ctx));
        let context = hop.context.clone();
        hop.stream(worker.prefill(&context, start, tokens)).await
    }
}

#[async_trait]
impl Decoder for Local {
    async fn decode(
        &self,
        ctx: &CallContext,
        start: DecodeStart,
        tokens: mpsc::Receiver<Vec<u32>>,
    ) -> Result<BoxStream<DecodeEvent>, Error> {
        let (worker, hop) = (self.registry.decoders.get(&self.id)?, Hop::new(ctx));
        let context = hop.context.clone();
        hop.stream(worker.decode(&context, start, tokens)).await
    }
}

#[async_trait]
impl Inference for Local {
    async fn generate(
        &self,
        ctx: &CallContext,
        start: GenerateStart,
        prompt: mpsc::Receiver<PromptChunk>,
    ) -> Result<BoxStream<GenerateEvent>, Error> {
        let (router, hop) = (self.inference()?, Hop::new(ctx));
        let context = hop.context.clone();
        hop.stream(router.generate(&context, start, prompt)).await
    }

    async fn tokenize(
        &self,
        ctx: &CallContext,
        model: &str,
        text: &str,
        skip_special_tokens: bool,
    ) -> Result<Vec<u32>, Error> {
        let (router, hop) = (self.inference()?, Hop::new(ctx));
        hop.answer(router.tokenize(&hop.context, model, text, skip_special_tokens)).await
    }

    async fn list_models(&self, ctx: &CallContext) -> Result<Vec<ModelDescription>, Error> {
        let (router, hop) = (self.inference()?, Hop::new(ctx));
        hop.answer(router.list_models(&hop.context)).await
    }
}

#[async_trait]
impl Describer for Local {
    async fn describe(&self, ctx: &CallContext) -> Result<Describe, Error> {
        let (process, hop) = (self.registry.describers.get(&self.id)?, Hop::new(ctx));
        hop.answer(process.describe(&hop.context)).await
    }
}
