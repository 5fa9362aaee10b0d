//! `KvStoreService` over a [`Shard`].

use std::sync::Arc;

use longshore_proto::{
    types::{
        GetBlocks, GetSummaries, Identity, ListBlocks, Lookup, OpenView, PutAck, TileMessage, WatchInventory,
        WireTileShape,
    },
    v1::{self, kv_store_service_server::KvStoreService, put_blocks_request::Part},
};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, Streaming};

use super::{
    Answers, answer, attend,
    call::Desk,
    pump::{self, Step},
    tiles,
};
use crate::{
    Error, Shard, TileTraffic,
    nccl::{self, Convener},
    shm::Connection,
    tcp::{self, Buffers, Door},
};

/// Serves `shard`.
#[derive(Debug, Clone)]
pub(super) struct ShardService {
    pub(super) shard: Arc<dyn Shard>,
    pub(super) desk: Desk,
    /// Its tile connections, where it offers some.
    pub(super) door: Option<Arc<Door>>,
    /// Its ends of the lane `nccl`, where it has such a lane.
    pub(super) convener: Option<Arc<Convener>>,
    /// Memory for bodies that come there, where the shard gives none.
    pub(super) buffers: Buffers,
    /// Where partials that are exchanged are counted.
    pub(super) traffic: TileTraffic,
}

#[tonic::async_trait]
impl KvStoreService for ShardService {
    type PutBlocksStream = Answers<v1::PutBlocksResponse>;
    type GetBlocksStream = Answers<v1::GetBlocksResponse>;
    type GetSummariesStream = Answers<v1::GetSummariesResponse>;
    type AttendStream = Answers<v1::AttendResponse>;
    type WatchInventoryStream = Answers<v1::WatchInventoryResponse>;

    async fn lookup(
        &self,
        request: Request<v1::LookupRequest>,
    ) -> Result<Response<v1::LookupResponse>, Status> {
        let hop = self.desk.enter(&request)?;
        let lookup = Lookup::try_from(request.into_inner()).map_err(Error::from)?;
        let present = hop.answer(self.shard.lookup(&hop.context, lookup)).await?;
        Ok(Response::new(present.into()))
    }

    async fn put_blocks(
        &self,
        request: Request<Streaming<v1::PutBlocksRequest>>,
    ) -> Result<Response<Self::PutBlocksStream>, Status> {
        let hop = self.desk.enter(&request)?;
        let mut incoming = request.into_inner();
        let Some(Part::Start(start)) = pump::first(&hop, &mut incoming).await?.part else {
            return Err(pump::start_missing().into());
        };
        let (identity, shape) = put_start(start)?;
        let (sender, tiles) = mpsc::channel(pump::QUEUE);
        let pump = pump::pump(incoming, sender, None, put_step);
        let context = hop.context.clone();
        let acks = pump::converse(hop, pump, self.shard.put_blocks(&context, identity, shape, tiles)).await?;
        Ok(answer(acks))
    }

    async fn get_blocks(
        &self,
        request: Request<v1::GetBlocksRequest>,
    ) -> Result<Response<Self::GetBlocksStream>, Status> {
        let hop = self.desk.enter(&request)?;
        let request = request.into_inner();
        let heads = request.head_range().map_err(Error::from)?;
        let get = GetBlocks::try_from(request).map_err(Error::from)?;
        let context = hop.context.clone();
        Ok(answer(tiles::read(self, hop, &context, get, heads).await?))
    }

    async fn open_view(
        &self,
        request: Request<v1::OpenViewRequest>,
    ) -> Result<Response<v1::OpenViewResponse>, Status> {
        let hop = self.desk.enter(&request)?;
        let open = OpenView::try_from(request.into_inner()).map_err(Error::from)?;
        let opened = hop.answer(self.shard.open_view(&hop.context, open)).await?;
        Ok(Response::new(opened.into()))
    }

    async fn get_summaries(
        &self,
        request: Request<v1::GetSummariesRequest>,
    ) -> Result<Response<Self::GetSummariesStream>, Status> {
        let hop = self.desk.enter(&request)?;
        let get = GetSummaries::try_from(request.into_inner()).map_err(Error::from)?;
        let context = hop.context.clone();
        Ok(answer(hop.stream(self.shard.get_summaries(&context, get)).await?))
    }

    async fn attend(
        &self,
        request: Request<Streaming<v1::AttendRequest>>,
    ) -> Result<Response<Self::AttendStream>, Status> {
        Ok(Response::new(attend::attend(self, request).await?))
    }

    async fn close_view(
        &self,
        request: Request<v1::CloseViewRequest>,
    ) -> Result<Response<v1::CloseViewResponse>, Status> {
        let hop = self.desk.enter(&request)?;
        hop.answer(self.shard.close_view(&hop.context, request.get_ref().view_id)).await?;
        Ok(Response::new(v1::CloseViewResponse {}))
    }

    async fn stats(&self, request: Request<v1::StatsRequest>) -> Result<Response<v1::StatsResponse>, Status> {
        let hop = self.desk.enter(&request)?;
        let stats = hop.answer(self.shard.stats(&hop.context)).await?;
        Ok(Response::new(stats.into()))
    }

    async fn watch_inventory(
        &self,
        request: Request<v1::WatchInventoryRequest>,
    ) -> Result<Response<Self::WatchInventoryStream>, Status> {
        let hop = self.desk.enter(&request)?;
        let watch = WatchInventory::try_from(request.into_inner()).map_err(Error::from)?;
        let context = hop.context.clone();
        Ok(answer(hop.stream(self.shard.watch_inventory(&context, watch)).await?))
    }

    async fn list_blocks(
        &self,
        request: Request<v1::ListBlocksRequest>,
    ) -> Result<Response<v1::ListBlocksResponse>, Status> {
        let hop = self.desk.enter(&request)?;
        let list = ListBlocks::try_from(request.into_inner()).map_err(Error::from)?;
        let page = hop.answer(self.shard.list_blocks(&hop.context, list)).await?;
        Ok(Response::new(page.into()))
    }

    async fn start_scrub(
        &self,
        request: Request<v1::StartScrubRequest>,
    ) -> Result<Response<v1::StartScrubResponse>, Status> {
        let hop = self.desk.enter(&request)?;
        let asked = request.get_ref().bytes_per_second;
        let rate = (asked != 0).then_some(asked);
        let started = hop.answer(self.shard.start_scrub(&hop.context, rate)).await?;
        Ok(Response::new(started.into()))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        let hop = self.desk.enter(&request)?;
        let drain = hop.answer(self.shard.drain(&hop.context, request.get_ref().cancel)).await?;
        Ok(Response::new(v1::DrainResponse { drain: Some(drain.into()) }))
    }

    async fn open_tile_connection(
        &self,
        request: Request<v1::OpenTileConnectionRequest>,
    ) -> Result<Response<v1::OpenTileConnectionResponse>, Status> {
        let _hop = self.desk.enter(&request)?;
        let door = self.door.as_ref().ok_or_else(tcp::not_offered)?;
        let connection = request.extensions().get::<Connection>().cloned().unwrap_or_default();
        Ok(Response::new(door.offer(&connection.tile_connections, tokio::time::Instant::now())?))
    }

    async fn join_nccl_epoch(
        &self,
        request: Request<v1::JoinNcclEpochRequest>,
    ) -> Result<Response<v1::JoinNcclEpochResponse>, Status> {
        let hop = self.desk.enter(&request)?;
        let convener = self.convener.as_ref().ok_or_else(nccl::not_offered)?;
        let connection = request.extensions().get::<Connection>().cloned().unwrap_or_default();
        let now = tokio::time::Instant::now();
        let invited = convener.invite(&connection.nccl_members, request.get_ref(), now);
        Ok(Response::new(hop.answer(invited).await?))
    }

    async fn end_nccl_epoch(
        &self,
        request: Request<v1::EndNcclEpochRequest>,
    ) -> Result<Response<v1::EndNcclEpochResponse>, Status> {
        let _hop = self.desk.enter(&request)?;
        let convener = self.convener.as_ref().ok_or_else(nccl::not_offered)?;
        let ended = convener.end(request.into_inner())?;
        Ok(Response::new(v1::EndNcclEpochResponse { ended }))
    }
}

pub(super) fn put_start(start: v1::PutBlocksStart) -> Result<(Identity, WireTileShape), Error> {
    let identity = start.identity.ok_or_else(|| Error::invalid("start.identity", "is missing"))?;
    let identity = Identity::try_from(identity).map_err(|fault| fault.within("start.identity"))?;
    let shape = start.shape.ok_or_else(|| Error::invalid("start.shape", "is missing"))?;
    let shape = WireTileShape::try_from(shape).map_err(|fault| fault.within("start.shape"))?;
    Ok((identity, shape))
}

/// A tile for the service, which verifies it.
pub(super) fn put_step(message: v1::PutBlocksRequest) -> Result<Step<TileMessage, PutAck>, Error> {
    let tile = match message.part {
        Some(Part::Tile(tile)) => tile,
        Some(Part::Start(_)) => return Err(pump::start_repeated()),
        None => return Err(Error::invalid("part", "is not set")),
    };
    let tile = TileMessage::try_from(tile).map_err(|fault| fault.within("tile"))?;
    Ok(Step::Forward(crate::tiles::whole(tile)?))
}
