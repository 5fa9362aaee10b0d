//! The client's side of the two methods that move tiles, over several connections by turns.

use std::{
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use futures::{Stream, StreamExt};
use http::{HeaderValue, Method, Request, Response, Version, header};
use longshore_proto::{
    types::{Identity, PutAck, TileMemory, TileMessage, WireTileShape},
    v1::{self, kv_store_service_client::KvStoreServiceClient, put_blocks_request::Part},
};
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, body::Body, transport::Channel};
use tower::Service;

use super::{
    call::{self, fault},
    dial::{Dial, Lease},
    epochs::{self, Epochs},
    over::until,
    shard::generated,
};
use crate::{
    BoxStream, CallContext, Code, Error,
    lane::{self, Hop},
    nccl,
    shm::{self, Lender, Link},
    tcp,
    tiles::{self, GET_BLOCKS, Messages, Outgoing, OutgoingBody, PUT_BLOCKS, Rope},
};

/// Why a call did not begin.
#[derive(Debug)]
pub(super) enum Failure {
    /// No answer came: the connection broke, the deadline passed, or the caller left.
    Unanswered(Error),
    /// The peer refused it.
    Refused(Error),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Unanswered(error) | Failure::Refused(error) => error,
        }
    }
}

impl Failure {
    /// Whether the tile connection or the epoch of the call is to blame, or the way to the peer: without them the call may do better.
    fn is_of_way(&self) -> bool {
        match self {
            Self::Unanswered(error) => error.code == Code::Unavailable,
            Self::Refused(error) => tcp::is_of_connection(error) || nccl::is_of_epoch(error),
        }
    }
}

/// Connections that carry tiles to one peer.
#[derive(Debug)]
pub(super) struct TileChannels {
    channels: Vec<Channel>,
    link: Option<Arc<Link>>,
    streamed: Option<Streamed>,
    exchanged: Option<Exchanged>,
    turn: AtomicUsize,
    message_bytes_max: usize,
}

/// The `tcp` lane to the same peer.
#[derive(Debug)]
pub(super) struct Streamed {
    pub(super) dial: Arc<Dial>,
    /// Nothing else may carry tiles.
    pub(super) alone: bool,
}

/// The `nccl` lane to the same peer.
#[derive(Debug)]
pub(super) struct Exchanged {
    pub(super) epochs: Arc<Epochs>,
    /// Nothing else may carry tiles; attend streams begin in an epoch.
    pub(super) alone: bool,
}

/// Whether a lane that failed to begin leaves the call to the next one.
fn leaves_it(error: &Error, alone: bool) -> bool {
    !alone && !matches!(error.code, Code::Cancelled | Code::DeadlineExceeded)
}

impl TileChannels {
    /// Takes turns among `channels`, of which there is at least one.
    pub(super) fn new(channels: Vec<Channel>, message_bytes_max: usize) -> Self {
        assert!(!channels.is_empty(), "tiles need a connection");
        let turn = AtomicUsize::new(0);
        Self { channels, link: None, streamed: None, exchanged: None, turn, message_bytes_max }
    }

    /// One connection with shared memory.
    pub(super) fn with_link(channel: Channel, link: Arc<Link>, message_bytes_max: usize) -> Self {
        Self { link: Some(link), ..Self::new(vec![channel], message_bytes_max) }
    }

    /// The same, with tiles on connections of their own where that works.
    pub(super) fn with_dial(self, streamed: Streamed) -> Self {
        Self { streamed: Some(streamed), ..self }
    }

    /// The same, with bodies of tiles from GPU to GPU where that works.
    pub(super) fn with_epochs(self, exchanged: Exchanged) -> Self {
        Self { exchanged: Some(exchanged), ..self }
    }

    /// An epoch for a call; `None` where its tiles have to travel another way.
    async fn epoch(&self, ctx: &CallContext) -> Result<Option<epochs::Lease>, Error> {
        let Some(Exchanged { epochs, alone }) = &self.exchanged else { return Ok(None) };
        // Joining is rare and its future large.
        match lane::within(ctx, Box::pin(epochs.lease(ctx, *alone))).await {
            Ok(lease) => Ok(Some(lease)),
            Err(error) if leaves_it(&error, *alone) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A tile connection for a call; `None` where its tiles have to travel over gRPC.
    async fn lease(&self, ctx: &CallContext) -> Result<Option<Lease>, Error> {
        let Some(Streamed { dial, alone }) = &self.streamed else { return Ok(None) };
        let lease = lane::within(ctx, dial.lease(ctx)).await;
        match lease {
            Ok(lease) => Ok(Some(lease)),
            Err(error) if leaves_it(&error, *alone) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The memory that it shares.
    pub(super) fn link(&self) -> Option<&Arc<Link>> {
        self.link.as_ref()
    }

    /// The generated client over one of them.
    pub(super) fn generated(&self) -> KvStoreServiceClient<Channel> {
        generated(self.channel(), self.message_bytes_max)
    }

    fn channel(&self) -> Channel {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        self.channels[turn % self.channels.len()].clone()
    }

    /// A store stream.
    pub(super) async fn put_blocks(
        &self,
        ctx: &CallContext,
        identity: Identity,
        shape: WireTileShape,
        tiles: mpsc::Receiver<TileMessage>,
    ) -> Result<BoxStream<PutAck>, Error> {
        let mut start = v1::PutBlocksStart {
            identity: Some(identity.into()),
            shape: Some(shape.into()),
            connection: None,
            nccl: None,
        };
        if let Some(lease) = self.epoch(ctx).await? {
            start.nccl = Some(lease.wire());
            return Ok(self.put_exchanged(Hop::new(ctx), start, tiles, lease).await?);
        }
        if let Some(lease) = self.lease(ctx).await? {
            start.connection = Some(lease.wire());
            return Ok(self.put_streamed(Hop::new(ctx), start, tiles, lease).await?);
        }
        let hop = Hop::new(ctx);
        let start = tiles::encoded(&v1::PutBlocksRequest { part: Some(Part::Start(start)) });
        let lender = self.link.as_ref().map(|link| Arc::new(link.lender()));
        let sending = lender.clone();
        let tiles = ReceiverStream::new(tiles).then(move |tile| outgoing(sending.clone(), tile));
        let messages = futures::stream::iter([Outgoing::Encoded(start)]).chain(tiles).map(Ok);
        let messages = until(hop.context.cancel.clone(), messages);
        let response = self.call(&hop.context, PUT_BLOCKS, OutgoingBody::request(messages)).await?;
        self.answers(hop, response, move |message| {
            // What the call lends comes back when the call is over.
            let _held = &lender;
            acknowledgement(message)
        })
    }

    /// A read stream, into `memory` where the lane can read there.
    pub(super) async fn get_blocks(
        &self,
        ctx: &CallContext,
        get: v1::GetBlocksRequest,
        memory: Option<Arc<dyn TileMemory>>,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        // Parts of tiles come as messages: nobody keeps them as they come.
        let is_whole = get.heads == 0;
        if is_whole && let Some(lease) = self.epoch(ctx).await? {
            let begun = self.get_exchanged(Hop::new(ctx), get.clone(), memory.clone(), lease).await;
            match begun {
                // The shard forgot the epoch, or it broke: nothing came yet.
                Err(failure) if failure.is_of_way() && !self.is_nccl_alone() => {}
                begun => return Ok(begun?),
            }
        }
        if is_whole && let Some(lease) = self.lease(ctx).await? {
            let begun = self.get_streamed(Hop::new(ctx), get.clone(), memory, lease).await;
            match begun {
                // The server forgot the connection, or it broke: nothing came yet.
                Err(failure) if failure.is_of_way() && !self.is_tcp_alone() => {}
                begun => return Ok(begun?),
            }
        }
        let hop = Hop::new(ctx);
        let response = self.call(&hop.context, GET_BLOCKS, OutgoingBody::request(single(&get))).await?;
        let link = self.link.clone();
        self.answers(hop, response, move |message| match tiles::tile_answer(message) {
            Ok(Ok(tile)) => Ok(Some(tile)),
            Ok(Err(v1::GetBlocksResponse { tile: Some(tile), missing: false })) => {
                shm::receive(link.as_ref(), tile).map(Some).map_err(|fault| Error::bad_answer(&fault))
            }
            Ok(Err(other)) => Option::try_from(other).map_err(|fault| Error::bad_answer(&fault)),
            Err(status) => Err(undecodable(&status)),
        })
    }

    fn is_nccl_alone(&self) -> bool {
        self.exchanged.as_ref().is_some_and(|exchanged| exchanged.alone)
    }

    fn is_tcp_alone(&self) -> bool {
        self.streamed.as_ref().is_some_and(|streamed| streamed.alone)
    }

    pub(super) fn message_bytes_max(&self) -> usize {
        self.message_bytes_max
    }

    pub(super) async fn call(
        &self,
        context: &CallContext,
        path: &'static str,
        body: OutgoingBody,
    ) -> Result<Response<Body>, Failure> {
        let request = request(context, path, body).map_err(Failure::Unanswered)?;
        let mut channel = self.channel();
        let call = async {
            let ready = poll_fn(|cx| channel.poll_ready(cx)).await;
            let response = match ready {
                Ok(()) => channel.call(request).await,
                Err(error) => Err(error),
            };
            response.map_err(|error| fault(context, &Status::from_error(error.into())))
        };
        let response = lane::within(context, call).await.map_err(Failure::Unanswered)?;
        // A call that failed at once has its status among the headers.
        match Status::from_header_map(response.headers()) {
            Some(status) if status.code() != tonic::Code::Ok => {
                Err(Failure::Refused(fault(context, &status)))
            }
            _ if response.status() != http::StatusCode::OK => {
                let problem = format!("the peer answered with HTTP status {}", response.status().as_u16());
                Err(Failure::Unanswered(fault(context, &Status::unavailable(problem))))
            }
            _ => Ok(response),
        }
    }

    /// The messages of a response, then its status.
    fn answers<T: Send + 'static>(
        &self,
        hop: Hop,
        response: Response<Body>,
        convert: impl Fn(Rope) -> Result<T, Error> + Send + 'static,
    ) -> Result<BoxStream<T>, Error> {
        let messages = Messages::of_response(response, self.message_bytes_max);
        let context = hop.context.clone();
        Ok(hop.bound(Box::pin(answers(context, messages, convert))))
    }
}

fn answers<T: Send + 'static>(
    context: CallContext,
    messages: Messages,
    convert: impl Fn(Rope) -> Result<T, Error> + Send + 'static,
) -> impl Stream<Item = Result<T, Error>> + Send + 'static {
    futures::stream::unfold(Some((context, messages, convert)), |state| async move {
        let (context, mut messages, convert) = state?;
        let item = match messages.next().await {
            Ok(Some(message)) => convert(message),
            Ok(None) => match messages.trailers().map(Status::from_header_map) {
                Some(Some(status)) if status.code() == tonic::Code::Ok => return None,
                Some(Some(status)) => Err(fault(&context, &status)),
                _ => Err(fault(&context, &Status::unavailable("the answer ended without a status"))),
            },
            Err(status) => Err(fault(&context, &status)),
        };
        let rest = item.is_ok().then_some((context, messages, convert));
        Some((item, rest))
    })
}

/// A tile in shared memory where there is some, on the connection otherwise.
async fn outgoing(lender: Option<Arc<Lender>>, tile: TileMessage) -> Outgoing {
    let Some(lender) = lender else { return Outgoing::Put(tile) };
    match lender.place(&tile).await {
        Some(wire) => {
            Outgoing::Encoded(tiles::encoded(&v1::PutBlocksRequest { part: Some(Part::Tile(wire)) }))
        }
        None => Outgoing::Put(tile),
    }
}

pub(super) fn decoded<M: Message + Default>(message: Rope) -> Result<M, Error> {
    tiles::decoded(message).map_err(|status| undecodable(&status))
}

/// A message of a store stream's answer.
pub(super) fn acknowledgement(message: Rope) -> Result<PutAck, Error> {
    let answer: v1::PutBlocksResponse = decoded(message)?;
    PutAck::try_from(answer).map_err(|fault| Error::bad_answer(&fault))
}

/// What the peer sent is not used.
pub(super) fn undecodable(status: &Status) -> Error {
    Error::new(Code::DataLoss, format!("the answer of the peer makes no sense: {}", status.message()))
}

fn request(context: &CallContext, path: &'static str, body: OutgoingBody) -> Result<Request<Body>, Error> {
    let metadata = call::request(context, ())?.into_parts().0;
    let mut request = Request::new(Body::new(body));
    *request.method_mut() = Method::POST;
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = http::Uri::from_static(path);
    *request.headers_mut() = metadata.into_headers();
    let headers = request.headers_mut();
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    Ok(request)
}

/// The only message of a call.
pub(super) fn single<M: Message>(
    message: &M,
) -> impl Stream<Item = Result<Outgoing, Status>> + Send + 'static + use<M> {
    futures::stream::iter([Ok(Outgoing::Encoded(tiles::encoded(message)))])
}
