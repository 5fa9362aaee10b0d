//! Bytes of tiles that are under way: bounded for each stream by waiting, for each tenant and each peer by refusing streams.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use longshore_blocks::Namespace;
use longshore_proto::types::TileMessage;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::ServerOptions;
use crate::{Code, Error};

/// When a refused stream may be tried again.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// The bounds of one listener and what is under way; clones share it.
#[derive(Debug, Clone)]
pub(super) struct Budget {
    /// Bytes that one stream may have under way.
    stream_bytes: usize,
    tenant_streams_max: usize,
    peer_streams_max: usize,
    tenants: Arc<Mutex<HashMap<Namespace, usize>>>,
}

/// One tile stream under way.
#[derive(Debug)]
pub(super) struct Reservation {
    budget: Budget,
    tenant: Namespace,
    peer: Arc<AtomicUsize>,
    bytes: Arc<Semaphore>,
}

impl Budget {
    pub(super) fn new(options: &ServerOptions) -> Self {
        let stream_bytes = options.stream_window_bytes.max(1) as usize;
        let streams = |bytes: usize| (bytes / stream_bytes).max(1);
        Self {
            stream_bytes,
            tenant_streams_max: streams(options.tenant_tile_bytes_max),
            peer_streams_max: streams(options.peer_tile_bytes_max),
            tenants: Arc::default(),
        }
    }

    /// Room for a stream of `tenant` from the peer that counts in `peer`.
    pub(super) fn reserve(&self, tenant: Namespace, peer: &Arc<AtomicUsize>) -> Result<Reservation, Error> {
        let full = |who: &str, limit: usize| {
            let text =
                format!("{who} has {limit} tile streams under way, which is the limit; hint: retry later");
            Error::new(Code::ResourceExhausted, text).with_retry_after(RETRY_AFTER)
        };
        let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        let count = tenants.get(&tenant).copied().unwrap_or(0);
        if count >= self.tenant_streams_max {
            return Err(full("the tenant", self.tenant_streams_max));
        }
        if peer.fetch_add(1, Ordering::AcqRel) >= self.peer_streams_max {
            peer.fetch_sub(1, Ordering::AcqRel);
            return Err(full("the connection", self.peer_streams_max));
        }
        tenants.insert(tenant, count + 1);
        Ok(Reservation {
            budget: self.clone(),
            tenant,
            peer: Arc::clone(peer),
            bytes: Arc::new(Semaphore::new(self.stream_bytes)),
        })
    }

    #[cfg(test)]
    fn tenants_under_way(&self) -> usize {
        self.tenants.lock().unwrap().len()
    }
}

impl Reservation {
    /// Waits until the stream may have `tile` under way too, which it then has until the last clone of its body is dropped.
    pub(super) async fn charge(&self, mut tile: TileMessage) -> TileMessage {
        if let Some(held) = self.room(tile.data.len()).await {
            tile.data = tile.data.holding(held);
        }
        tile
    }

    /// Waits until the stream may have so many bytes more under way, which it then has until what this gives is dropped.
    pub(super) async fn room(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        // A tile that is larger than the bound goes alone.
        let bytes = u32::try_from(bytes.min(self.budget.stream_bytes)).unwrap_or(u32::MAX);
        Arc::clone(&self.bytes).acquire_many_owned(bytes).await.ok()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.peer.fetch_sub(1, Ordering::AcqRel);
        let mut tenants = self.budget.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = tenants.get_mut(&self.tenant) {
            *count -= 1;
            if *count == 0 {
                tenants.remove(&self.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use longshore_blocks::BlockKey;

    use super::*;

    fn budget() -> Budget {
        Budget::new(&ServerOptions {
            stream_window_bytes: 1000,
            tenant_tile_bytes_max: 2000,
            peer_tile_bytes_max: 3000,
            ..ServerOptions::default()
        })
    }

    #[test]
    fn tenants_and_peers_are_refused_apart_and_everything_comes_back() {
        let budget = budget();
        let tenant = |byte| Namespace::from_bytes([byte; 32]);
        let (one, other) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let a = [budget.reserve(tenant(1), &one).unwrap(), budget.reserve(tenant(1), &one).unwrap()];
        let refused = budget.reserve(tenant(1), &other).unwrap_err();
        assert_eq!((refused.code, refused.retry_after), (Code::ResourceExhausted, Some(RETRY_AFTER)));
        let b = budget.reserve(tenant(2), &one).unwrap();
        assert!(budget.reserve(tenant(3), &one).unwrap_err().message.contains("connection"));
        let c = budget.reserve(tenant(3), &other).unwrap();
        drop((a, b, c));
        assert_eq!((one.load(Ordering::SeqCst), other.load(Ordering::SeqCst)), (0, 0));
        assert_eq!(budget.tenants_under_way(), 0);
    }

    #[tokio::test]
    async fn a_stream_waits_for_its_bytes() {
        let budget = budget();
        let stream = budget.reserve(Namespace::from_bytes([1; 32]), &Arc::default()).unwrap();
        let tile = |bytes: usize| TileMessage {
            key: BlockKey([1; 16]),
            layer: 0,
            data: vec![0; bytes].into(),
            crc32c: 0,
            place: None,
        };
        let first = stream.charge(tile(600)).await;
        let patience = Duration::from_millis(50);
        assert!(tokio::time::timeout(patience, stream.charge(tile(600))).await.is_err());
        let small = stream.charge(tile(400)).await;
        drop((first, small));
        let large = stream.charge(tile(5000)).await;
        assert_eq!(large.data.len(), 5000);
    }
}
