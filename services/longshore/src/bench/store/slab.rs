//! An end of a lane that is nothing but memory: what a lane can do at most, whatever holds the tiles.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use futures::stream;
use longshore_fabric::{BoxStream, CallContext, Code, Error, Shard};
use longshore_proto::types::{
    AttendAnswer, AttendQuery, GetBlocks, Identity, Lookup, OpenView, OpenedView, PutAck, PutOutcome,
    ShardStats, TileMemory, TileMessage, WireTileShape,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;

use super::{load::Source, ring, ring::Ring};

/// Memory of one store stream, in tiles, used around.
const RING_BYTES: usize = 32 << 20;
/// Acknowledgements that may be unread.
const ACKS_MAX: usize = 16;

/// Takes tiles into memory that exists, and gives those of a source.
#[derive(Debug)]
pub(super) struct SlabShard {
    source: Arc<Source>,
    /// Where lanes that can do so put the tiles that come.
    memory: Arc<Ring>,
    layers: u32,
    verify: bool,
    tasks: TaskTracker,
}

impl SlabShard {
    pub(super) fn new(source: Arc<Source>, layers: u32, verify: bool) -> Self {
        let memory = Arc::new(Ring::new(source.tile_bytes()));
        Self { source, memory, layers, verify, tasks: TaskTracker::new() }
    }
}

/// Copies a tile to where it stays; whether it is what its sender says.
fn land(tile: &TileMessage, into: &mut [u8], verify: bool) -> bool {
    if verify {
        return tile.data.copy_to(into) == Ok(tile.crc32c);
    }
    let mut at = 0;
    for piece in tile.data.pieces() {
        into[at..at + piece.len()].copy_from_slice(&piece);
        at += piece.len();
    }
    at == into.len()
}

/// The same, around in a ring.
pub(super) fn take(ring: &mut [u8], tile: &TileMessage, turn: usize, verify: bool) -> bool {
    let slots = (ring.len() / tile.data.len().max(1)).max(1);
    let begin = turn % slots * tile.data.len();
    ring.get_mut(begin..begin + tile.data.len()).is_some_and(|slot| land(tile, slot, verify))
}

#[async_trait]
impl Shard for SlabShard {
    async fn lookup(&self, _ctx: &CallContext, lookup: Lookup) -> Result<Vec<bool>, Error> {
        Ok(vec![true; lookup.keys.len()])
    }

    async fn put_blocks(
        &self,
        _ctx: &CallContext,
        _identity: Identity,
        _shape: WireTileShape,
        mut tiles: mpsc::Receiver<TileMessage>,
    ) -> Result<BoxStream<PutAck>, Error> {
        let (acks, answer) = mpsc::channel(ACKS_MAX);
        let (layers, verify) = (self.layers, self.verify);
        let (source, mut ring) = (Arc::clone(&self.source), Vec::new());
        self.tasks.spawn(async move {
            let (mut seen, mut turn) = (HashMap::new(), 0);
            while let Some(tile) = tiles.recv().await {
                let sound = match ring::landed(&tile) {
                    Some(sound) => sound,
                    None => {
                        if ring.is_empty() {
                            ring = source.ring(RING_BYTES);
                        }
                        take(&mut ring, &tile, turn, verify)
                    }
                };
                turn += 1;
                let count = seen.entry(tile.key).or_insert(0u32);
                *count += 1;
                if *count < layers && sound {
                    continue;
                }
                seen.remove(&tile.key);
                let outcome = if sound { PutOutcome::Stored } else { PutOutcome::Corrupt };
                if acks.send(Ok(PutAck { key: tile.key, outcome, message: String::new() })).await.is_err() {
                    return;
                }
            }
        });
        Ok(Box::pin(ReceiverStream::new(answer)))
    }

    async fn get_blocks(
        &self,
        _ctx: &CallContext,
        get: GetBlocks,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        let (source, layers) = (Arc::clone(&self.source), self.layers);
        let tiles = get.keys.into_iter().flat_map(move |key| {
            let source = Arc::clone(&source);
            (0..layers).map(move |layer| Ok(Some(source.tile(key, layer))))
        });
        Ok(Box::pin(stream::iter(tiles)))
    }

    fn tile_memory(&self) -> Option<Arc<dyn TileMemory>> {
        Some(self.memory.clone())
    }

    async fn open_view(&self, _ctx: &CallContext, _open: OpenView) -> Result<OpenedView, Error> {
        not_here()
    }

    async fn attend(
        &self,
        _ctx: &CallContext,
        _queries: mpsc::Receiver<AttendQuery>,
    ) -> Result<BoxStream<AttendAnswer>, Error> {
        not_here()
    }

    async fn close_view(&self, _ctx: &CallContext, _view_id: u64) -> Result<(), Error> {
        Ok(())
    }

    async fn stats(&self, _ctx: &CallContext) -> Result<ShardStats, Error> {
        not_here()
    }
}

fn not_here<T>() -> Result<T, Error> {
    Err(Error::new(Code::Unimplemented, "memory of a measurement only takes and gives tiles"))
}
