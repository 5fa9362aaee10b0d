//! The `shm` lane: gRPC over a Unix socket of the same host, with tiles in shared memory instead of on the socket.
//!
//! Each side owns one arena of sealed memory that the other side maps for reading only. A message names a slot of it; the receiver copies
//! the slot to memory of its own, verifies the checksum of that copy, and says on a second socket that the slot is free.
//! Nothing that is read from shared memory decides anything: names of slots travel on the sockets and are checked.

mod arena;
mod hello;
mod link;
mod slots;
mod tensors;

pub(crate) use hello::{accept, connect};
pub(crate) use link::{Lender, Link};

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream},
    },
    sync::{Arc, atomic::AtomicUsize},
};

use longshore_proto::{WireError, types::TileMessage, v1};
use tokio_util::sync::CancellationToken;

use crate::server::Peer;

/// The tile of a message that may name shared memory; refused where there is none.
pub(crate) fn receive(link: Option<&Arc<Link>>, wire: v1::Tile) -> Result<TileMessage, WireError> {
    match link {
        Some(link) => link.receive(wire),
        None => TileMessage::try_from(wire),
    }
}

/// Names in the abstract namespace, which only processes of the same network namespace see.
fn name(address: SocketAddr) -> io::Result<UnixAddr> {
    UnixAddr::from_abstract_name(format!("longshore/shm/{address}"))
}

/// The socket beside a listener that is bound to `address`.
pub(crate) fn listen(address: SocketAddr) -> io::Result<tokio::net::UnixListener> {
    let listener = UnixListener::bind_addr(&name(address)?)?;
    listener.set_nonblocking(true)?;
    tokio::net::UnixListener::from_std(listener)
}

/// Opens the socket beside whoever listens at `address`, when that is this host: its own, or that of a listener on all addresses.
pub(crate) fn open(address: SocketAddr) -> io::Result<tokio::net::UnixStream> {
    if !is_here(address.ip()) {
        return Err(io::Error::new(io::ErrorKind::AddrNotAvailable, "the address is on another host"));
    }
    let any: IpAddr =
        if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let stream = UnixStream::connect_addr(&name(address)?)
        .or_else(|_| UnixStream::connect_addr(&name(SocketAddr::new(any, address.port()))?))?;
    stream.set_nonblocking(true)?;
    tokio::net::UnixStream::from_std(stream)
}

/// Whether an address is one of this network namespace: only those can be bound.
fn is_here(ip: IpAddr) -> bool {
    UdpSocket::bind((ip, 0)).is_ok()
}

/// What the handler of a call knows of its connection.
#[derive(Debug, Clone, Default)]
pub(crate) struct Connection {
    /// Shared memory, on connections that have some.
    pub(crate) link: Option<Arc<Link>>,
    /// Ends it.
    pub(crate) sever: CancellationToken,
    /// What its tiles take.
    pub(crate) peer: Arc<Peer>,
    /// Tile connections that it asked for.
    pub(crate) tile_connections: Arc<AtomicUsize>,
    /// Members of epochs of the lane `nccl` that it is.
    pub(crate) nccl_members: Arc<AtomicUsize>,
}
