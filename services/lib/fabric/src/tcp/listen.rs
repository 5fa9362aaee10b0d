//! The port of tile connections: takes those that present their token, and nobody for longer than a handshake.

use std::{io, sync::Arc, time::Duration};

use futures::{Stream, StreamExt};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{Door, hello};

/// Connections that may be presenting their token at the same time; the next ones wait to be accepted.
const HELLOS_MAX: usize = 64;
/// How often old connections are looked for.
const FORGET_EVERY: Duration = Duration::from_secs(10);
/// Pause after an accept that failed: descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves the port until `sever` fires; then all connections without a call are closed.
pub(crate) async fn serve(listener: TcpListener, door: Arc<Door>, sever: CancellationToken) {
    let greeted = sockets(listener).map(|socket| greet(&door, socket)).buffer_unordered(HELLOS_MAX);
    let mut greeted = std::pin::pin!(greeted);
    let mut forget = tokio::time::interval(FORGET_EVERY);
    loop {
        tokio::select! {
            () = sever.cancelled() => break,
            _ = greeted.next() => {}
            now = forget.tick() => door.forget_old(now),
        }
    }
    door.close();
}

fn sockets(listener: TcpListener) -> impl Stream<Item = TcpStream> {
    futures::stream::unfold(listener, |listener| async move {
        loop {
            match listener.accept().await {
                Ok((socket, _)) => return Some((socket, listener)),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a tile connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
}

async fn greet(door: &Door, mut socket: TcpStream) {
    let presenting = async {
        socket.set_nodelay(true)?;
        let presented = hello::presented(&mut socket).await?;
        socket.writable().await?;
        io::Result::Ok(presented)
    };
    match timeout(door.patience().hello, presenting).await {
        Ok(Ok((id, token))) => {
            if !door.admit(id, &token, socket, Instant::now()) {
                tracing::warn!(id, "a tile connection without a valid token was refused");
            }
        }
        Ok(Err(error)) => tracing::debug!(%error, "a tile connection was refused"),
        Err(_) => tracing::debug!("a tile connection did not say who it is"),
    }
}
