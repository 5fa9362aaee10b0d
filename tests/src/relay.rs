//! A network between processes, made of sockets, for kernels that cannot make one: bytes come late by times that a seed varies, no faster
//! than a rate, and not at all for a while, or their connections are cut in the middle of what they carry. What waits on the way is bounded: a
//! sender is held up as by a full network.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep_until},
};

use crate::draws::Draws;

/// Where processes are seen through relays: loopback too, but no address of theirs, so that nobody takes them for processes of this host.
const ELSEWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));
/// Most bytes that are late by the same time.
const PIECE_BYTES: usize = 16 << 10;
/// Pieces on their way in one direction of a connection.
const PIECES_MAX: usize = 64;
/// Connections at a time; further ones wait to be accepted.
const CONNECTIONS_MAX: usize = 256;
/// No cut is due.
const NEVER: u64 = u64::MAX;

/// How slow a network is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lag {
    /// How late bytes are, milliseconds; each piece by a time of its own, in both directions.
    pub late_ms: RangeInclusive<u64>,
    /// Most bytes a second in one direction of a connection.
    pub bytes_per_second: u64,
}

/// What becomes of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Passing,
    /// They wait; connections stay.
    Held,
    /// There are no connections, and none can be made.
    Cut,
}

/// Passes on what comes to an address elsewhere. Its connections end with it.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    wire: Arc<Wire>,
    _accepting: JoinSet<()>,
}

#[derive(Debug)]
struct Wire {
    to: SocketAddr,
    seed: u64,
    lag: watch::Sender<Option<Lag>>,
    flow: watch::Sender<Flow>,
    connections: AtomicU64,
    passed: AtomicU64,
    /// Bytes that still pass before all is cut.
    until_cut: AtomicU64,
}

impl Relay {
    /// From `port` (0: any) elsewhere to `to`, at once and as fast as it goes; `seed` fixes how late bytes are when they are.
    pub fn new(port: u16, to: SocketAddr, seed: u64) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind((ELSEWHERE, port))?;
        listener.set_nonblocking(true)?;
        let (address, listener) = (listener.local_addr()?, TcpListener::from_std(listener)?);
        let wire = Arc::new(Wire {
            to,
            seed,
            lag: watch::Sender::new(None),
            flow: watch::Sender::new(Flow::Passing),
            connections: AtomicU64::new(0),
            passed: AtomicU64::new(0),
            until_cut: AtomicU64::new(NEVER),
        });
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, Arc::clone(&wire)));
        Ok(Self { address, wire, _accepting: accepting })
    }

    /// Where it is reached.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How late bytes are that come from now on.
    pub fn lag(&self, lag: Option<Lag>) {
        self.wire.lag.send_replace(lag);
    }

    /// Lets nothing pass; all is kept for later.
    pub fn hold(&self) {
        self.wire.flow.send_replace(Flow::Held);
    }

    /// Cuts all connections when `bytes` more have passed, in the middle of what comes then; 0: now. There are none until [`Self::mend`].
    pub fn cut_after(&self, bytes: u64) {
        self.wire.until_cut.store(bytes, SeqCst);
        if bytes == 0 {
            self.wire.flow.send_replace(Flow::Cut);
        }
    }

    /// Whether connections are cut.
    pub fn is_cut(&self) -> bool {
        *self.wire.flow.borrow() == Flow::Cut
    }

    /// Bytes pass, and connections can be made.
    pub fn mend(&self) {
        self.wire.until_cut.store(NEVER, SeqCst);
        self.wire.flow.send_replace(Flow::Passing);
    }

    /// Connections that were made.
    pub fn connections(&self) -> u64 {
        self.wire.connections.load(SeqCst)
    }

    /// Bytes that passed.
    pub fn passed(&self) -> u64 {
        self.wire.passed.load(SeqCst)
    }
}

async fn accept(listener: TcpListener, wire: Arc<Wire>) {
    let mut passing = JoinSet::new();
    loop {
        while passing.len() >= CONNECTIONS_MAX {
            passing.join_next().await;
        }
        while passing.try_join_next().is_some() {}
        let Ok((client, _)) = listener.accept().await else {
            // No descriptors are left for the moment.
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        if *wire.flow.borrow() != Flow::Cut {
            let number = wire.connections.fetch_add(1, SeqCst);
            passing.spawn(Arc::clone(&wire).pass(client, number));
        }
    }
}

impl Wire {
    /// One connection, until both sides ended it or it is cut.
    async fn pass(self: Arc<Self>, client: TcpStream, number: u64) {
        let Ok(server) = TcpStream::connect(self.to).await else { return };
        let _only_slower = (client.set_nodelay(true), server.set_nodelay(true));
        let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
        let draws = |way| Draws::new(&[self.seed, number, way]);
        let both = async {
            tokio::join!(
                self.one_way(from_client, to_server, draws(0)),
                self.one_way(from_server, to_client, draws(1))
            )
        };
        let mut flow = self.flow.subscribe();
        tokio::select! {
            _ = flow.wait_for(|flow| *flow == Flow::Cut) => {}
            _ = both => {}
        }
    }

    async fn one_way(&self, from: OwnedReadHalf, to: OwnedWriteHalf, draws: Draws) {
        let (late, due) = mpsc::channel(PIECES_MAX);
        tokio::join!(self.take(from, late, draws), self.give(due, to));
    }

    /// Reads pieces and says when each is due; the order stays.
    async fn take(&self, mut from: OwnedReadHalf, late: mpsc::Sender<(Instant, Vec<u8>)>, mut draws: Draws) {
        let (mut buffer, mut last) = (vec![0; PIECE_BYTES], Instant::now());
        while let Ok(place) = late.reserve().await
            && let Ok(count @ 1..) = from.read(&mut buffer).await
        {
            let late_ms = self.lag.borrow().as_ref().map_or(0, |lag| draws.between(lag.late_ms.clone()));
            last = last.max(Instant::now() + Duration::from_millis(late_ms));
            place.send((last, buffer[..count].to_vec()));
        }
    }

    /// Writes pieces when they are due.
    async fn give(&self, mut pieces: mpsc::Receiver<(Instant, Vec<u8>)>, mut to: OwnedWriteHalf) {
        let (mut flow, mut free) = (self.flow.subscribe(), Instant::now());
        while let Some((due, piece)) = pieces.recv().await {
            sleep_until(due.max(free)).await;
            if !flow.wait_for(|flow| *flow != Flow::Held).await.is_ok_and(|flow| *flow == Flow::Passing) {
                return;
            }
            let (bytes, is_last) = self.count(piece.len());
            if to.write_all(&piece[..bytes]).await.is_err() {
                return;
            }
            if is_last {
                self.flow.send_replace(Flow::Cut);
            }
            let rate = self.lag.borrow().as_ref().map(|lag| lag.bytes_per_second);
            let takes = rate.map_or(0.0, |rate| bytes as f64 / rate as f64);
            free = Instant::now() + Duration::from_secs_f64(takes);
        }
        let _gone_already = to.shutdown().await;
    }

    /// How many of so many bytes pass, and whether all is cut behind them.
    fn count(&self, bytes: usize) -> (usize, bool) {
        let less = |left: u64| (left != NEVER).then(|| left.saturating_sub(bytes as u64));
        let left = self.until_cut.fetch_update(SeqCst, SeqCst, less).unwrap_or(NEVER);
        let passing = left.min(bytes as u64);
        self.passed.fetch_add(passing, SeqCst);
        (passing as usize, left <= bytes as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that gives back what comes, and a connection to it through a relay.
    async fn echo(lag: Lag) -> (Relay, TcpStream, JoinSet<()>) {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let relay = Relay::new(0, server.local_addr().unwrap(), 7).unwrap();
        relay.lag(Some(lag));
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let (stream, _) = server.accept().await.unwrap();
            let (mut from, mut to) = stream.into_split();
            let _cut = tokio::io::copy(&mut from, &mut to).await;
        });
        let client = TcpStream::connect(relay.address()).await.unwrap();
        (relay, client, serving)
    }

    fn bytes(count: usize) -> Vec<u8> {
        (0..count).map(|at| (at % 251) as u8).collect()
    }

    #[tokio::test]
    async fn bytes_come_late_in_order_and_no_faster_than_they_may() {
        let lag = Lag { late_ms: 20..=40, bytes_per_second: 1 << 20 };
        let (relay, mut client, _serving) = echo(lag).await;
        let began = Instant::now();
        client.write_all(b"once").await.unwrap();
        let mut answer = [0; 4];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"once");
        assert!(began.elapsed() >= Duration::from_millis(40), "there and back");
        // A quarter of what may pass in a second, each way; the last piece is not waited for.
        let (began, sent) = (Instant::now(), bytes(256 << 10));
        let (mut from, mut to) = client.split();
        let mut came = vec![0; sent.len()];
        let (wrote, read) = tokio::join!(to.write_all(&sent), from.read_exact(&mut came));
        assert!(wrote.is_ok() && read.is_ok() && came == sent);
        assert!(began.elapsed() >= Duration::from_millis(200), "{:?}", began.elapsed());
        assert_eq!((relay.connections(), relay.passed()), (1, 2 * (4 + (256 << 10))));
    }

    #[tokio::test]
    async fn what_is_held_comes_later_and_a_cut_is_in_the_middle() {
        let (relay, mut client, _serving) = echo(Lag { late_ms: 0..=1, bytes_per_second: 1 << 30 }).await;
        relay.hold();
        client.write_all(b"held").await.unwrap();
        let mut answer = [0; 4];
        let early = tokio::time::timeout(Duration::from_millis(100), client.read_exact(&mut answer)).await;
        assert!(early.is_err(), "nothing passes");
        relay.mend();
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"held");
        // 1,000 bytes pass, there and back.
        relay.cut_after(1_000);
        let _cut = client.write_all(&bytes(600)).await;
        let mut came = Vec::new();
        let _ended_either_way = client.read_to_end(&mut came).await;
        assert_eq!((came.len(), relay.is_cut(), relay.passed()), (400, true, 1_008));
        assert!(bytes(600).starts_with(&came));
        let mut refused = TcpStream::connect(relay.address()).await.unwrap();
        assert!(matches!(refused.read(&mut answer).await, Ok(0) | Err(_)), "until it is mended");
    }
}
