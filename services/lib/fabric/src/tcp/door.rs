//! The server's tile connections: offered over gRPC, opened with their token, leased to one call at a time. Time is an argument.

use std::{
    collections::HashMap,
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering},
    },
    time::Duration,
};

use longshore_proto::v1;
use rustix::{
    io::Errno,
    net::{RecvFlags, recv},
};
use tokio::{net::TcpStream, time::Instant};

use super::{TcpPatience, TileStream, TileTraffic, Token, hello, stream::CONNECTION, traffic};
use crate::{Code, Error};

/// How long a token may wait for its connection.
const OFFER_LIFE: Duration = Duration::from_secs(5);
/// Tile connections that one gRPC connection may ask for.
const PEER_CONNECTIONS_MAX: usize = 64;
/// When a refused offer may be asked for again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// All tile connections of a listener.
#[derive(Debug)]
pub(crate) struct Door {
    connections_max: usize,
    body_bytes_max: usize,
    patience: TcpPatience,
    traffic: TileTraffic,
    /// Where it listens; 0 while it does not.
    port: AtomicU16,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    entries: HashMap<u64, Entry>,
    last_id: u64,
}

#[derive(Debug)]
struct Entry {
    token: Token,
    state: State,
    /// Once it is open.
    open: Option<traffic::Counted>,
    _counted: Counted,
}

#[derive(Debug)]
enum State {
    Offered {
        until: Instant,
    },
    Idle {
        socket: TcpStream,
        since: Instant,
        /// Calls up to this one had it.
        lease: u64,
    },
    /// A call has its socket.
    Leased,
}

/// One connection of its peer's.
#[derive(Debug)]
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Door {
    /// Closed until [`Self::open`]. Bodies beyond `body_bytes_max` are refused.
    pub(crate) fn new(
        connections_max: usize,
        body_bytes_max: usize,
        patience: TcpPatience,
        traffic: TileTraffic,
    ) -> Self {
        let (port, known) = (AtomicU16::new(0), Mutex::default());
        Self { connections_max, body_bytes_max, patience, traffic, port, known }
    }

    /// Offers connections at `port` from now on.
    pub(crate) fn open(&self, port: u16) {
        self.port.store(port, Ordering::Release);
    }

    /// Offers none any more and closes those that no call has.
    pub(super) fn close(&self) {
        self.port.store(0, Ordering::Release);
        self.known().entries.clear();
    }

    pub(super) fn patience(&self) -> TcpPatience {
        self.patience
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection that the gRPC connection that counts in `peer` may open.
    pub(crate) fn offer(
        &self,
        peer: &Arc<AtomicUsize>,
        now: Instant,
    ) -> Result<v1::OpenTileConnectionResponse, Error> {
        let port = self.port.load(Ordering::Acquire);
        if port == 0 {
            return Err(not_offered());
        }
        let token = Token::fresh()?;
        let full = |who: &str, limit: usize| {
            let text =
                format!("{who} has {limit} tile connections, which is the limit; hint: send tiles over gRPC");
            Error::new(Code::ResourceExhausted, text).with_retry_after(RETRY_AFTER)
        };
        let mut known = self.known();
        let is_full = known.entries.len() >= self.connections_max;
        if is_full || peer.load(Ordering::Acquire) >= PEER_CONNECTIONS_MAX {
            known.forget_old(now, self.patience.idle);
        }
        if known.entries.len() >= self.connections_max {
            return Err(full("the listener", self.connections_max));
        }
        let counted = Counted(Arc::clone(peer));
        if peer.fetch_add(1, Ordering::AcqRel) >= PEER_CONNECTIONS_MAX {
            return Err(full("the peer", PEER_CONNECTIONS_MAX));
        }
        known.last_id += 1;
        let id = known.last_id;
        let state = State::Offered { until: now + OFFER_LIFE };
        known.entries.insert(id, Entry { token, state, open: None, _counted: counted });
        let token = bytes::Bytes::copy_from_slice(token.as_bytes());
        Ok(v1::OpenTileConnectionResponse { port: u32::from(port), id, token })
    }

    /// Takes a connection whose client presented `token`, once, and confirms it. Nobody is told why it is refused.
    pub(super) fn admit(&self, id: u64, token: &Token, socket: TcpStream, now: Instant) -> bool {
        let mut known = self.known();
        let Some(entry) = known.entries.get_mut(&id) else { return false };
        let State::Offered { until } = entry.state else { return false };
        if !entry.token.matches(token) || now > until || !hello::confirm(&socket) {
            return false;
        }
        entry.state = State::Idle { socket, since: now, lease: 0 };
        entry.open = Some(self.traffic.opened());
        true
    }

    /// Gives the connection that a call names to the call.
    pub(crate) fn lease(self: &Arc<Self>, wanted: &v1::TileConnection) -> Result<Lease, Error> {
        let refuse = |problem: &str| {
            let text = format!("`connection` {problem}; hint: open another one, or send tiles over gRPC");
            Err(Error::new(Code::Unavailable, text).with_field(CONNECTION))
        };
        let Some(token) = Token::from_slice(&wanted.token) else {
            let problem = format!("has {} bytes, must have {}", wanted.token.len(), Token::BYTES);
            return Err(Error::invalid("connection.token", problem));
        };
        let mut known = self.known();
        let Some(entry) = known.entries.get_mut(&wanted.id).filter(|entry| entry.token.matches(&token))
        else {
            return refuse("is not known: it was closed, or never offered");
        };
        match entry.state {
            State::Offered { .. } => return refuse("was not opened yet"),
            State::Leased => return refuse("has another call"),
            State::Idle { lease, .. } if wanted.lease <= lease => {
                let problem = format!("is {}, must be more than {lease}", wanted.lease);
                return Err(Error::invalid("connection.lease", problem));
            }
            State::Idle { .. } => {}
        }
        let State::Idle { socket, .. } = std::mem::replace(&mut entry.state, State::Leased) else {
            unreachable!("looked at under the same lock");
        };
        drop(known);
        let stream = TileStream::new(socket, wanted.lease, self.body_bytes_max, self.patience);
        let (door, kept) = (Arc::clone(self), Arc::default());
        Ok(Lease { door, id: wanted.id, lease: wanted.lease, stream: Some(stream), finished: false, kept })
    }

    fn give_back(&self, id: u64, socket: TcpStream, lease: u64, now: Instant) -> bool {
        match self.known().entries.get_mut(&id) {
            Some(entry) => {
                entry.state = State::Idle { socket, since: now, lease };
                true
            }
            None => false,
        }
    }

    /// Forgets offers that nobody took, and connections that had no call for long or whose client is gone.
    pub(super) fn forget_old(&self, now: Instant) {
        self.known().forget_old(now, self.patience.idle);
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.known().entries.len()
    }
}

impl Known {
    fn forget_old(&mut self, now: Instant, idle: Duration) {
        self.entries.retain(|_, entry| match entry.state {
            State::Offered { until } => now <= until,
            State::Idle { ref socket, since, .. } => now.duration_since(since) <= idle && !is_over(socket),
            State::Leased => true,
        });
    }
}

/// Whether the client closed the connection. The first bytes of its next call may be there before that names the connection.
fn is_over(socket: &TcpStream) -> bool {
    match recv(socket.as_fd(), &mut [0u8; 1][..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((count, _)) => count == 0,
        Err(error) => error != Errno::AGAIN && error != Errno::INTR,
    }
}

/// No such lane here.
pub(crate) fn not_offered() -> Error {
    Error::new(Code::Unimplemented, "there are no tile connections here; hint: send tiles over gRPC")
}

/// A connection that a call has. It goes back when the call read or wrote its last frame, and is closed otherwise.
#[derive(Debug)]
pub(crate) struct Lease {
    door: Arc<Door>,
    id: u64,
    lease: u64,
    stream: Option<TileStream>,
    finished: bool,
    kept: Arc<AtomicBool>,
}

impl Lease {
    /// Its frames.
    pub(crate) fn stream(&mut self) -> &mut TileStream {
        self.stream.as_mut().expect("it is there until the lease is dropped")
    }

    /// Counts bytes of a tile on the connection until what this gives is dropped.
    pub(crate) fn under_way(&self, bytes: usize) -> traffic::Counted {
        self.door.traffic.under_way(bytes)
    }

    /// How long its frames may take.
    pub(crate) fn patience(&self) -> TcpPatience {
        self.door.patience
    }

    /// All frames of the call went.
    pub(crate) fn finish(&mut self) {
        self.finished = true;
    }

    /// Tells, once the lease is dropped, whether the connection was kept.
    pub(crate) fn kept(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.kept)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(stream) = self.stream.take() else { return };
        if self.finished {
            let socket = stream.into_socket();
            let kept = self.door.give_back(self.id, socket, self.lease, Instant::now());
            self.kept.store(kept, Ordering::Release);
        } else {
            self.door.known().entries.remove(&self.id);
        }
    }
}
