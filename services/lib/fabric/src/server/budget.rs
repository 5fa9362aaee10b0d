//! Bytes of tiles that are under way at a listener. A stream waits for its own; those of all streams of a peer, of a tenant and of the
//! listener are bounded by waiting for a while and refusing then, so that whoever takes and keeps them harms himself first.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak},
    time::Duration,
};

use longshore_blocks::Namespace;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};

use super::ServerOptions;
use crate::{Code, Error, TileTraffic};

/// When what was refused may be tried again.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// Bytes that some streams have together.
#[derive(Debug, Clone)]
struct Share {
    who: &'static str,
    limit: usize,
    free: Arc<Semaphore>,
}

impl Share {
    fn new(who: &'static str, limit: usize) -> Self {
        let limit = limit.clamp(1, Semaphore::MAX_PERMITS);
        Self { who, limit, free: Arc::new(Semaphore::new(limit)) }
    }

    /// What is larger than the whole share takes all of it.
    fn permits(&self, bytes: usize) -> u32 {
        u32::try_from(bytes.min(self.limit)).unwrap_or(u32::MAX)
    }

    fn full(&self, bytes: usize) -> Error {
        let Self { who, limit, .. } = self;
        let text = format!(
            "{who} has no room for {bytes} more bytes of tiles under way, of {limit} in all; hint: retry later"
        );
        Error::new(Code::ResourceExhausted, text).with_retry_after(RETRY_AFTER)
    }

    /// Takes bytes that are free now.
    fn take(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Error> {
        let taken = Arc::clone(&self.free).try_acquire_many_owned(self.permits(bytes));
        taken.map_err(|_| self.full(bytes))
    }

    /// Waits for bytes until `end`.
    async fn wait(&self, bytes: usize, end: Instant) -> Result<OwnedSemaphorePermit, Error> {
        let waiting = Arc::clone(&self.free).acquire_many_owned(self.permits(bytes));
        match timeout_at(end, waiting).await {
            Ok(Ok(taken)) => Ok(taken),
            Ok(Err(_)) | Err(_) => Err(self.full(bytes)),
        }
    }
}

/// The bounds of one listener and what is under way; clones share it.
#[derive(Debug, Clone)]
pub(super) struct Budget {
    /// Bytes that one stream may have under way, which HTTP/2 may hold unread beside them.
    stream_bytes: usize,
    /// What HTTP/2 may hold unread of all streams of a connection.
    connection_bytes: usize,
    /// What a stream may read beyond the message that it reads.
    frame_bytes: usize,
    tenant_bytes_max: usize,
    peer_bytes_max: usize,
    patience: Duration,
    listener: Share,
    tenants: Arc<Mutex<HashMap<Namespace, Weak<Semaphore>>>>,
    traffic: TileTraffic,
}

/// What a listener knows of the tiles of one gRPC connection.
#[derive(Debug, Default)]
pub(crate) struct Peer {
    share: OnceLock<Share>,
    /// Store streams whose tiles come as its messages, of each tenant that has some.
    writers: Mutex<HashMap<Namespace, usize>>,
}

/// How the tiles of a stream travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Travel {
    /// To a reader. What is read for it is not told here, so it has a window's worth from begin to end.
    Out,
    /// From a writer as messages, of which HTTP/2 holds some unread.
    InMessages,
    /// From a writer on a tile connection, where what is not read stays with the kernel.
    InFrames,
}

/// One tile stream under way.
#[derive(Debug)]
pub(super) struct Reservation {
    stream: Share,
    /// Of the peer, the tenant and the listener. All streams wait for them in one order, so that nobody waits in a circle.
    shares: [Share; 3],
    patience: Duration,
    traffic: TileTraffic,
    _kept: Kept,
}

/// What a stream has from begin to end.
#[derive(Debug)]
enum Kept {
    Nothing,
    Window { _of: [OwnedSemaphorePermit; 3] },
    Unread { _of: Unread },
}

/// Bytes of a tile that are under way until this is dropped.
pub(super) type Room = [OwnedSemaphorePermit; 4];

impl Budget {
    pub(super) fn new(options: &ServerOptions, traffic: TileTraffic) -> Self {
        let listener = Share::new("the listener", options.tile_bytes_max);
        traffic.show_budget(listener.limit, &listener.free);
        Self {
            stream_bytes: options.stream_window_bytes.max(1) as usize,
            connection_bytes: options.connection_window_bytes as usize,
            frame_bytes: options.frame_bytes_max as usize,
            tenant_bytes_max: options.tenant_tile_bytes_max,
            peer_bytes_max: options.peer_tile_bytes_max,
            patience: options.tile_room_patience,
            listener,
            tenants: Arc::default(),
            traffic,
        }
    }

    /// Room for a stream of `tenant` from `peer`; refused where there is none now.
    pub(super) fn reserve(
        &self,
        tenant: Namespace,
        peer: &Arc<Peer>,
        travel: Travel,
    ) -> Result<Reservation, Error> {
        self.reserved(tenant, peer, travel).inspect_err(|_| self.traffic.refused())
    }

    fn reserved(&self, tenant: Namespace, peer: &Arc<Peer>, travel: Travel) -> Result<Reservation, Error> {
        let of_peer = peer.share.get_or_init(|| Share::new("the connection", self.peer_bytes_max)).clone();
        let shares = [of_peer, self.share_of(tenant), self.listener.clone()];
        let kept = match travel {
            Travel::Out => {
                let [peer, tenant, listener] = &shares;
                let take = |share: &Share| share.take(self.stream_bytes);
                Kept::Window { _of: [take(peer)?, take(tenant)?, take(listener)?] }
            }
            Travel::InMessages => {
                let [of_peer, of_tenant, listener] = shares.clone();
                Kept::Unread { _of: Unread::of_one_more(self, peer, tenant, [of_peer, of_tenant, listener])? }
            }
            Travel::InFrames => Kept::Nothing,
        };
        let stream = Share::new("the stream", self.stream_bytes);
        Ok(Reservation {
            stream,
            shares,
            patience: self.patience,
            traffic: self.traffic.clone(),
            _kept: kept,
        })
    }

    /// The share of a tenant lasts as long as a stream of his or a tile that is under way.
    fn share_of(&self, tenant: Namespace) -> Share {
        let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        tenants.retain(|_, share| share.strong_count() > 0);
        let mut share = Share::new("the tenant", self.tenant_bytes_max);
        match tenants.get(&tenant).and_then(Weak::upgrade) {
            Some(free) => share.free = free,
            None => drop(tenants.insert(tenant, Arc::downgrade(&share.free))),
        }
        share
    }

    /// What HTTP/2 may hold unread of so many store streams of one connection, and what they read beyond their messages.
    fn unread(&self, streams: usize) -> usize {
        let windows = streams.saturating_mul(self.stream_bytes).min(self.connection_bytes);
        windows.saturating_add(streams.saturating_mul(self.frame_bytes))
    }

    /// What the next store stream adds to that where there are so many. A tenant has on every connection what his streams would have
    /// there alone: whichever streams end first, what a connection keeps is counted for those that are left.
    fn of_stream_after(&self, streams: usize) -> usize {
        self.unread(streams + 1) - self.unread(streams)
    }

    #[cfg(test)]
    fn taken(&self) -> usize {
        self.listener.limit - self.listener.free.available_permits()
    }
}

impl Reservation {
    /// Waits until the stream may have so many bytes more under way, which it then has until what this gives is dropped. A stream waits
    /// for itself as long as it takes, for others as long as the listener is patient. A tile that is larger than a bound goes alone.
    pub(super) async fn room(&self, bytes: usize) -> Result<Room, Error> {
        let stream = &self.stream;
        let own = Arc::clone(&stream.free).acquire_many_owned(stream.permits(bytes)).await;
        let own = own.map_err(|_| stream.full(bytes))?;
        let end = Instant::now() + self.patience;
        let waiting = async {
            let [peer, tenant, listener] = &self.shares;
            // The tenant's first: others share the connection, and whoever waits keeps what he has.
            let tenant = tenant.wait(bytes, end).await?;
            Ok([own, tenant, peer.wait(bytes, end).await?, listener.wait(bytes, end).await?])
        };
        waiting.await.inspect_err(|_| self.traffic.refused())
    }
}

/// What HTTP/2 may hold because of one store stream more on its connection.
#[derive(Debug)]
struct Unread {
    budget: Budget,
    peer: Arc<Peer>,
    tenant: Namespace,
    /// Of the peer, the tenant and the listener.
    shares: [Share; 3],
}

impl Unread {
    fn of_one_more(
        budget: &Budget,
        peer: &Arc<Peer>,
        tenant: Namespace,
        shares: [Share; 3],
    ) -> Result<Self, Error> {
        let mut writers = peer.writers.lock().unwrap_or_else(PoisonError::into_inner);
        let (all, own) = (writers.values().sum(), writers.get(&tenant).copied().unwrap_or(0));
        let [of_all, of_own] = [all, own].map(|streams| budget.of_stream_after(streams));
        let [of_peer, of_tenant, of_listener] = &shares;
        let taken = [of_peer.take(of_all)?, of_tenant.take(of_own)?, of_listener.take(of_all)?];
        // They come back by the number of streams that are left, whichever those are.
        taken.into_iter().for_each(OwnedSemaphorePermit::forget);
        writers.insert(tenant, own + 1);
        drop(writers);
        Ok(Self { budget: budget.clone(), peer: Arc::clone(peer), tenant, shares })
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        let mut writers = self.peer.writers.lock().unwrap_or_else(PoisonError::into_inner);
        let own = writers.remove(&self.tenant).map_or(0, |own| own.saturating_sub(1));
        if own > 0 {
            writers.insert(self.tenant, own);
        }
        let [of_all, of_own] = [writers.values().sum(), own].map(|left| self.budget.of_stream_after(left));
        for (share, bytes) in self.shares.iter().zip([of_all, of_own, of_all]) {
            share.free.add_permits(share.permits(bytes) as usize);
        }
    }
}

#[cfg(test)]
mod tests;
