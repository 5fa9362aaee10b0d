//! The `tcp` lane: tiles of a gRPC call on a plain TCP connection that the call leases for itself.
//!
//! Calls, deadlines, cancellation, acknowledgements and errors stay gRPC's. Over gRPC a client is told port, name and a secret token of a
//! connection; the token opens it once. A call that names the connection has its tiles there: frames of a head and a body each, in the
//! order of the call, the last one saying that it is the last. Whoever receives reads bodies from the socket to where they stay. A
//! connection whose call did not end well is closed, so that nothing of one call can be taken for another's.

mod buffers;
mod door;
mod frame;
mod hello;
mod listen;
mod pace;
mod rooms;
mod stream;
mod token;
mod traffic;

pub(crate) use buffers::Buffers;
pub(crate) use door::{Door, Lease, not_offered};
pub(crate) use frame::Frame;
pub(crate) use hello::introduce;
pub(crate) use listen::serve;
pub use rooms::TileRooms;
pub(crate) use stream::{Fault, TileStream};
pub(crate) use token::Token;
pub use traffic::TileTraffic;

use std::time::Duration;

use crate::{Code, Error};

/// Whether a peer says with it that the tile connection of a call failed, or is not known to it.
pub(crate) fn is_of_connection(error: &Error) -> bool {
    let field = error.field.as_deref().and_then(|field| field.rsplit('.').next());
    error.code == Code::Unavailable && field == Some(stream::CONNECTION)
}

/// Trailer of a call whose connection the server keeps for the next one.
pub(crate) const KEPT: &str = "longshore-tile-connection";
/// Value of [`KEPT`].
pub(crate) const KEPT_VALUE: &str = "kept";

/// How long each side of the `tcp` lane waits for the other one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpPatience {
    /// For the next 256 KiB of a body, or the rest of one or of a head.
    pub read: Duration,
    /// For a peer to read anything of what is sent: it may be busy with what it has.
    pub write: Duration,
    /// For the whole handshake.
    pub hello: Duration,
    /// How long a connection without a call is kept.
    pub idle: Duration,
    /// Bytes of a body in a second, at least: what `read` or `write` allows for a pause and that for its length is all that a frame may
    /// take. A head has `read` alone.
    pub bytes_per_second_min: u64,
}

impl TcpPatience {
    /// What a message of so many bytes may take that brings a tile over another lane: streams of one connection wait for each other there.
    pub(crate) fn of_message(&self, bytes: usize) -> Duration {
        pace::Pace::of_body(self.write, bytes, self).whole()
    }

    /// What a body may take that was announced over the lane `nccl`.
    pub(crate) fn of_announced(&self, bytes: usize) -> Duration {
        pace::Pace::of_body(self.read, bytes, self).whole()
    }
}

impl Default for TcpPatience {
    fn default() -> Self {
        Self {
            read: Duration::from_secs(10),
            write: Duration::from_secs(60),
            hello: Duration::from_secs(2),
            idle: Duration::from_secs(60),
            bytes_per_second_min: 1 << 20,
        }
    }
}

#[cfg(test)]
mod tests;
