//! Accepted sockets: counted, and cut off when the drain is over.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::{Stream, StreamExt};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

use crate::shm::{self, Connection, Link};

/// How long a peer may take to say who it is on the socket of the `shm` lane.
const HELLO_PATIENCE: std::time::Duration = std::time::Duration::from_secs(2);
/// Peers that may be saying so at the same time.
const HELLOS_MAX: usize = 16;

/// Accepts connections, at most `connections_max` at a time; further ones are closed at once, so that their clients see a
/// refusal instead of a silence. Every socket fails once `sever` fires.
pub(super) fn accept(
    listener: TcpListener,
    connections_max: usize,
    sever: CancellationToken,
) -> impl Stream<Item = io::Result<Socket>> {
    let slots = Arc::new(Semaphore::new(connections_max));
    accept_tcp(listener, slots, sever)
}

/// The same for the socket of the `shm` lane beside a listener.
pub(super) fn accept_shm(
    listener: UnixListener,
    arena_bytes: usize,
    connections_max: usize,
    sever: CancellationToken,
) -> impl Stream<Item = io::Result<Socket>> {
    let slots = Arc::new(Semaphore::new(connections_max));
    let opened = futures::stream::unfold(listener, |listener| async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => return Some((stream, listener)),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection with shared memory");
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
            }
        }
    });
    let greeted = opened.map(move |stream| async move {
        tokio::time::timeout(HELLO_PATIENCE, shm::accept(stream, arena_bytes)).await
    });
    greeted.buffer_unordered(HELLOS_MAX).filter_map(move |greeted| {
        let socket = match (greeted, Arc::clone(&slots).try_acquire_owned()) {
            (Ok(Ok((stream, link))), Ok(permit)) => {
                Some(Ok(Socket::of(Bytestream::Unix(stream), Some(link), permit, &sever)))
            }
            (Ok(Err(error)), _) => {
                tracing::warn!(%error, "a peer of the shm lane was refused");
                None
            }
            _ => None,
        };
        std::future::ready(socket)
    })
}

fn accept_tcp(
    listener: TcpListener,
    slots: Arc<Semaphore>,
    sever: CancellationToken,
) -> impl Stream<Item = io::Result<Socket>> {
    futures::stream::unfold((listener, slots, sever), |(listener, slots, sever)| async move {
        let socket = loop {
            match listener.accept().await {
                Ok((stream, _)) => match Arc::clone(&slots).try_acquire_owned() {
                    Ok(permit) => break Socket::new(stream, permit, &sever),
                    Err(_) => tracing::warn!("connection refused: the listener has as many as it may"),
                },
                // Accept fails when descriptors run out: without a pause this would spin until some are free.
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
            }
        };
        Some((Ok(socket), (listener, slots, sever)))
    })
}

/// Bytes in both directions.
trait Duplex: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Duplex for T {}

enum Bytestream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// One accepted connection.
pub(super) struct Socket {
    stream: Bytestream,
    connection: Connection,
    severed: Pin<Box<WaitForCancellationFutureOwned>>,
    _permit: OwnedSemaphorePermit,
}

impl Socket {
    fn new(stream: TcpStream, permit: OwnedSemaphorePermit, sever: &CancellationToken) -> Self {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
        Self::of(Bytestream::Tcp(stream), None, permit, sever)
    }

    fn of(
        stream: Bytestream,
        link: Option<Arc<Link>>,
        permit: OwnedSemaphorePermit,
        sever: &CancellationToken,
    ) -> Self {
        let sever = sever.child_token();
        let severed = Box::pin(sever.clone().cancelled_owned());
        let connection = Connection { link, sever, ..Connection::default() };
        Self { stream, connection, severed, _permit: permit }
    }

    fn stream(&mut self) -> Pin<&mut (dyn Duplex + 'static)> {
        match &mut self.stream {
            Bytestream::Tcp(stream) => Pin::new(stream),
            Bytestream::Unix(stream) => Pin::new(stream),
        }
    }

    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.severed.as_mut().poll(cx) {
            Poll::Ready(()) => {
                Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the server ends this connection"))
            }
            Poll::Pending => Ok(()),
        }
    }
}

impl Connected for Socket {
    type ConnectInfo = Connection;

    fn connect_info(&self) -> Connection {
        self.connection.clone()
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        self.stream().poll_read(cx, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        self.stream().poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        self.stream().poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_shutdown(cx)
    }
}
