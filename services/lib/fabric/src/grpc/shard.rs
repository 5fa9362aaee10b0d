//! [`Shard`] over `KvStoreService`.

use std::{ops::Range, sync::Arc};

use async_trait::async_trait;
use longshore_proto::{
    types::{
        AttendAnswer, AttendQuery, BlockPage, DrainStats, GetBlocks, GetSummaries, Identity, InventoryNews,
        ListBlocks, Lookup, OpenView, OpenedView, PutAck, ScrubStarted, ShardStats, SummariesMessage,
        TileMemory, TileMessage, WatchInventory, WireTileShape,
    },
    v1::{self, kv_store_service_client::KvStoreServiceClient, put_blocks_request::Part},
};
use tokio::sync::mpsc;
use tonic::transport::Channel;

use super::{
    attend,
    call::{messages, request, streaming, unary},
    tiles::{Exchanged, TileChannels},
};
use crate::{BoxStream, CallContext, Error, Shard, lane::Hop, shm::Link};

/// A shard behind an address.
#[derive(Debug)]
pub(super) struct ShardClient {
    calls: KvStoreServiceClient<Channel>,
    /// `None`: the generated client moves tiles too.
    tiles: Option<TileChannels>,
    /// The `nccl` lane for partials of attention, where there is one.
    attending: Option<Exchanged>,
}

impl ShardClient {
    pub(super) fn new(
        calls: Channel,
        tiles: TileChannels,
        attending: Option<Exchanged>,
        message_bytes_max: usize,
    ) -> Self {
        Self { tiles: Some(tiles), attending, ..Self::stock(calls, message_bytes_max) }
    }

    /// Over one connection with shared memory.
    pub(super) fn with_link(channel: Channel, link: Arc<Link>, message_bytes_max: usize) -> Self {
        let tiles = TileChannels::with_link(channel.clone(), link, message_bytes_max);
        Self { tiles: Some(tiles), ..Self::stock(channel, message_bytes_max) }
    }

    async fn read(
        &self,
        ctx: &CallContext,
        get: v1::GetBlocksRequest,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        if let Some(own) = &self.tiles {
            return own.get_blocks(ctx, get, None).await;
        }
        let hop = Hop::new(ctx);
        let request = request(&hop.context, get)?;
        let mut client = self.calls.clone();
        streaming(hop, client.get_blocks(request), Option::try_from).await
    }

    pub(super) fn stock(channel: Channel, message_bytes_max: usize) -> Self {
        Self { calls: generated(channel, message_bytes_max), tiles: None, attending: None }
    }
}

/// The generated client with our limit.
pub(super) fn generated(channel: Channel, message_bytes_max: usize) -> KvStoreServiceClient<Channel> {
    KvStoreServiceClient::new(channel)
        .max_decoding_message_size(message_bytes_max)
        .max_encoding_message_size(message_bytes_max)
}

#[async_trait]
impl Shard for ShardClient {
    async fn lookup(&self, ctx: &CallContext, lookup: Lookup) -> Result<Vec<bool>, Error> {
        let asked = lookup.keys.len();
        let request = request(ctx, v1::LookupRequest::from(lookup))?;
        let mut client = self.calls.clone();
        let answer = unary(ctx, client.lookup(request)).await?;
        answer.into_present(asked).map_err(|fault| Error::bad_answer(&fault))
    }

    async fn put_blocks(
        &self,
        ctx: &CallContext,
        identity: Identity,
        shape: WireTileShape,
        tiles: mpsc::Receiver<TileMessage>,
    ) -> Result<BoxStream<PutAck>, Error> {
        if let Some(own) = &self.tiles {
            return own.put_blocks(ctx, identity, shape, tiles).await;
        }
        let hop = Hop::new(ctx);
        let (identity, shape) = (Some(identity.into()), Some(shape.into()));
        let start = v1::PutBlocksStart { identity, shape, ..Default::default() };
        let part = |part| v1::PutBlocksRequest { part: Some(part) };
        let tiles = messages(&hop.context, Some(part(Part::Start(start))), tiles, move |tile| {
            vec![part(Part::Tile(tile.into()))]
        });
        let request = request(&hop.context, tiles)?;
        let mut client = self.calls.clone();
        streaming(hop, client.put_blocks(request), PutAck::try_from).await
    }

    async fn get_blocks(
        &self,
        ctx: &CallContext,
        get: GetBlocks,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        self.read(ctx, get.into()).await
    }

    async fn get_heads(
        &self,
        ctx: &CallContext,
        get: GetBlocks,
        heads: Range<u32>,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        if heads.is_empty() {
            return Err(Error::invalid("heads", format!("are {heads:?}, which is none")));
        }
        self.read(ctx, v1::GetBlocksRequest::from(get).with_heads(Some(heads))).await
    }

    async fn get_blocks_into(
        &self,
        ctx: &CallContext,
        get: GetBlocks,
        memory: Arc<dyn TileMemory>,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        match &self.tiles {
            Some(own) => own.get_blocks(ctx, get.into(), Some(memory)).await,
            None => self.get_blocks(ctx, get).await,
        }
    }

    async fn open_view(&self, ctx: &CallContext, open: OpenView) -> Result<OpenedView, Error> {
        let request = request(ctx, v1::OpenViewRequest::from(open))?;
        let mut client = self.calls.clone();
        let answer = unary(ctx, client.open_view(request)).await?;
        OpenedView::try_from(answer).map_err(|fault| Error::bad_answer(&fault))
    }

    async fn get_summaries(
        &self,
        ctx: &CallContext,
        get: GetSummaries,
    ) -> Result<BoxStream<SummariesMessage>, Error> {
        let hop = Hop::new(ctx);
        let request = request(&hop.context, v1::GetSummariesRequest::from(get))?;
        // Summaries are bulk like tiles.
        let mut client = self.tiles.as_ref().map_or_else(|| self.calls.clone(), TileChannels::generated);
        streaming(hop, client.get_summaries(request), SummariesMessage::try_from).await
    }

    async fn attend(
        &self,
        ctx: &CallContext,
        queries: mpsc::Receiver<AttendQuery>,
    ) -> Result<BoxStream<AttendAnswer>, Error> {
        if let Some(Exchanged { epochs, alone }) = &self.attending {
            return attend::attend(self.calls.clone(), (epochs, *alone), ctx, queries).await;
        }
        let hop = Hop::new(ctx);
        let link = self.tiles.as_ref().and_then(TileChannels::link).cloned();
        let lender = link.as_ref().map(Link::lender);
        let queries = messages(&hop.context, None, queries, move |query| {
            let mut query = v1::AttendRequest::from(query);
            if let Some(lender) = &lender {
                lender.place_queries(&mut query);
            }
            vec![query]
        });
        let request = request(&hop.context, queries)?;
        let mut client = self.calls.clone();
        streaming(hop, client.attend(request), move |mut answer| {
            link.as_ref().map_or(Ok(()), |link| link.take_partials(&mut answer))?;
            AttendAnswer::try_from(answer)
        })
        .await
    }

    async fn close_view(&self, ctx: &CallContext, view_id: u64) -> Result<(), Error> {
        let request = request(ctx, v1::CloseViewRequest { view_id })?;
        let mut client = self.calls.clone();
        unary(ctx, client.close_view(request)).await.map(drop)
    }

    async fn stats(&self, ctx: &CallContext) -> Result<ShardStats, Error> {
        let request = request(ctx, v1::StatsRequest {})?;
        let mut client = self.calls.clone();
        unary(ctx, client.stats(request)).await.map(Into::into)
    }

    async fn watch_inventory(
        &self,
        ctx: &CallContext,
        watch: WatchInventory,
    ) -> Result<BoxStream<InventoryNews>, Error> {
        let hop = Hop::new(ctx);
        let request = request(&hop.context, v1::WatchInventoryRequest::from(watch))?;
        let mut client = self.calls.clone();
        streaming(hop, client.watch_inventory(request), InventoryNews::try_from).await
    }

    async fn list_blocks(&self, ctx: &CallContext, list: ListBlocks) -> Result<BlockPage, Error> {
        let request = request(ctx, v1::ListBlocksRequest::from(list))?;
        let mut client = self.calls.clone();
        let page = unary(ctx, client.list_blocks(request)).await?;
        BlockPage::try_from(page).map_err(|fault| Error::bad_answer(&fault))
    }

    async fn start_scrub(
        &self,
        ctx: &CallContext,
        bytes_per_second: Option<u64>,
    ) -> Result<ScrubStarted, Error> {
        let message = v1::StartScrubRequest { bytes_per_second: bytes_per_second.unwrap_or(0) };
        let request = request(ctx, message)?;
        let mut client = self.calls.clone();
        unary(ctx, client.start_scrub(request)).await.map(Into::into)
    }

    async fn drain(&self, ctx: &CallContext, cancel: bool) -> Result<DrainStats, Error> {
        let request = request(ctx, v1::DrainRequest { cancel })?;
        let mut client = self.calls.clone();
        let answer = unary(ctx, client.drain(request)).await?;
        Ok(answer.drain.map(Into::into).unwrap_or_default())
    }
}
