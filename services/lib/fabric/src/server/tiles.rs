//! `KvStoreService` with the two methods that move tiles served by our own codec, the others by the generated one.

use std::{
    convert::Infallible,
    future::Future,
    ops::Range,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::StreamExt;
use http::{HeaderValue, Request, Response, header};
use longshore_proto::{
    types::{GetBlocks, PutAck, TileMessage},
    v1::{self, kv_store_service_server::KvStoreServiceServer, put_blocks_request::Part},
};
use tokio::sync::mpsc;
use tonic::{Status, body::Body, metadata::MetadataMap, server::NamedService};
use tower::Service;

use super::{
    budget::{Budget, Reservation},
    pump::{self, Step},
    refusal::from_request,
    shard::{ShardService, put_start},
    streamed,
};
use crate::{
    BoxStream, CallContext, Error, Lane,
    lane::{Hop, within},
    shm::{self, Connection, Lender, Link},
    tcp::Lease,
    tiles::{self, GET_BLOCKS, Messages, Outgoing, OutgoingBody, PUT_BLOCKS, TileRequest},
};

/// Serves a shard.
#[derive(Debug, Clone)]
pub(super) struct TileService {
    shard: ShardService,
    generated: KvStoreServiceServer<ShardService>,
    budget: Budget,
    message_bytes_max: usize,
}

impl TileService {
    pub(super) fn new(shard: ShardService, budget: Budget, message_bytes_max: usize) -> Self {
        let generated = KvStoreServiceServer::new(shard.clone())
            .max_decoding_message_size(message_bytes_max)
            .max_encoding_message_size(message_bytes_max);
        Self { shard, generated, budget, message_bytes_max }
    }
}

impl NamedService for TileService {
    const NAME: &'static str = <KvStoreServiceServer<ShardService> as NamedService>::NAME;
}

impl Service<Request<Body>> for TileService {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match request.uri().path() {
            PUT_BLOCKS => {
                let this = self.clone();
                Box::pin(async move { Ok(respond(this.put_blocks(request).await)) })
            }
            GET_BLOCKS => {
                let this = self.clone();
                Box::pin(async move { Ok(respond(this.get_blocks(request).await)) })
            }
            _ => self.generated.call(request),
        }
    }
}

fn respond(answer: Result<OutgoingBody, Error>) -> Response<Body> {
    match answer {
        Ok(body) => {
            let mut response = Response::new(Body::new(body));
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            response
        }
        Err(error) => Status::from(error).into_http(),
    }
}

impl TileService {
    /// A call that begins: its context, its messages, and its connection.
    fn enter(&self, request: Request<Body>) -> Result<(Hop, Messages, Connection), Error> {
        let (mut parts, body) = request.into_parts();
        let connection = parts.extensions.remove::<Connection>().unwrap_or_default();
        let metadata = MetadataMap::from_headers(parts.headers);
        let messages = Messages::new(body, self.message_bytes_max);
        let lane = if connection.link.is_some() { Lane::Shm } else { Lane::Grpc };
        Ok((self.shard.desk.enter_with(&metadata)?.over(lane), messages, connection))
    }

    async fn put_blocks(&self, request: Request<Body>) -> Result<OutgoingBody, Error> {
        let (hop, mut messages, connection) = self.enter(request)?;
        let mut start = first(&hop, &mut messages).await?;
        let wanted = start.connection.take();
        let (identity, shape) = put_start(start)?;
        let reserved = Arc::new(self.budget.reserve(identity.namespace, &connection.tile_streams)?);
        if let Some(wanted) = wanted {
            let lease = self.lease(&wanted).map_err(|error| error.within("start"))?;
            return streamed::put_blocks(
                &self.shard,
                hop.over(Lane::Tcp),
                (identity, shape),
                lease,
                messages,
                reserved,
            )
            .await;
        }
        let (sender, received) = mpsc::channel(pump::QUEUE);
        let (link, held) = (connection.link, Arc::clone(&reserved));
        let incoming = messages
            .decoded(tiles::tile_request)
            .then(move |message| charged(Arc::clone(&held), link.clone(), message));
        let pump = pump::pump(Box::pin(incoming), sender, None, |tile| Ok(Step::Forward(tile)));
        let context = hop.context.clone();
        let call = self.shard.shard.put_blocks(&context, identity, shape, received);
        let acks: BoxStream<PutAck> = pump::converse(hop, pump, call).await?;
        Ok(OutgoingBody::response(acks.map(move |ack| {
            let _reserved = &reserved;
            let ack = v1::PutBlocksResponse::from(ack?);
            Ok::<_, Status>(Outgoing::Encoded(tiles::encoded(&ack)))
        })))
    }

    async fn get_blocks(&self, request: Request<Body>) -> Result<OutgoingBody, Error> {
        let (hop, mut messages, connection) = self.enter(request)?;
        let message = within(&hop.context, async {
            let message = messages.next().await.and_then(|message| message.map(tiles::decoded).transpose());
            message.map_err(|status| from_request(&status))
        });
        let mut message: v1::GetBlocksRequest =
            message.await?.ok_or_else(|| Error::invalid("message", "is missing: the call carries one"))?;
        let wanted = message.connection.take();
        let heads = message.head_range()?;
        let get = GetBlocks::try_from(message)?;
        let reserved = Arc::new(self.budget.reserve(get.identity.namespace, &connection.tile_streams)?);
        if let Some(wanted) = wanted {
            if heads.is_some() {
                return Err(Error::invalid("connection", "is set, but parts of tiles come as messages"));
            }
            let lease = self.lease(&wanted)?;
            return streamed::get_blocks(&self.shard, hop.over(Lane::Tcp), get, lease, reserved).await;
        }
        let context = hop.context.clone();
        let answers = read(&self.shard, hop, &context, get, heads).await?;
        let lender = connection.link.map(|link| Arc::new(link.lender()));
        Ok(OutgoingBody::response(answers.then(move |answer| {
            let _reserved = &reserved;
            outgoing(lender.clone(), answer)
        })))
    }
}

impl TileService {
    /// The tile connection that a call names.
    fn lease(&self, wanted: &v1::TileConnection) -> Result<Lease, Error> {
        let offered = self.shard.door.as_ref();
        let door = offered
            .ok_or_else(|| Error::invalid("connection", "is set, there are no tile connections here"))?;
        door.lease(wanted)
    }
}

/// Whole tiles, or some heads of them.
pub(super) async fn read(
    service: &ShardService,
    hop: Hop,
    context: &CallContext,
    get: GetBlocks,
    heads: Option<Range<u32>>,
) -> Result<BoxStream<Option<TileMessage>>, Error> {
    match heads {
        None => hop.stream(service.shard.get_blocks(context, get)).await,
        Some(heads) => hop.stream(service.shard.get_heads(context, get, heads)).await,
    }
}

/// A tile for the service, which verifies it, once its stream may have it under way.
async fn charged(
    reserved: Arc<Reservation>,
    link: Option<Arc<Link>>,
    message: Result<TileRequest, Status>,
) -> Result<TileMessage, Status> {
    let tile = match message? {
        TileRequest::Tile(tile) => tile,
        TileRequest::Other(v1::PutBlocksRequest { part: Some(Part::Tile(tile)) }) => {
            let tile = shm::receive(link.as_ref(), tile);
            tiles::whole(tile.map_err(|fault| Error::from(fault.within("tile")))?)?
        }
        TileRequest::Other(v1::PutBlocksRequest { part: Some(Part::Start(_)) }) => {
            return Err(pump::start_repeated().into());
        }
        TileRequest::Other(v1::PutBlocksRequest { part: None }) => {
            return Err(Error::invalid("part", "is not set").into());
        }
    };
    Ok(reserved.charge(tile).await)
}

/// The parameters, which the first message carries.
async fn first(hop: &Hop, messages: &mut Messages) -> Result<v1::PutBlocksStart, Error> {
    let message = within(&hop.context, async {
        let message = messages.next().await.and_then(|message| message.map(tiles::tile_request).transpose());
        message.map_err(|status| from_request(&status))
    });
    match message.await? {
        Some(TileRequest::Other(v1::PutBlocksRequest { part: Some(Part::Start(start)) })) => Ok(start),
        _ => Err(pump::start_missing()),
    }
}

/// A tile in shared memory where there is some, on the connection otherwise.
async fn outgoing(
    lender: Option<Arc<Lender>>,
    answer: Result<Option<TileMessage>, Error>,
) -> Result<Outgoing, Status> {
    let Some(tile) = answer? else {
        return Ok(Outgoing::Encoded(tiles::encoded(&v1::GetBlocksResponse::from(None))));
    };
    let placed = match &lender {
        Some(lender) => lender.place(&tile).await,
        None => None,
    };
    Ok(match placed {
        Some(wire) => {
            let message = v1::GetBlocksResponse { tile: Some(wire), missing: false };
            Outgoing::Encoded(tiles::encoded(&message))
        }
        None => Outgoing::Got(tile),
    })
}
