//! Tile connections and bytes of tiles at the moment, for whoever shows them.

use std::sync::{
    Arc, OnceLock, Weak,
    atomic::{AtomicU64, Ordering},
};

use tokio::sync::Semaphore;

/// The tile connections of one listener, what is on them, and what tiles take of the listener's budget. Clones share the numbers.
#[derive(Debug, Clone, Default)]
pub struct TileTraffic {
    now: Arc<Now>,
}

#[derive(Debug, Default)]
struct Now {
    connections: AtomicU64,
    bytes: AtomicU64,
    /// Bytes of the budget, and those that are free.
    budget: OnceLock<(usize, Weak<Semaphore>)>,
    refused: AtomicU64,
    ended_unread: AtomicU64,
    exchanged_partials_bytes: AtomicU64,
    attend_epochs_lost: AtomicU64,
}

impl TileTraffic {
    /// Whether the listener is over: nobody has its budget any more.
    pub fn is_over(&self) -> bool {
        self.now.budget.get().is_some_and(|(_, free)| free.strong_count() == 0)
    }

    /// Bytes that tiles on all lanes of the listener take of what they may, those included that HTTP/2 may hold unread.
    pub fn budget_taken_bytes(&self) -> u64 {
        let free =
            |(limit, free): &(usize, Weak<Semaphore>)| Some(limit - free.upgrade()?.available_permits());
        self.now.budget.get().and_then(free).unwrap_or(0) as u64
    }

    /// Streams that were refused or ended because there was no room for their tiles.
    pub fn refused_total(&self) -> u64 {
        self.now.refused.load(Ordering::Relaxed)
    }

    /// gRPC connections that were closed because an answer on them was not read.
    pub fn ended_unread_total(&self) -> u64 {
        self.now.ended_unread.load(Ordering::Relaxed)
    }

    /// Bytes of partials that attend streams named to be exchanged over the lane `nccl`.
    pub fn exchanged_partials_bytes_total(&self) -> u64 {
        self.now.exchanged_partials_bytes.load(Ordering::Relaxed)
    }

    /// Epochs of that lane that were over before all partials named in them went.
    pub fn attend_epochs_lost_total(&self) -> u64 {
        self.now.attend_epochs_lost.load(Ordering::Relaxed)
    }

    /// Partials are named to be exchanged.
    pub(crate) fn exchanges_partials(&self, bytes: u64) {
        self.now.exchanged_partials_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// An epoch is over, and with it partials that were named.
    pub(crate) fn lost_attend_epoch(&self) {
        self.now.attend_epochs_lost.fetch_add(1, Ordering::Relaxed);
    }

    /// Tells where the budget is.
    pub(crate) fn show_budget(&self, limit: usize, free: &Arc<Semaphore>) {
        let _a_listener_has_one = self.now.budget.set((limit, Arc::downgrade(free)));
    }

    /// There was no room for a stream, or for its next tile.
    pub(crate) fn refused(&self) {
        self.now.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// A connection is closed whose reader reads nothing.
    pub(crate) fn ended_unread(&self) {
        self.now.ended_unread.fetch_add(1, Ordering::Relaxed);
    }

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
