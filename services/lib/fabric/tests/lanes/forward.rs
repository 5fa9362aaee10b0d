//! A server seen through another address, as a host sees it through a network: what passes may be counted, changed and cut.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpSocket, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// Where forwarded servers are seen: loopback too, but no address of theirs.
const OTHER_HOST: &str = "127.0.0.2";

/// Number of the byte of the next connection, from 1, one bit of which is flipped; 0: none. What comes late on others counts nothing.
pub(crate) type Damage = Arc<AtomicU64>;

/// Passes on what comes to one port.
pub(crate) struct Forward {
    pub(crate) address: SocketAddr,
    /// Connections that came.
    pub(crate) connections: Arc<AtomicUsize>,
    /// What is flipped on the way to the server.
    pub(crate) damage_up: Damage,
    /// What is flipped on the way back.
    pub(crate) damage_down: Damage,
    /// Keeps the port for whoever listens there.
    _port: Option<TcpSocket>,
    cut: CancellationToken,
    tasks: JoinSet<()>,
}

/// A port at which a server and a forward may listen, each at its own address, and that nobody else of this machine gets meanwhile.
pub(crate) fn kept_port() -> (u16, TcpSocket) {
    let socket = TcpSocket::new_v4().unwrap();
    // Those who listen there share it.
    socket.set_reuseaddr(true).unwrap();
    socket.bind(([0, 0, 0, 0], 0).into()).unwrap();
    (socket.local_addr().unwrap().port(), socket)
}

impl Forward {
    /// From `port` (0: any) of the other address to `to`.
    pub(crate) async fn new(port: u16, to: SocketAddr) -> Self {
        let listener = TcpListener::bind((OTHER_HOST, port)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let (damage_up, damage_down) = (Damage::default(), Damage::default());
        let (cut, mut tasks) = (CancellationToken::new(), JoinSet::new());
        let (counter, stop) = (Arc::clone(&connections), cut.clone());
        let damage = (Arc::clone(&damage_up), Arc::clone(&damage_down));
        tasks.spawn(async move {
            let mut passing = JoinSet::new();
            let accepting = async {
                loop {
                    let (client, _) = listener.accept().await.unwrap();
                    counter.fetch_add(1, Ordering::SeqCst);
                    let damage = (damage.0.swap(0, Ordering::SeqCst), damage.1.swap(0, Ordering::SeqCst));
                    passing.spawn(pass(client, to, damage));
                }
            };
            tokio::select! {
                () = stop.cancelled() => {}
                () = accepting => {}
            }
            drop(listener);
            passing.shutdown().await;
        });
        Self { address, connections, damage_up, damage_down, _port: None, cut, tasks }
    }

    /// The same, with a port that [`kept_port`] keeps.
    pub(crate) fn keeping(self, port: TcpSocket) -> Self {
        Self { _port: Some(port), ..self }
    }

    /// Cuts all connections and takes no more; when this returns they are closed.
    pub(crate) async fn cut(&mut self) {
        self.cut.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

async fn pass(client: TcpStream, to: SocketAddr, (up, down): (u64, u64)) {
    let Ok(server) = TcpStream::connect(to).await else { return };
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::join!(one_way(from_client, to_server, up), one_way(from_server, to_client, down));
}

async fn one_way(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut damage: u64) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if damage > 0 && damage <= count as u64 {
            buffer[damage as usize - 1] ^= 0x10;
        }
        damage = damage.saturating_sub(count as u64);
        if to.write_all(&buffer[..count]).await.is_err() {
            break;
        }
    }
    to.shutdown().await.ok();
}
