//! Tile connections at the moment, for whoever shows them.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// The tile connections of one listener and what is on them. Clones share the numbers.
#[derive(Debug, Clone, Default)]
pub struct TileTraffic {
    now: Arc<Now>,
}

#[derive(Debug, Default)]
struct Now {
    connections: AtomicU64,
    bytes: AtomicU64,
}

impl TileTraffic {
    /// Connections that are open, with a call or without one.
    pub fn connections(&self) -> u64 {
        self.now.connections.load(Ordering::Relaxed)
    }

    /// Bytes of tiles that are coming and not taken yet, or going.
    pub fn bytes_in_flight(&self) -> u64 {
        self.now.bytes.load(Ordering::Relaxed)
    }

    /// Counts a connection until what this gives is dropped.
    pub(super) fn opened(&self) -> Counted {
        self.now.connections.fetch_add(1, Ordering::Relaxed);
        Counted { traffic: self.clone(), connections: 1, bytes: 0 }
    }

    /// Counts bytes of a tile until what this gives is dropped.
    pub(crate) fn under_way(&self, bytes: usize) -> Counted {
        self.now.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Counted { traffic: self.clone(), connections: 0, bytes: bytes as u64 }
    }
}

/// Something that is counted while it lasts.
#[derive(Debug)]
pub(crate) struct Counted {
    traffic: TileTraffic,
    connections: u64,
    bytes: u64,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.traffic.now.connections.fetch_sub(self.connections, Ordering::Relaxed);
        self.traffic.now.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_is_counted_no_more() {
        let traffic = TileTraffic::default();
        let seen = || (traffic.connections(), traffic.bytes_in_flight());
        let (connection, tile) = (traffic.opened(), traffic.clone().under_way(100));
        let other = traffic.under_way(7);
        assert_eq!(seen(), (1, 107));
        drop(tile);
        assert_eq!(seen(), (1, 7));
        drop((connection, other));
        assert_eq!(seen(), (0, 0));
    }
}
