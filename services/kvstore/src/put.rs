//! Put streams: tiles come in, are verified and copied; blocks are acknowledged as soon as they are complete.

use std::{collections::HashMap, sync::Arc, time::Duration};

use longshore_attention::Tile;
use longshore_blocks::{
    BlockKey, Namespace,
    pool::{Admission, Page, Put, WriterId},
};
use longshore_chassis::Tasks;
use longshore_fabric::{BoxStream, CallContext, Lane, PART_REFUSED, TileRooms};
use longshore_proto::types::{Identity, PutAck, PutOutcome, TileMessage, WireTileShape};
use tokio::sync::mpsc;

use crate::{
    Error, lifetime,
    lifetime::{Kind, Outlet, Taken},
    store::Store,
};

const KIND: Kind =
    Kind { task: "kvstore-put", stream: "put", stalling: "no acknowledgement was taken", unread: 64 };
/// Bytes of tiles that are copied at a time.
const BATCH_BYTES: usize = 4 << 20;
/// Refused blocks of which more tiles may still come, in one stream.
const SETTLED_MAX: usize = 8_192;

/// Starts a put stream.
pub(crate) fn start(
    store: &Arc<Store>,
    tasks: &Tasks,
    ctx: &CallContext,
    identity: &Identity,
    shape: &WireTileShape,
    tiles: mpsc::Receiver<TileMessage>,
) -> Result<BoxStream<PutAck>, Error> {
    store.check_identity(identity)?;
    store.check_shape(shape)?;
    let writer = store.with_pool(|pool, _| pool.open_writer(identity.namespace))?;
    store.metrics.lanes.put(ctx.lane);
    let namespace = identity.namespace;
    let session = Session { store: store.clone(), namespace, writer, blocks: HashMap::new(), settled: 0 };
    let lane = ctx.lane;
    Ok(lifetime::run((store, tasks, ctx), KIND, move |store, acks| async move {
        tokio::select! {
            ended = receive(session, lane, tiles, &acks) => ended,
            error = stalled(&store, writer) => Err(error),
        }
    }))
}

/// Resolves when the stream keeps room for blocks that it does not go on with.
async fn stalled(store: &Store, writer: WriterId) -> Error {
    let stall_ms = store.config().stall_ms;
    loop {
        let left_ms = store.with_pool(|pool, now| pool.patience_left_ms(writer, stall_ms, now));
        if left_ms == Some(0) {
            store.metrics.stalled("put");
            return Error::Stalled { stream: "put", what: "no tile of an incomplete block came", stall_ms };
        }
        tokio::time::sleep(Duration::from_millis(left_ms.unwrap_or(stall_ms))).await;
    }
}

/// Takes tiles until the stream ends. The session ends with this future, wherever it is: its incomplete blocks are dropped.
async fn receive(
    mut session: Session,
    lane: Lane,
    mut tiles: mpsc::Receiver<TileMessage>,
    acks: &Outlet<PutAck>,
) -> Result<(), Error> {
    let store = session.store.clone();
    let batch_max = (BATCH_BYTES / store.identity().tile_shape.bytes()).clamp(1, 64);
    loop {
        let mut batch = Vec::with_capacity(batch_max);
        if tiles.recv_many(&mut batch, batch_max).await == 0 {
            return Ok(());
        }
        store.metrics.lanes.received(lane, batch.iter().map(|tile| tile.data.len() as u64).sum());
        let turn = store.put_turns().turn(session.namespace).await;
        let (returned, outcome) = store
            .off_reactor(move || {
                let _turn = turn;
                let outcome = session.take_all(batch);
                (session, outcome)
            })
            .await?;
        session = returned;
        for ack in outcome? {
            if acks.send(&store, ack).await? == Taken::Gone {
                return Ok(());
            }
        }
    }
}

/// One put stream.
struct Session {
    store: Arc<Store>,
    namespace: Namespace,
    writer: WriterId,
    blocks: HashMap<BlockKey, Progress>,
    /// Entries of `blocks` that were answered.
    settled: usize,
}

/// A block of which some tiles came.
struct Progress {
    /// By layer.
    seen: Vec<bool>,
    /// It was refused or not needed; the rest of its tiles is passed over. A layer that comes again begins a new attempt.
    settled: bool,
}

/// Why a tile ends its block, as the acknowledgement tells it.
struct Refusal {
    outcome: PutOutcome,
    message: String,
}

impl Refusal {
    fn corrupt(message: String) -> Self {
        Self { outcome: PutOutcome::Corrupt, message }
    }
}

impl Session {
    fn take_all(&mut self, batch: Vec<TileMessage>) -> Result<Vec<PutAck>, Error> {
        let mut acks = Vec::new();
        for tile in batch {
            acks.extend(self.take(&tile)?);
        }
        Ok(acks)
    }

    /// One tile; an acknowledgement when it completes or ends its block.
    fn take(&mut self, tile: &TileMessage) -> Result<Option<PutAck>, Error> {
        if tile.data.heads().is_some() {
            let (field, problem) = PART_REFUSED;
            return Err(Error::invalid(field, problem));
        }
        if !self.is_wanted(tile) {
            return Ok(None);
        }
        let refusal = match self.store_tile(tile) {
            Ok(None) => return Ok(None),
            Ok(Some(PutOutcome::Stored)) => {
                self.blocks.remove(&tile.key);
                self.store.metrics.stored(self.store.identity());
                return Ok(Some(PutAck {
                    key: tile.key,
                    outcome: PutOutcome::Stored,
                    message: String::new(),
                }));
            }
            Ok(Some(outcome)) => Refusal { outcome, message: String::new() },
            Err(refusal) => refusal,
        };
        self.settle(tile.key)?;
        self.store.metrics.refused(refusal.outcome);
        Ok(Some(PutAck { key: tile.key, outcome: refusal.outcome, message: refusal.message }))
    }

    /// Passes over the tiles of a block that was answered already.
    fn is_wanted(&mut self, tile: &TileMessage) -> bool {
        let layers = self.store.identity().layers as usize;
        let fresh = || Progress { seen: vec![false; layers], settled: false };
        let progress = self.blocks.entry(tile.key).or_insert_with(fresh);
        // A layer that does not exist is told as such below, unless the block was answered already.
        let Some(seen) = progress.seen.get_mut(tile.layer as usize) else { return !progress.settled };
        let again = std::mem::replace(seen, true);
        if !progress.settled {
            return true;
        }
        if again {
            *progress = fresh();
            progress.seen[tile.layer as usize] = true;
            self.settled -= 1;
            return true;
        }
        if progress.seen.iter().all(|seen| *seen) {
            self.blocks.remove(&tile.key);
            self.settled -= 1;
        }
        false
    }

    fn settle(&mut self, key: BlockKey) -> Result<(), Error> {
        self.store.with_pool(|pool, _| pool.discard(self.writer, key));
        let Some(progress) = self.blocks.get_mut(&key) else { return Ok(()) };
        if progress.seen.iter().all(|seen| *seen) {
            self.blocks.remove(&key);
            return Ok(());
        }
        progress.settled = true;
        self.settled += 1;
        if self.settled > SETTLED_MAX {
            return Err(Error::Deaf { limit: SETTLED_MAX });
        }
        Ok(())
    }

    /// Whether no tile of a block came before this one.
    fn is_first(&self, key: BlockKey) -> bool {
        self.blocks.get(&key).is_none_or(|progress| progress.seen.iter().filter(|seen| **seen).count() <= 1)
    }

    /// Verifies and copies a tile. `None` while its block is incomplete.
    fn store_tile(&self, message: &TileMessage) -> Result<Option<PutOutcome>, Refusal> {
        let shape = self.store.identity().tile_shape;
        if self.store.drain.refuses() && self.is_first(message.key) {
            let message = format!("shard `{}` is being drained", self.store.identity().shard_id);
            return Err(Refusal { outcome: PutOutcome::NoSpace, message });
        }
        let wanted = self.store.admit(self.writer, message.key, message.layer);
        match wanted.map_err(|error| refusal(&error))? {
            Admission::Wanted => {}
            Admission::Duplicate => {
                self.store.with_inventory(|pool, inventory, _| {
                    if pool.peek(self.namespace, &[message.key]) == [true] {
                        inventory.place(self.namespace, message.key, message.place);
                    }
                });
                return Ok(Some(PutOutcome::Duplicate));
            }
            Admission::Repeated { crc32c } => return repeated(message, crc32c),
            Admission::MakeRoom => unreachable!("asked until there is room or a refusal"),
        }
        let bad =
            |error: &dyn std::fmt::Display| Refusal::corrupt(format!("layer {}: {error}", message.layer));
        if message.data.len() != shape.bytes() {
            let problem =
                format!("`body` has {} bytes, its shape needs {}", message.data.len(), shape.bytes());
            return Err(bad(&problem));
        }
        // The copy is checked, not the message: what is stored is what the checksum stands for. Some lanes made the copy already.
        let (tile, crc32c) = match TileRooms::new(shape).landed(message) {
            Some(landed) => landed,
            None => {
                let filled = Tile::filled(shape, |body| message.data.copy_to(body));
                let (tile, copied) = filled.map_err(|error| bad(&error))?;
                (Arc::new(tile), copied.map_err(|error| bad(&error))?)
            }
        };
        if crc32c != message.crc32c {
            return Err(Refusal::corrupt(format!("layer {} does not match its checksum", message.layer)));
        }
        // The executor passes over keys that are no numbers, which would be a wrong answer and not an error.
        if !tile.is_finite() {
            let problem = "holds a value that is no finite number; hint: use f32 KV if the model exceeds f16";
            return Err(Refusal::corrupt(format!("layer {} {problem}", message.layer)));
        }
        let page = Page { payload: tile, crc32c };
        let put = self.store.with_inventory(|pool, inventory, now| {
            let put = pool.put(self.writer, message.key, message.layer, page, now);
            if matches!(put, Ok(Put::Sealed(_))) {
                inventory.place(self.namespace, message.key, message.place);
            }
            put
        });
        match put.map_err(|error| refusal(&error))? {
            Put::Open => Ok(None),
            Put::Sealed(_) => Ok(Some(PutOutcome::Stored)),
            Put::Duplicate => Ok(Some(PutOutcome::Duplicate)),
            Put::Repeated { crc32c } => repeated(message, crc32c),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.store.with_pool(|pool, _| pool.close_writer(self.writer));
    }
}

/// The same tile twice is harmless, another one in its place is not.
fn repeated(message: &TileMessage, first: u32) -> Result<Option<PutOutcome>, Refusal> {
    if first == message.crc32c {
        return Ok(None);
    }
    Err(Refusal::corrupt(format!("layer {} came twice with different contents", message.layer)))
}

fn refusal(error: &longshore_blocks::Error) -> Refusal {
    let outcome = match error.kind() {
        longshore_blocks::Kind::NoSpace => PutOutcome::NoSpace,
        _ => PutOutcome::Corrupt,
    };
    Refusal { outcome, message: error.to_string() }
}
