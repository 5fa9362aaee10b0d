//! Memory that exists, for lanes that read tiles straight to where their receiver wants them: as many rooms as were ever needed at the
//! same time and no fewer than caches cannot hold, used around.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use longshore_proto::types::{TileMemory, TileMessage, TileRoom};

/// Bytes that are gone around in.
const RING_BYTES: usize = 32 << 20;

/// Rooms for tiles of one size.
#[derive(Debug)]
pub(super) struct Ring {
    tile_bytes: usize,
    free: Arc<Mutex<VecDeque<Vec<u8>>>>,
}

/// One of them.
pub(super) struct Room {
    bytes: Vec<u8>,
    free: Arc<Mutex<VecDeque<Vec<u8>>>>,
}

impl Ring {
    /// Every page of it is touched.
    pub(super) fn new(tile_bytes: usize) -> Self {
        let rooms = (0..RING_BYTES.div_ceil(tile_bytes)).map(|_| vec![1; tile_bytes]).collect();
        Self { tile_bytes, free: Arc::new(Mutex::new(rooms)) }
    }
}

impl TileMemory for Ring {
    fn room(&self, bytes: usize) -> Option<Box<dyn TileRoom>> {
        if bytes != self.tile_bytes {
            return None;
        }
        let oldest = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let bytes = oldest.unwrap_or_else(|| vec![1; bytes]);
        Some(Box::new(Room { bytes, free: Arc::clone(&self.free) }))
    }
}

/// Whether a tile that was read into a ring is what its sender says; `None` when it was not.
pub(super) fn landed(tile: &TileMessage) -> Option<bool> {
    tile.data.landed::<Room>().map(|(_, crc32c)| crc32c == tile.crc32c)
}

impl AsRef<[u8]> for Room {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AsMut<[u8]> for Room {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push_back(std::mem::take(&mut self.bytes));
    }
}
