//! `KvStoreService` with the two methods that move tiles served by our own codec, the others by the generated one.

use std::{
    convert::Infallible,
    future::Future,
    ops::Range,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, StreamExt, stream};
use http::{HeaderValue, Request, Response, header};
use longshore_proto::{
    types::{GetBlocks, Identity, NcclLease, PutAck, TileMessage, WireTileShape},
    v1::{self, kv_store_service_server::KvStoreServiceServer, put_blocks_request::Part},
};
use tokio::sync::mpsc;
use tonic::{Status, body::Body, metadata::MetadataMap, server::NamedService};
use tower::Service;

use super::{
    ServerOptions,
    budget::{Budget, Reservation, Room, Travel},
    exchanged,
    pump::{self, Step},
    refusal::from_request,
    shard::{ShardService, put_start},
    streamed,
    unread::Keeps,
};
use crate::{
    BoxStream, CallContext, Code, Error, Lane, TcpPatience,
    lane::{Hop, within},
    nccl::Held,
    shm::{self, Connection, Lender, Link},
    tcp::Lease,
    tiles::{self, GET_BLOCKS, Messages, Outgoing, OutgoingBody, PUT_BLOCKS, TileRequest},
};

/// Most bytes of the message that begins a store stream: there is no room for more before it says whose it is.
const START_BYTES_MAX: usize = 64 << 10;

/// Serves a shard.
#[derive(Debug, Clone)]
pub(super) struct TileService {
    shard: ShardService,
    generated: KvStoreServiceServer<ShardService>,
    budget: Budget,
    message_bytes_max: usize,
    patience: TcpPatience,
}

impl TileService {
    pub(super) fn new(shard: ShardService, budget: Budget, options: &ServerOptions) -> Self {
        let (message_bytes_max, patience) = (options.message_bytes_max, options.tcp_patience);
        let generated = KvStoreServiceServer::new(shard.clone())
            .max_decoding_message_size(message_bytes_max)
            .max_encoding_message_size(message_bytes_max);
        Self { shard, generated, budget, message_bytes_max, patience }
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
        Ok(mut body) => {
            let keeps = body.take_kept_while_sent();
            let mut response = Response::new(Body::new(body));
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            if let Some(keeps) = keeps {
                response.extensions_mut().insert(Keeps(keeps));
            }
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
        let (wanted, epoch) = (start.connection.take(), start.nccl.take());
        let (identity, shape) = put_start(start)?;
        one_way(wanted.as_ref(), epoch.as_ref()).map_err(|error| error.within("start"))?;
        let travel = if wanted.is_some() { Travel::InFrames } else { Travel::InMessages };
        let reserved = Arc::new(self.budget.reserve(identity.namespace, &connection.peer, travel)?);
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
        if let Some(epoch) = epoch {
            let held = self.epoch(&hop, epoch).await.map_err(|error| error.within("start"))?;
            let (hop, incoming) = (hop.over(Lane::Nccl), (messages, self.message_bytes_max, self.patience));
            return exchanged::put_blocks(&self.shard, hop, (identity, shape), held, incoming, reserved)
                .await;
        }
        let (link, held) = (connection.link, Arc::clone(&reserved));
        let incoming = Incoming { messages, reserved: held, link, patience: self.patience };
        store(&self.shard, hop, (identity, shape), incoming.tiles(), reserved).await
    }

    async fn get_blocks(&self, request: Request<Body>) -> Result<OutgoingBody, Error> {
        let (hop, mut messages, connection) = self.enter(request)?;
        let message = within(&hop.context, async {
            let message = messages.next().await.and_then(|message| message.map(tiles::decoded).transpose());
            message.map_err(|status| from_request(&status))
        });
        let mut message: v1::GetBlocksRequest =
            message.await?.ok_or_else(|| Error::invalid("message", "is missing: the call carries one"))?;
        let (wanted, epoch) = (message.connection.take(), message.nccl.take());
        one_way(wanted.as_ref(), epoch.as_ref())?;
        let heads = message.head_range()?;
        let get = GetBlocks::try_from(message)?;
        let reserved = self.budget.reserve(get.identity.namespace, &connection.peer, Travel::Out)?;
        let reserved = Arc::new(reserved);
        if let Some(wanted) = wanted {
            if heads.is_some() {
                return Err(Error::invalid("connection", "is set, but parts of tiles come as messages"));
            }
            let lease = self.lease(&wanted)?;
            return streamed::get_blocks(&self.shard, hop.over(Lane::Tcp), get, lease, reserved).await;
        }
        if let Some(epoch) = epoch {
            if heads.is_some() {
                return Err(Error::invalid("nccl", "is set, but parts of tiles come as messages"));
            }
            let held = self.epoch(&hop, epoch).await?;
            return exchanged::get_blocks(&self.shard, hop.over(Lane::Nccl), get, held, reserved).await;
        }
        let context = hop.context.clone();
        let answers = read(&self.shard, hop, &context, get, heads).await?;
        let lender = connection.link.map(|link| Arc::new(link.lender()));
        let answers = answers.then(move |answer| outgoing(lender.clone(), answer));
        Ok(OutgoingBody::response(answers).keeping(reserved))
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

    /// The epoch that a call names.
    async fn epoch(&self, hop: &Hop, wanted: v1::NcclLease) -> Result<Held, Error> {
        let offered = self.shard.convener.as_ref();
        let convener = offered.ok_or_else(|| Error::invalid("nccl", "is set, there is no such lane here"))?;
        let wanted = NcclLease::try_from(wanted).map_err(|fault| fault.within("nccl"))?;
        within(&hop.context, convener.lease(wanted)).await
    }
}

/// Tiles of a call go one way.
fn one_way(connection: Option<&v1::TileConnection>, epoch: Option<&v1::NcclLease>) -> Result<(), Error> {
    match (connection, epoch) {
        (Some(_), Some(_)) => Err(Error::invalid("nccl", "is set beside `connection`")),
        _ => Ok(()),
    }
}

/// Gives the shard the tiles that come; the body has its acknowledgements, and `reserved` until they are sent.
pub(super) async fn store(
    service: &ShardService,
    hop: Hop,
    (identity, shape): (Identity, WireTileShape),
    tiles: impl Stream<Item = Result<TileMessage, Status>> + Send + 'static,
    reserved: Arc<Reservation>,
) -> Result<OutgoingBody, Error> {
    let (sender, received) = mpsc::channel(pump::QUEUE);
    let pump = pump::pump(Box::pin(tiles), sender, None, |tile| Ok(Step::Forward(tile)));
    let context = hop.context.clone();
    let call = service.shard.put_blocks(&context, identity, shape, received);
    let acks: BoxStream<PutAck> = pump::converse(hop, pump, call).await?;
    let acks = acks.map(|ack| {
        let ack = v1::PutBlocksResponse::from(ack?);
        Ok::<_, Status>(Outgoing::Encoded(tiles::encoded(&ack)))
    });
    Ok(OutgoingBody::response(acks).keeping(reserved))
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

/// What a store stream reads whose tiles come as messages.
struct Incoming {
    messages: Messages,
    reserved: Arc<Reservation>,
    link: Option<Arc<Link>>,
    patience: TcpPatience,
}

impl Incoming {
    /// Until the end or the first error.
    fn tiles(self) -> impl Stream<Item = Result<TileMessage, Status>> + Send + 'static {
        stream::unfold(Some(self), |incoming| async move {
            let mut incoming = incoming?;
            match incoming.next().await.transpose()? {
                Ok(tile) => Some((Ok(tile), Some(incoming))),
                Err(status) => Some((Err(status), None)),
            }
        })
    }

    /// A tile for the service, which verifies it.
    async fn next(&mut self) -> Result<Option<TileMessage>, Status> {
        let next = next_message(&mut self.messages, &self.reserved, self.patience).await?;
        let Some((held, message)) = next else { return Ok(None) };
        let mut tile = incoming_tile(message, self.link.as_ref())?;
        tile.data = tile.data.holding(held);
        Ok(Some(tile))
    }
}

/// The next message of a store stream. There must be room for it before it is read: until then it waits in the windows of its connection.
/// One that has room has to come, so that nobody keeps room for what he never sends.
pub(super) async fn next_message(
    messages: &mut Messages,
    reserved: &Reservation,
    patience: TcpPatience,
) -> Result<Option<(Room, TileRequest)>, Status> {
    let Some(bytes) = messages.begin().await? else { return Ok(None) };
    let held = reserved.room(bytes).await?;
    let whole = patience.of_message(bytes);
    let message = tokio::time::timeout(whole, messages.next()).await.map_err(|_| late(whole))??;
    message.map(|message| Ok((held, tiles::tile_request(message)?))).transpose()
}

fn late(whole: Duration) -> Error {
    let text = format!("a message was not whole after {} ms; hint: send it at once", whole.as_millis());
    Error::new(Code::Unavailable, text).with_field("message")
}

/// The tile of a message, or what says where it is.
pub(super) fn tile_part(message: TileRequest) -> Result<Result<TileMessage, v1::Tile>, Error> {
    match message {
        TileRequest::Tile(tile) => Ok(Ok(tile)),
        TileRequest::Other(v1::PutBlocksRequest { part: Some(Part::Tile(wire)) }) => Ok(Err(wire)),
        TileRequest::Other(v1::PutBlocksRequest { part: Some(Part::Start(_)) }) => {
            Err(pump::start_repeated())
        }
        TileRequest::Other(v1::PutBlocksRequest { part: None }) => Err(Error::invalid("part", "is not set")),
    }
}

fn incoming_tile(message: TileRequest, link: Option<&Arc<Link>>) -> Result<TileMessage, Error> {
    match tile_part(message)? {
        Ok(tile) => Ok(tile),
        Err(wire) => tiles::whole(shm::receive(link, wire).map_err(|fault| fault.within("tile"))?),
    }
}

/// The parameters, which the first message carries. Nothing is large that begins with them.
async fn first(hop: &Hop, messages: &mut Messages) -> Result<v1::PutBlocksStart, Error> {
    let message = within(&hop.context, async {
        if messages.begin().await.map_err(|status| from_request(&status))? > Some(START_BYTES_MAX) {
            return Err(pump::start_missing());
        }
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
