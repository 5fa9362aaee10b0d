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
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// Where forwarded servers are seen: loopback too, but no address of theirs.
const OTHER_HOST: &str = "127.0.0.2";

/// Number of the next byte, from 1 and over all connections, one bit of which is flipped; 0: none.
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
    cut: CancellationToken,
    _tasks: JoinSet<()>,
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
                    passing.spawn(pass(client, to, damage.clone()));
                }
            };
            tokio::select! {
                () = stop.cancelled() => {}
                () = accepting => {}
            }
        });
        Self { address, connections, damage_up, damage_down, cut, _tasks: tasks }
    }

    /// Cuts all connections and takes no more.
    pub(crate) fn cut(&self) {
        self.cut.cancel();
    }
}

async fn pass(client: TcpStream, to: SocketAddr, (up, down): (Damage, Damage)) {
    let Ok(server) = TcpStream::connect(to).await else { return };
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::join!(one_way(from_client, to_server, up), one_way(from_server, to_client, down));
}

async fn one_way(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, damage: Damage) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let left = damage.load(Ordering::SeqCst);
        if left > 0 && left <= count as u64 {
            buffer[left as usize - 1] ^= 0x10;
        }
        damage.store(left.saturating_sub(count as u64), Ordering::SeqCst);
        if to.write_all(&buffer[..count]).await.is_err() {
            break;
        }
    }
    to.shutdown().await.ok();
}
