//! A server of the `tcp` lane whose frames are whatever a test wants, over the generated service: no code of the lane's own.

use std::{
    future::{pending, ready},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{Stream, StreamExt, stream};
use longshore_proto::v1::{
    self,
    kv_store_service_server::{KvStoreService, KvStoreServiceServer},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinSet,
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Request, Response, Status, Streaming, metadata::MetadataMap, transport::Server};

use super::raw::MAGIC;

/// What becomes of a call.
#[derive(Debug, Clone)]
pub(crate) enum Then {
    /// Its connection is closed; the call says nothing.
    Close,
    /// Neither says anything any more.
    Silence,
    /// The call ends well, and the connection is there.
    End,
    /// The same, and the server says that it keeps the connection.
    Kept,
    /// The call has a message, which it must not.
    Message,
    /// The connection is closed and the call ends with this.
    Refuse(Status),
}

/// What a call gets.
#[derive(Debug, Clone)]
pub(crate) struct Lie {
    /// Written to the connection of a read stream.
    pub(crate) bytes: Vec<u8>,
    /// So many of them at a time, with a pause after each.
    pub(crate) step: (usize, Duration),
    /// Bytes of a store stream that are read.
    pub(crate) reads: usize,
    pub(crate) then: Then,
}

impl Lie {
    pub(crate) fn new(bytes: Vec<u8>, then: Then) -> Self {
        Self { bytes, step: (1 << 20, Duration::ZERO), reads: 0, then }
    }
}

/// How a connection is offered and confirmed.
#[derive(Debug, Clone)]
pub(crate) struct Offer {
    /// Instead of the port that listens.
    pub(crate) port: Option<u32>,
    pub(crate) token: Vec<u8>,
    pub(crate) confirms: Vec<u8>,
    /// What whoever wants to join an epoch of the lane `nccl` is told.
    pub(crate) invites: Option<v1::JoinNcclEpochResponse>,
    /// Who convenes epochs instead, and lies in attend streams.
    pub(crate) attends: Option<Arc<dyn Attends>>,
}

/// Lies in attend streams.
pub(crate) trait Attends: Send + Sync + std::fmt::Debug {
    /// To the next epoch, which it joins.
    fn invite(&self) -> v1::JoinNcclEpochResponse;
    /// What a query gets.
    fn answer(&self, query: v1::AttendRequest) -> v1::AttendResponse;
}

impl Default for Offer {
    fn default() -> Self {
        Self { port: None, token: vec![7; 16], confirms: MAGIC.to_vec(), invites: None, attends: None }
    }
}

/// The server, until it is dropped.
pub(crate) struct Liar {
    pub(crate) address: String,
    /// Connections that were offered.
    pub(crate) offers: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl Liar {
    pub(crate) async fn new(lie: Lie) -> Self {
        Self::offering(lie, Offer::default()).await
    }

    pub(crate) async fn offering(lie: Lie, offer: Offer) -> Self {
        let (calls, tiles) = (
            TcpListener::bind("127.0.0.1:0").await.unwrap(),
            TcpListener::bind("127.0.0.1:0").await.unwrap(),
        );
        let address = format!("http://{}", calls.local_addr().unwrap());
        let port = offer.port.unwrap_or_else(|| tiles.local_addr().unwrap().port().into());
        let (sender, sockets) = mpsc::channel(16);
        let offers = Arc::<AtomicUsize>::default();
        let sockets = Arc::new(tokio::sync::Mutex::new(sockets));
        let token = offer.token.clone();
        let (kept, invites, attends) = (Arc::default(), offer.invites.clone(), offer.attends.clone());
        let told = Told { lie, port, token, offers: Arc::clone(&offers), sockets, kept, invites, attends };
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let server = Server::builder().add_service(KvStoreServiceServer::new(told));
            server.serve_with_incoming(TcpListenerStream::new(calls)).await.unwrap();
        });
        tasks.spawn(async move {
            loop {
                let (mut socket, _) = tiles.accept().await.unwrap();
                if socket.read_exact(&mut [0; 32]).await.is_ok() {
                    socket.write_all(&offer.confirms).await.ok();
                    sender.send(socket).await.ok();
                }
            }
        });
        Self { address, offers, _tasks: tasks }
    }
}

struct Told {
    lie: Lie,
    port: u32,
    token: Vec<u8>,
    offers: Arc<AtomicUsize>,
    sockets: Arc<tokio::sync::Mutex<mpsc::Receiver<TcpStream>>>,
    kept: Arc<Mutex<Vec<TcpStream>>>,
    invites: Option<v1::JoinNcclEpochResponse>,
    attends: Option<Arc<dyn Attends>>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Told {
    async fn socket(&self, wanted: Option<v1::TileConnection>) -> Result<TcpStream, Status> {
        wanted.ok_or_else(|| Status::invalid_argument("over tile connections only"))?;
        self.sockets.lock().await.recv().await.ok_or_else(|| Status::internal("nobody listens"))
    }

    /// Tells the lie, then ends as it says; `message` is what a call must not have.
    fn tell<T: Send + 'static>(&self, mut socket: TcpStream, message: T) -> Answers<T> {
        let (lie, kept) = (self.lie.clone(), Arc::clone(&self.kept));
        let telling = async move {
            for part in lie.bytes.chunks(lie.step.0) {
                if socket.write_all(part).await.is_err() {
                    break;
                }
                tokio::time::sleep(lie.step.1).await;
            }
            if socket.read_exact(&mut vec![0; lie.reads]).await.is_err() {
                return None;
            }
            match lie.then {
                Then::Close => {
                    drop(socket);
                    pending().await
                }
                Then::Silence => {
                    let _open = socket;
                    pending().await
                }
                Then::End => {
                    kept.lock().unwrap().push(socket);
                    None
                }
                Then::Kept => {
                    kept.lock().unwrap().push(socket);
                    let mut trailers = MetadataMap::new();
                    trailers.insert("longshore-tile-connection", "kept".parse().unwrap());
                    Some(Err(Status::with_metadata(Code::Ok, "", trailers)))
                }
                Then::Message => {
                    kept.lock().unwrap().push(socket);
                    Some(Ok(message))
                }
                Then::Refuse(status) => Some(Err(status)),
            }
        };
        Box::pin(stream::once(telling).filter_map(ready))
    }
}

fn none<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("the liar has tiles only"))
}

#[tonic::async_trait]
impl KvStoreService for Told {
    type PutBlocksStream = Answers<v1::PutBlocksResponse>;
    type GetBlocksStream = Answers<v1::GetBlocksResponse>;
    type GetSummariesStream = Answers<v1::GetSummariesResponse>;
    type AttendStream = Answers<v1::AttendResponse>;
    type WatchInventoryStream = Answers<v1::WatchInventoryResponse>;

    async fn open_tile_connection(
        &self,
        _: Request<v1::OpenTileConnectionRequest>,
    ) -> Result<Response<v1::OpenTileConnectionResponse>, Status> {
        let id = self.offers.fetch_add(1, Ordering::SeqCst) as u64 + 1;
        let token = self.token.clone().into();
        Ok(Response::new(v1::OpenTileConnectionResponse { port: self.port, id, token }))
    }

    async fn join_nccl_epoch(
        &self,
        _: Request<v1::JoinNcclEpochRequest>,
    ) -> Result<Response<v1::JoinNcclEpochResponse>, Status> {
        self.offers.fetch_add(1, Ordering::SeqCst);
        if let Some(attends) = &self.attends {
            return Ok(Response::new(attends.invite()));
        }
        self.invites.clone().map_or_else(none, |invites| Ok(Response::new(invites)))
    }

    async fn end_nccl_epoch(
        &self,
        _: Request<v1::EndNcclEpochRequest>,
    ) -> Result<Response<v1::EndNcclEpochResponse>, Status> {
        none()
    }

    async fn put_blocks(
        &self,
        request: Request<Streaming<v1::PutBlocksRequest>>,
    ) -> Result<Response<Self::PutBlocksStream>, Status> {
        let mut messages = request.into_inner();
        let start = match messages.message().await?.and_then(|message| message.part) {
            Some(v1::put_blocks_request::Part::Start(start)) => start,
            _ => return Err(Status::invalid_argument("no start")),
        };
        let socket = self.socket(start.connection).await?;
        let answers = self.tell(socket, v1::PutBlocksResponse::default());
        // The client's side of the call is open for as long as its own.
        Ok(Response::new(Box::pin(answers.map(move |answer| {
            let _open = &messages;
            answer
        }))))
    }

    async fn get_blocks(
        &self,
        request: Request<v1::GetBlocksRequest>,
    ) -> Result<Response<Self::GetBlocksStream>, Status> {
        let socket = self.socket(request.into_inner().connection).await?;
        let missing = v1::GetBlocksResponse { missing: true, ..v1::GetBlocksResponse::default() };
        Ok(Response::new(self.tell(socket, missing)))
    }

    async fn lookup(&self, _: Request<v1::LookupRequest>) -> Result<Response<v1::LookupResponse>, Status> {
        none()
    }

    async fn open_view(
        &self,
        _: Request<v1::OpenViewRequest>,
    ) -> Result<Response<v1::OpenViewResponse>, Status> {
        none()
    }

    async fn get_summaries(
        &self,
        _: Request<v1::GetSummariesRequest>,
    ) -> Result<Response<Self::GetSummariesStream>, Status> {
        none()
    }

    async fn attend(
        &self,
        request: Request<Streaming<v1::AttendRequest>>,
    ) -> Result<Response<Self::AttendStream>, Status> {
        let Some(attends) = self.attends.clone() else { return none() };
        let answers = request.into_inner().map(move |query| Ok(attends.answer(query?)));
        Ok(Response::new(Box::pin(answers)))
    }

    async fn close_view(
        &self,
        _: Request<v1::CloseViewRequest>,
    ) -> Result<Response<v1::CloseViewResponse>, Status> {
        none()
    }

    async fn stats(&self, _: Request<v1::StatsRequest>) -> Result<Response<v1::StatsResponse>, Status> {
        none()
    }

    async fn watch_inventory(
        &self,
        _: Request<v1::WatchInventoryRequest>,
    ) -> Result<Response<Self::WatchInventoryStream>, Status> {
        none()
    }

    async fn list_blocks(
        &self,
        _: Request<v1::ListBlocksRequest>,
    ) -> Result<Response<v1::ListBlocksResponse>, Status> {
        none()
    }

    async fn start_scrub(
        &self,
        _: Request<v1::StartScrubRequest>,
    ) -> Result<Response<v1::StartScrubResponse>, Status> {
        none()
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        none()
    }
}
