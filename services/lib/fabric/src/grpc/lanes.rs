//! Which lane leads to a shard: `shm` where it is a process of the same host that offers it, `grpc` otherwise and whenever `shm` fails.
//! A client over `grpc` moves tiles over the `tcp` lane by itself where that is offered and works (`dial`).

use std::{
    io,
    net::SocketAddr,
    ops::Range,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use http::Uri;
use longshore_proto::types::{
    AttendAnswer, AttendQuery, BlockPage, DrainStats, GetBlocks, GetSummaries, Identity, InventoryNews,
    ListBlocks, Lookup, OpenView, OpenedView, PutAck, ScrubStarted, ShardStats, SummariesMessage, TileMemory,
    TileMessage, WatchInventory, WireTileShape,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
    sync::mpsc,
    time::Instant,
};

use super::{pool::Pool, shard::ShardClient};
use crate::{BoxStream, CallContext, Code, Error, Shard, shm};

/// How long the handshake may take; both sides are on this host.
const HELLO_PATIENCE: Duration = Duration::from_millis(500);
/// How long `grpc` is used after `shm` failed.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// A shard behind an address, over the best lane that works.
#[derive(Debug)]
pub(super) struct LaneShard {
    address: String,
    grpc: Arc<ShardClient>,
    pool: Arc<Pool>,
    shm: Mutex<Shm>,
}

#[derive(Debug, Clone)]
enum Shm {
    Untried,
    Open { client: Arc<ShardClient>, alive: Arc<AtomicBool> },
    Failed { until: Instant },
}

impl LaneShard {
    pub(super) fn new(address: &str, grpc: Arc<ShardClient>, pool: Arc<Pool>) -> Self {
        Self { address: address.to_owned(), grpc, pool, shm: Mutex::new(Shm::Untried) }
    }

    fn state(&self) -> Shm {
        self.shm.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, state: Shm) {
        *self.shm.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// The client over `shm`, connected now if it is time to try; `None` where `grpc` has to do.
    async fn shm(&self) -> Option<Arc<ShardClient>> {
        match self.state() {
            Shm::Open { client, alive } if alive.load(Ordering::Acquire) => return Some(client),
            Shm::Failed { until } if Instant::now() < until => return None,
            _ => {}
        }
        match tokio::time::timeout(HELLO_PATIENCE, connect(&self.address, &self.pool)).await {
            Ok(Ok((client, alive))) => {
                self.set(Shm::Open { client: Arc::clone(&client), alive });
                Some(client)
            }
            failed => {
                if let Ok(Err(error)) = failed {
                    tracing::debug!(%error, address = self.address, "no shm lane");
                }
                self.failed();
                None
            }
        }
    }

    fn failed(&self) {
        self.set(Shm::Failed { until: Instant::now() + RETRY_AFTER });
    }

    /// Whether a call that ended in `error` over `shm` may be made again over `grpc`.
    fn falls_back(&self, error: &Error) -> bool {
        let broken = error.code == Code::Unavailable;
        if broken {
            tracing::warn!(address = self.address, %error, "the shm lane failed: falling back to grpc");
            self.failed();
        }
        broken
    }
}

async fn connect(address: &str, pool: &Pool) -> io::Result<(Arc<ShardClient>, Arc<AtomicBool>)> {
    let no = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, why);
    let uri: Uri = address.parse().map_err(|_| no("the address is no URI"))?;
    let host = uri.host().ok_or_else(|| no("the address has no host"))?.trim_matches(['[', ']']);
    let port = uri.port_u16().ok_or_else(|| no("the address has no port"))?;
    let socket: SocketAddr =
        tokio::net::lookup_host((host, port)).await?.next().ok_or_else(|| no("the host has no address"))?;
    let options = pool.options();
    let (stream, link) = shm::connect(shm::open(socket)?, options.shm_arena_bytes).await?;
    let alive = Arc::new(AtomicBool::new(true));
    let channel = pool.channel_over(Tracked { stream, alive: Arc::clone(&alive) });
    Ok((Arc::new(ShardClient::with_link(channel, link, options.message_bytes_max)), alive))
}

/// A client over `shm` that never falls back.
pub(super) async fn shm_alone(address: &str, pool: &Pool) -> Result<Arc<dyn Shard>, Error> {
    let unavailable = |why: &dyn std::fmt::Display| {
        Error::new(Code::Unavailable, format!("no shm lane to `{address}`: {why}"))
    };
    let connected = tokio::time::timeout(HELLO_PATIENCE, connect(address, pool)).await;
    let (client, _) = connected.map_err(|late| unavailable(&late))?.map_err(|error| unavailable(&error))?;
    Ok(client)
}

#[async_trait]
impl Shard for LaneShard {
    async fn lookup(&self, ctx: &CallContext, lookup: Lookup) -> Result<Vec<bool>, Error> {
        if let Some(shm) = self.shm().await {
            match shm.lookup(ctx, lookup.clone()).await {
                Err(error) if self.falls_back(&error) => {}
                answer => return answer,
            }
        }
        self.grpc.lookup(ctx, lookup).await
    }

    async fn put_blocks(
        &self,
        ctx: &CallContext,
        identity: Identity,
        shape: WireTileShape,
        tiles: mpsc::Receiver<TileMessage>,
    ) -> Result<BoxStream<PutAck>, Error> {
        let Some(shm) = self.shm().await else {
            return self.grpc.put_blocks(ctx, identity, shape, tiles).await;
        };
        // Tiles that the broken lane took are lost, so its caller begins again, over `grpc` then.
        shm.put_blocks(ctx, identity, shape, tiles).await.inspect_err(|error| {
            self.falls_back(error);
        })
    }

    async fn get_blocks(
        &self,
        ctx: &CallContext,
        get: GetBlocks,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        if let Some(shm) = self.shm().await {
            match shm.get_blocks(ctx, get.clone()).await {
                Err(error) if self.falls_back(&error) => {}
                answer => return answer,
            }
        }
        self.grpc.get_blocks(ctx, get).await
    }

    async fn get_blocks_into(
        &self,
        ctx: &CallContext,
        get: GetBlocks,
        memory: Arc<dyn TileMemory>,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        if let Some(shm) = self.shm().await {
            match shm.get_blocks(ctx, get.clone()).await {
                Err(error) if self.falls_back(&error) => {}
                answer => return answer,
            }
        }
        self.grpc.get_blocks_into(ctx, get, memory).await
    }

    async fn get_heads(
        &self,
        ctx: &CallContext,
        get: GetBlocks,
        heads: Range<u32>,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        if let Some(shm) = self.shm().await {
            match shm.get_heads(ctx, get.clone(), heads.clone()).await {
                Err(error) if self.falls_back(&error) => {}
                answer => return answer,
            }
        }
        self.grpc.get_heads(ctx, get, heads).await
    }

    async fn open_view(&self, ctx: &CallContext, open: OpenView) -> Result<OpenedView, Error> {
        if let Some(shm) = self.shm().await {
            let again = open.append_to.is_none();
            match shm.open_view(ctx, open.clone()).await {
                Err(error) if self.falls_back(&error) && again => {}
                answer => return answer,
            }
        }
        self.grpc.open_view(ctx, open).await
    }

    async fn get_summaries(
        &self,
        ctx: &CallContext,
        get: GetSummaries,
    ) -> Result<BoxStream<SummariesMessage>, Error> {
        if let Some(shm) = self.shm().await {
            match shm.get_summaries(ctx, get.clone()).await {
                Err(error) if self.falls_back(&error) => {}
                answer => return answer,
            }
        }
        self.grpc.get_summaries(ctx, get).await
    }

    async fn watch_inventory(
        &self,
        ctx: &CallContext,
        watch: WatchInventory,
    ) -> Result<BoxStream<InventoryNews>, Error> {
        if let Some(shm) = self.shm().await {
            match shm.watch_inventory(ctx, watch).await {
                Err(error) if self.falls_back(&error) => {}
                answer => return answer,
            }
        }
        self.grpc.watch_inventory(ctx, watch).await
    }

    async fn attend(
        &self,
        ctx: &CallContext,
        queries: mpsc::Receiver<AttendQuery>,
    ) -> Result<BoxStream<AttendAnswer>, Error> {
        let Some(shm) = self.shm().await else { return self.grpc.attend(ctx, queries).await };
        shm.attend(ctx, queries).await.inspect_err(|error| {
            self.falls_back(error);
        })
    }

    async fn close_view(&self, ctx: &CallContext, view_id: u64) -> Result<(), Error> {
        if let Some(shm) = self.shm().await {
            match shm.close_view(ctx, view_id).await {
                Err(error) if self.falls_back(&error) => {}
                answer => return answer,
            }
        }
        self.grpc.close_view(ctx, view_id).await
    }

    async fn stats(&self, ctx: &CallContext) -> Result<ShardStats, Error> {
        if let Some(shm) = self.shm().await {
            match shm.stats(ctx).await {
                Err(error) if self.falls_back(&error) => {}
                answer => return answer,
            }
        }
        self.grpc.stats(ctx).await
    }

    // Small and rare: what operators ask needs no shared memory.

    async fn list_blocks(&self, ctx: &CallContext, list: ListBlocks) -> Result<BlockPage, Error> {
        self.grpc.list_blocks(ctx, list).await
    }

    async fn start_scrub(
        &self,
        ctx: &CallContext,
        bytes_per_second: Option<u64>,
    ) -> Result<ScrubStarted, Error> {
        self.grpc.start_scrub(ctx, bytes_per_second).await
    }

    async fn drain(&self, ctx: &CallContext, cancel: bool) -> Result<DrainStats, Error> {
        self.grpc.drain(ctx, cancel).await
    }
}

/// A stream that tells when it was given up.
#[derive(Debug)]
pub(super) struct Tracked {
    stream: UnixStream,
    alive: Arc<AtomicBool>,
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.alive.store(false, Ordering::Release);
    }
}

impl AsyncRead for Tracked {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Tracked {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
