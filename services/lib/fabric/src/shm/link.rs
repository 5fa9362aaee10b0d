//! One connection's shared memory: slots lent to the peer, slots that the peer lent.

use std::{
    io,
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use longshore_proto::{
    WireError,
    types::{ForeignBytes, TileData, TileMessage},
    v1,
};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use tokio::{io::Interest, net::UnixStream};

use super::{
    arena::{Arena, Window},
    slots::{Slots, Ticket},
};

/// Bytes of a slot, which holds one tile.
pub(crate) const SLOT_BYTES: usize = 2 << 20;
/// Smaller bodies go through the socket: a slot costs two system calls.
const SHARED_BYTES_MIN: usize = 16 << 10;
/// How long a writer waits for a slot before it sends through the socket instead: a reader that keeps its slots delays nobody longer.
const SLOT_PATIENCE: Duration = Duration::from_millis(200);
/// Slot and generation, four bytes each.
const RELEASE_BYTES: usize = 8;

/// Shared memory of one connection.
#[derive(Debug)]
pub(crate) struct Link {
    arena: Arena,
    slots: Mutex<Slots>,
    window: Arc<Window>,
    /// Releases in both directions.
    bell: Arc<UnixStream>,
    /// Part of a release that came in two pieces.
    partial: Mutex<Vec<u8>>,
    calls: AtomicU64,
}

/// The slots that one call lends. They come back with their releases, and some time after the call at the latest.
#[derive(Debug)]
pub(crate) struct Lender {
    link: Arc<Link>,
    call: u64,
}

impl Link {
    pub(super) fn new(arena: Arena, window: Window, bell: UnixStream) -> Self {
        let slots = Mutex::new(Slots::new((arena.bytes() / SLOT_BYTES) as u32));
        Self {
            arena,
            slots,
            window: Arc::new(window),
            bell: Arc::new(bell),
            partial: Mutex::default(),
            calls: AtomicU64::new(0),
        }
    }

    /// A call begins.
    pub(crate) fn lender(self: &Arc<Self>) -> Lender {
        Lender { link: Arc::clone(self), call: self.calls.fetch_add(1, Ordering::Relaxed) }
    }

    /// Slots that the peer has not released.
    #[cfg(test)]
    pub(crate) fn slots_lent(&self) -> usize {
        let _gone = self.take_releases();
        self.slots().lent()
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot for `call`, waiting for a release when all are lent. `None` when the peer keeps them or is gone.
    async fn slot(&self, call: u64) -> Option<Ticket> {
        let waiting = async {
            loop {
                let gone = self.take_releases().is_err();
                let lent = self.slots().lend(call, Instant::now());
                if lent.is_some() || gone {
                    return lent;
                }
                let released = || match self.take_releases()? {
                    0 => Err(io::ErrorKind::WouldBlock.into()),
                    _ => Ok(()),
                };
                self.bell.async_io(Interest::READABLE, released).await.ok()?;
            }
        };
        tokio::time::timeout(SLOT_PATIENCE, waiting).await.ok().flatten()
    }

    /// Takes what the peer released, which is so many bytes; an error when it is gone.
    fn take_releases(&self) -> io::Result<usize> {
        let mut partial = self.partial.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut buffer, mut bytes) = ([0; 512], 0);
        loop {
            let count = match recv(self.bell.as_fd(), &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((count, _)) => count,
                Err(rustix::io::Errno::AGAIN) => return Ok(bytes),
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            bytes += count;
            partial.extend_from_slice(&buffer[..count]);
            let whole = partial.len() / RELEASE_BYTES * RELEASE_BYTES;
            let mut slots = self.slots();
            for release in partial[..whole].chunks_exact(RELEASE_BYTES) {
                // A word that means no slot in use is stale or a lie; either way nothing of ours depends on it.
                slots.release(ticket(release));
            }
            drop(slots);
            partial.drain(..whole);
        }
    }

    /// The tile of a message that names a slot; messages with their own bytes pass.
    pub(crate) fn receive(&self, mut wire: v1::Tile) -> Result<TileMessage, WireError> {
        let Some(shared) = wire.shared.take() else { return TileMessage::try_from(wire) };
        if !wire.data.is_empty() {
            return Err(WireError::invalid("shared", "is set beside `data`"));
        }
        let body = self.borrow(&shared)?;
        let mut tile = TileMessage::try_from(wire)?;
        let part = tile.data.heads().cloned();
        let data = TileData::from_foreign(Arc::new(body));
        tile.data = part.map_or(data.clone(), |part| data.of_heads(part));
        Ok(tile)
    }

    /// The slot that the peer names; refused when there is no such one.
    pub(super) fn borrow(&self, shared: &v1::SharedBytes) -> Result<Slot, WireError> {
        let slots = self.window_slots();
        if shared.slot >= slots || shared.bytes as usize > SLOT_BYTES {
            let problem = format!(
                "names {} bytes of slot {}, there are {slots} slots of {SLOT_BYTES} bytes",
                shared.bytes, shared.slot
            );
            return Err(WireError::invalid("shared", problem));
        }
        Ok(Slot {
            window: Arc::clone(&self.window),
            bell: Arc::clone(&self.bell),
            ticket: Ticket { slot: shared.slot, generation: shared.generation },
            bytes: shared.bytes as usize,
        })
    }

    fn window_slots(&self) -> u32 {
        (self.window.bytes() / SLOT_BYTES) as u32
    }
}

impl Lender {
    /// Copies a tile's body into shared memory and says where; `None` when it must travel on the socket.
    pub(crate) async fn place(&self, tile: &TileMessage) -> Option<v1::Tile> {
        if !(SHARED_BYTES_MIN..=SLOT_BYTES).contains(&tile.data.len()) {
            return None;
        }
        let ticket = self.link.slot(self.call).await?;
        let shared = self.write(ticket, &tile.data.pieces());
        let bare = TileMessage { data: bytes::Bytes::new().into(), ..tile.clone() };
        let heads = tile.data.heads().map(Into::into);
        Some(v1::Tile { shared: Some(shared), heads, ..v1::Tile::from(bare) })
    }

    /// Copies bytes into a slot that is free now and says where; `None` when they must travel on the socket.
    pub(super) fn place_now(&self, data: &bytes::Bytes) -> Option<v1::SharedBytes> {
        if !(SHARED_BYTES_MIN..=SLOT_BYTES).contains(&data.len()) {
            return None;
        }
        self.link.take_releases().ok()?;
        let ticket = self.link.slots().lend(self.call, Instant::now())?;
        Some(self.write(ticket, std::slice::from_ref(data)))
    }

    fn write(&self, ticket: Ticket, pieces: &[bytes::Bytes]) -> v1::SharedBytes {
        let begin = ticket.slot as usize * SLOT_BYTES;
        let mut at = begin;
        for piece in pieces {
            self.link.arena.write(at, piece);
            at += piece.len();
        }
        v1::SharedBytes { slot: ticket.slot, generation: ticket.generation, bytes: (at - begin) as u32 }
    }
}

impl Drop for Lender {
    fn drop(&mut self) {
        self.link.slots().end(self.call, Instant::now());
    }
}

fn ticket(release: &[u8]) -> Ticket {
    let number = |at: usize| u32::from_le_bytes(std::array::from_fn(|byte| release[at + byte]));
    Ticket { slot: number(0), generation: number(4) }
}

/// A slot that the peer lent; released when nobody can ask for its bytes any more.
pub(super) struct Slot {
    window: Arc<Window>,
    bell: Arc<UnixStream>,
    ticket: Ticket,
    bytes: usize,
}

impl ForeignBytes for Slot {
    fn bytes(&self) -> usize {
        self.bytes
    }

    fn copy_to(&self, offset: usize, into: &mut [u8]) {
        assert!(offset <= self.bytes && into.len() <= self.bytes - offset, "beyond the end of the slot");
        self.window.copy_to(self.ticket.slot as usize * SLOT_BYTES + offset, into);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut release = [0; RELEASE_BYTES];
        release[..4].copy_from_slice(&self.ticket.slot.to_le_bytes());
        release[4..].copy_from_slice(&self.ticket.generation.to_le_bytes());
        // Never waits: a peer that does not read its releases loses slots of its own.
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let _peer_is_gone = send(self.bell.as_fd(), &release, flags);
    }
}

#[cfg(test)]
mod tests {
    use longshore_blocks::{BlockKey, crc32c};

    use super::*;
    use crate::shm::{accept, connect};

    async fn pair(slots: usize) -> (Arc<Link>, Arc<Link>) {
        let (a, b) = UnixStream::pair().unwrap();
        let (a, b) = tokio::join!(connect(a, slots * SLOT_BYTES), accept(b, slots * SLOT_BYTES));
        (a.unwrap().1, b.unwrap().1)
    }

    fn tile(byte: u8, bytes: usize) -> TileMessage {
        let data = vec![byte; bytes];
        TileMessage {
            key: BlockKey([byte; 16]),
            layer: 1,
            crc32c: crc32c(&data),
            data: data.into(),
            place: None,
        }
    }

    #[tokio::test]
    async fn tiles_go_through_slots_and_slots_come_back() {
        let (a, b) = pair(2).await;
        let lender = a.lender();
        for round in 0..20u8 {
            let sent = tile(round, 100_000);
            let wire = lender.place(&sent).await.expect("a slot is free");
            assert!(wire.data.is_empty());
            let read = b.receive(wire).unwrap();
            let mut copy = vec![0; 100_000];
            assert_eq!(read.data.copy_to(&mut copy), Ok(sent.crc32c));
            assert_eq!(read, sent);
        }
        assert_eq!(a.slots_lent(), 0);
        assert!(lender.place(&tile(1, 100)).await.is_none(), "small bodies stay on the socket");
        assert!(lender.place(&tile(1, SLOT_BYTES + 1)).await.is_none());
    }

    #[tokio::test]
    async fn a_reader_that_keeps_its_slots_stops_nobody() {
        let (a, b) = pair(1).await;
        let lender = a.lender();
        let kept = b.receive(lender.place(&tile(1, 50_000)).await.unwrap()).unwrap();
        assert!(lender.place(&tile(2, 50_000)).await.is_none(), "the tile goes through the socket");
        drop(kept);
        assert!(lender.place(&tile(3, 50_000)).await.is_some());
        drop(b);
        assert!(lender.place(&tile(4, 50_000)).await.is_none(), "the peer is gone");
    }

    #[tokio::test]
    async fn slots_that_do_not_exist_are_refused_by_name() {
        let (a, b) = pair(2).await;
        let lender = a.lender();
        let good = lender.place(&tile(1, 50_000)).await.unwrap();
        let shared = good.shared.unwrap();
        let check = |shared: v1::SharedBytes| {
            let fault = b.receive(v1::Tile { shared: Some(shared), ..good.clone() }).unwrap_err();
            assert_eq!(fault.field(), "shared", "{fault}");
        };
        check(v1::SharedBytes { slot: 2, ..shared });
        check(v1::SharedBytes { slot: u32::MAX, ..shared });
        check(v1::SharedBytes { bytes: SLOT_BYTES as u32 + 1, ..shared });
        check(v1::SharedBytes { bytes: u32::MAX, ..shared });
        let both = v1::Tile { data: vec![1].into(), ..good.clone() };
        assert_eq!(b.receive(both).unwrap_err().field(), "shared");
    }

    #[tokio::test]
    async fn bytes_that_change_under_the_reader_fail_its_check() {
        let (a, b) = pair(1).await;
        let lender = a.lender();
        let sent = tile(1, 50_000);
        let read = b.receive(lender.place(&sent).await.unwrap()).unwrap();
        a.arena.write(7, &[0xff]);
        let mut copy = vec![0; 50_000];
        assert_ne!(read.data.copy_to(&mut copy), Ok(sent.crc32c));
    }

    #[tokio::test]
    async fn lies_about_releases_change_nothing() {
        let (a, b) = pair(2).await;
        let lender = a.lender();
        let first = lender.place(&tile(1, 50_000)).await.unwrap().shared.unwrap();
        let lie = |slot: u32, generation: u32| {
            let release = [slot.to_le_bytes(), generation.to_le_bytes()].concat();
            send(b.bell.as_fd(), &release, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).unwrap();
        };
        lie(first.slot, first.generation.wrapping_add(1));
        lie(7, 0);
        lie(u32::MAX, u32::MAX);
        send(b.bell.as_fd(), &[1, 2, 3], SendFlags::DONTWAIT).unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(a.slots_lent(), 1);
    }
}
