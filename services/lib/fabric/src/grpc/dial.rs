//! The client's tile connections to one peer (lane `tcp`): opened when a call needs one, kept for the next call, few.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http::Uri;
use longshore_proto::v1::{self, kv_store_service_client::KvStoreServiceClient};
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout},
};
use tonic::transport::Channel;

use super::{
    GrpcOptions,
    call::{request, unary},
    leased::{Leased, Way},
};
use crate::{
    CallContext, Code, Error, TcpPatience,
    tcp::{Buffers, TileStream, Token, introduce, is_of_connection},
};

/// How long the lane is left alone after a failure; twice as long after the next one, up to the last.
const PAUSE_FIRST: Duration = Duration::from_secs(5);
const PAUSE_LAST: Duration = Duration::from_secs(300);

/// Tile connections to one peer.
#[derive(Debug)]
pub(super) struct Dial {
    address: String,
    calls: KvStoreServiceClient<Channel>,
    body_bytes_max: usize,
    patience: TcpPatience,
    places: Arc<Semaphore>,
    pool: Mutex<DialPool>,
    buffers: Buffers,
}

#[derive(Debug, Default)]
struct DialPool {
    /// Last in, first out: the others grow old and go.
    idle: Vec<Idle>,
    pause: Pause,
}

#[derive(Debug)]
struct Idle {
    connection: Connection,
    since: Instant,
}

/// An open connection without its socket.
#[derive(Debug)]
struct Name {
    id: u64,
    token: Token,
    /// Calls that had it.
    leases: u64,
    _place: OwnedSemaphorePermit,
}

#[derive(Debug)]
struct Connection {
    name: Name,
    socket: TcpStream,
}

/// When to try again, by the failures in a row.
#[derive(Debug, Default)]
pub(super) struct Pause {
    until: Option<Instant>,
    last: Duration,
}

impl Pause {
    pub(super) fn failed(&mut self, now: Instant) {
        self.last = if self.last.is_zero() { PAUSE_FIRST } else { (self.last * 2).min(PAUSE_LAST) };
        self.until = Some(now + self.last);
    }

    /// The peer has no room, which is no failure.
    pub(super) fn busy(&mut self, now: Instant, retry_after: Option<Duration>) {
        let until = now + retry_after.unwrap_or(PAUSE_FIRST).min(PAUSE_LAST);
        self.until = Some(self.until.map_or(until, |other| other.max(until)));
    }

    pub(super) fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// How long the last one was, or is; zero after a success.
    pub(super) fn last(&self) -> Duration {
        self.last
    }

    pub(super) fn holds(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

/// A connection that a call has. Dropped, it is closed.
#[derive(Debug)]
pub(super) struct Lease {
    dial: Arc<Dial>,
    name: Name,
    stream: TileStream,
}

impl Lease {
    /// What the call says of it.
    pub(super) fn wire(&self) -> v1::TileConnection {
        let token = bytes::Bytes::copy_from_slice(self.name.token.as_bytes());
        v1::TileConnection { id: self.name.id, token, lease: self.name.leases }
    }

    /// Its frames.
    pub(super) fn stream(&mut self) -> &mut TileStream {
        &mut self.stream
    }

    /// Memory for bodies whose reader gives none.
    pub(super) fn buffers(&self) -> Buffers {
        self.dial.buffers.clone()
    }

    pub(super) fn patience(&self) -> TcpPatience {
        self.dial.patience
    }
}

impl Leased for Lease {
    type Way = Dial;

    fn way(&self) -> Arc<Dial> {
        Arc::clone(&self.dial)
    }

    fn give_back(self) {
        let Self { dial, name, stream } = self;
        let connection = Connection { name, socket: stream.into_socket() };
        let mut pool = dial.pool();
        pool.idle.push(Idle { connection, since: Instant::now() });
        pool.pause.succeeded();
    }
}

impl Way for Dial {
    /// Its other connections are left too.
    fn failed(&self) {
        self.pool().pause.failed(Instant::now());
        self.forget();
    }

    /// Others have to be opened.
    fn forget(&self) {
        let stale = std::mem::take(&mut self.pool().idle);
        drop(stale);
    }

    fn is_at_fault(error: &Error) -> bool {
        is_of_connection(error)
    }
}

impl Dial {
    pub(super) fn new(address: &str, calls: KvStoreServiceClient<Channel>, options: &GrpcOptions) -> Self {
        Self {
            address: address.to_owned(),
            calls,
            body_bytes_max: options.message_bytes_max,
            patience: options.tcp_patience,
            places: Arc::new(Semaphore::new(options.tcp_connections_max)),
            pool: Mutex::default(),
            buffers: Buffers::default(),
        }
    }

    fn pool(&self) -> MutexGuard<'_, DialPool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection for a call. Fails at once where all are in use or one failed lately.
    pub(super) async fn lease(self: &Arc<Self>, ctx: &CallContext) -> Result<Lease, Error> {
        if let Some(idle) = self.idle(Instant::now()) {
            return Ok(self.give(idle));
        }
        if self.pool().pause.holds(Instant::now()) {
            return Err(unavailable(&self.address, "it failed lately"));
        }
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            return Err(unavailable(&self.address, "all its connections are in use"));
        };
        let opened = match timeout(self.patience.hello, self.open(ctx, place)).await {
            Ok(opened) => opened,
            Err(_) => Err(unavailable(&self.address, "the handshake took too long")),
        };
        match opened {
            Ok(connection) => {
                self.pool().pause.succeeded();
                Ok(self.give(connection))
            }
            Err(error) => {
                // Where it is not offered there is nothing to tell.
                if error.code != Code::Unimplemented && !ctx.cancel.is_cancelled() {
                    tracing::warn!(address = self.address, %error, "no tcp lane: tiles go over grpc");
                }
                match error.code {
                    // The caller has no time for it; nothing is known of the lane.
                    Code::Cancelled | Code::DeadlineExceeded => {}
                    Code::ResourceExhausted => self.pool().pause.busy(Instant::now(), error.retry_after),
                    _ => self.failed(),
                }
                Err(error)
            }
        }
    }

    /// A connection that waits for a call and is sound as far as this side can tell.
    fn idle(&self, now: Instant) -> Option<Connection> {
        let mut pool = self.pool();
        // The server closes those that are idle for as long as this; half of it leaves time for a call to begin.
        pool.idle.retain(|idle| now.duration_since(idle.since) < self.patience.idle / 2);
        while let Some(Idle { connection, .. }) = pool.idle.pop() {
            // Nothing may come while no call has it: bytes are somebody's fault, and an end is an end.
            match connection.socket.try_read(&mut [0]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Some(connection),
                _ => {}
            }
        }
        None
    }

    fn give(self: &Arc<Self>, connection: Connection) -> Lease {
        let Connection { mut name, socket } = connection;
        name.leases += 1;
        let stream = TileStream::new(socket, name.leases, self.body_bytes_max, self.patience);
        Lease { dial: Arc::clone(self), name, stream }
    }

    async fn open(&self, ctx: &CallContext, place: OwnedSemaphorePermit) -> Result<Connection, Error> {
        let mut calls = self.calls.clone();
        let asked = request(ctx, v1::OpenTileConnectionRequest {})?;
        let offer = unary(ctx, calls.open_tile_connection(asked)).await?;
        let (Ok(port), Some(token)) = (u16::try_from(offer.port), Token::from_slice(&offer.token)) else {
            let text = "the answer of the peer makes no sense: no port or no token of 16 bytes";
            return Err(Error::new(Code::DataLoss, text));
        };
        let socket = self.connect(port, offer.id, &token).await;
        let socket = socket.map_err(|error| unavailable(&self.address, &format!("port {port}: {error}")))?;
        Ok(Connection { name: Name { id: offer.id, token, leases: 0, _place: place }, socket })
    }

    /// At the host of the gRPC address: a port elsewhere cannot be told.
    async fn connect(&self, port: u16, id: u64, token: &Token) -> io::Result<TcpStream> {
        let uri: Uri = self.address.parse().map_err(|_| io::ErrorKind::InvalidInput)?;
        let host = uri.host().ok_or(io::ErrorKind::InvalidInput)?.trim_matches(['[', ']']);
        let mut socket = TcpStream::connect((host, port)).await?;
        socket.set_nodelay(true)?;
        introduce(&mut socket, id, token).await?;
        Ok(socket)
    }
}

#[cfg(test)]
impl Dial {
    /// A call that has a connection over `socket`.
    pub(super) fn lease_of(self: &Arc<Self>, socket: TcpStream) -> Lease {
        let place = Arc::clone(&self.places).try_acquire_owned().expect("a place is free");
        let token = Token::fresh().expect("the system has random bytes");
        self.give(Connection { name: Name { id: 1, token, leases: 0, _place: place }, socket })
    }

    /// Connections that wait for a call.
    pub(super) fn waiting(&self) -> usize {
        self.pool().idle.len()
    }
}

fn unavailable(address: &str, why: &str) -> Error {
    Error::new(Code::Unavailable, format!("no tcp lane to `{address}`: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_a_limit_and_a_success_ends_them() {
        let now = Instant::now();
        let mut pause = Pause::default();
        assert!(!pause.holds(now));
        for seconds in [5, 10, 20, 40, 80, 160, 300, 300] {
            pause.failed(now);
            assert!(pause.holds(now + Duration::from_millis(seconds * 1000 - 1)), "{seconds}");
            assert!(!pause.holds(now + Duration::from_secs(seconds)), "{seconds}");
        }
        pause.succeeded();
        assert!(!pause.holds(now));
        pause.failed(now);
        assert!(!pause.holds(now + PAUSE_FIRST));
    }
}
