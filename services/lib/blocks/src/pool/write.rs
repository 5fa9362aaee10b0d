//! Writers: who fills blocks, tile by tile.

use std::{collections::HashMap, sync::Arc};

use super::{BlockPool, Generation, Held, Page, Resource, SealedBlock, Stage, tiers::Room};
use crate::{BlockKey, Error, Namespace};

/// Names a writer of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WriterId(u64);

/// Whether a tile is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Bring it: its block has room.
    Wanted,
    /// This writer brought this layer already, with this checksum.
    Repeated {
        /// CRC-32C of the tile that came first.
        crc32c: u32,
    },
    /// The block is held; what this writer brought of it was dropped.
    Duplicate,
    /// Room is being made: carry out a spill ([`BlockPool::next_spill`]) or wait for one to end, then ask again.
    MakeRoom,
}

/// What a tile made of its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// Layers are still missing.
    Open,
    /// The block is complete.
    Sealed(Generation),
    /// The tile was not needed, see [`Admission::Repeated`].
    Repeated {
        /// CRC-32C of the tile that came first.
        crc32c: u32,
    },
    /// The tile was not needed, see [`Admission::Duplicate`].
    Duplicate,
}

/// One writer: a put stream.
#[derive(Debug)]
pub(super) struct Writer<T> {
    pub(super) namespace: Namespace,
    open: HashMap<BlockKey, Open<T>>,
    /// When it last began a block or brought a tile that was missing.
    progress_ms: u64,
}

/// A block that a writer began.
#[derive(Debug)]
enum Open<T> {
    /// Pages by layer.
    Pages(Vec<Option<Page<T>>>),
    /// Another writer was first; remembered until this one asks, since the block may be evicted before that.
    Superseded,
}

impl<T> Writer<T> {
    /// Blocks that it began and that are incomplete.
    pub(super) fn open_blocks(&self) -> u64 {
        self.open.values().filter(|open| matches!(open, Open::Pages(_))).count() as u64
    }
}

impl<T> BlockPool<T> {
    /// A writer of blocks of `namespace`.
    pub fn open_writer(&mut self, namespace: Namespace) -> Result<WriterId, Error> {
        if self.writers.len() >= self.config.writers_max {
            return Err(Error::Full { what: "writers", limit: self.config.writers_max as u64 });
        }
        self.shares.ask(namespace, Resource::Writers, 1, self.config.writers_max as u64)?;
        self.shares.take(namespace, Resource::Writers);
        let id = WriterId(self.next_id());
        self.writers.insert(id, Writer { namespace, open: HashMap::new(), progress_ms: 0 });
        Ok(id)
    }

    /// Asks before a tile is copied whether it is wanted; makes room for its block when it is the first one.
    pub fn admit(
        &mut self,
        writer: WriterId,
        key: BlockKey,
        layer: u32,
        now_ms: u64,
    ) -> Result<Admission, Error> {
        if layer >= self.config.layers {
            let problem = format!("is {layer}, blocks have {} layers", self.config.layers);
            return Err(Error::Invalid { field: "layer", problem });
        }
        let state = self.writer(writer)?;
        let namespace = state.namespace;
        match state.open.get(&key) {
            Some(Open::Pages(pages)) => Ok(match &pages[layer as usize] {
                Some(page) => Admission::Repeated { crc32c: page.crc32c },
                None => Admission::Wanted,
            }),
            Some(Open::Superseded) => {
                state.open.remove(&key);
                self.totals.duplicates += 1;
                Ok(Admission::Duplicate)
            }
            None => self.begin(writer, namespace, key, now_ms),
        }
    }

    fn begin(
        &mut self,
        writer: WriterId,
        namespace: Namespace,
        key: BlockKey,
        now_ms: u64,
    ) -> Result<Admission, Error> {
        if let Some(&generation) = self.index.get(&(namespace, key)) {
            self.renew(generation, now_ms);
            self.totals.duplicates += 1;
            return Ok(Admission::Duplicate);
        }
        self.ask_to_begin(namespace)?;
        if self.make_room(namespace, now_ms)? == Room::Moving {
            return Ok(Admission::MakeRoom);
        }
        let pages = std::iter::repeat_with(|| None).take(self.config.layers as usize).collect();
        let state = self.writer(writer)?;
        state.open.insert(key, Open::Pages(pages));
        state.progress_ms = now_ms;
        self.begun(namespace);
        Ok(Admission::Wanted)
    }

    /// Takes a tile whose checksum and size were verified. The last missing layer seals the block.
    pub fn put(
        &mut self,
        writer: WriterId,
        key: BlockKey,
        layer: u32,
        page: Page<T>,
        now_ms: u64,
    ) -> Result<Put, Error> {
        match self.admit(writer, key, layer, now_ms)? {
            Admission::Wanted => {}
            Admission::Repeated { crc32c } => return Ok(Put::Repeated { crc32c }),
            Admission::Duplicate => return Ok(Put::Duplicate),
            Admission::MakeRoom => return Err(self.no_space()),
        }
        let state = self.writer(writer)?;
        let Some(Open::Pages(pages)) = state.open.get_mut(&key) else {
            unreachable!("an admitted tile has an open block")
        };
        pages[layer as usize] = Some(page);
        state.progress_ms = now_ms;
        if pages.iter().any(Option::is_none) {
            return Ok(Put::Open);
        }
        let pages = pages.iter_mut().filter_map(Option::take).collect();
        state.open.remove(&key);
        let namespace = state.namespace;
        self.ended(namespace);
        Ok(Put::Sealed(self.seal(namespace, key, pages, now_ms)))
    }

    fn seal(&mut self, namespace: Namespace, key: BlockKey, pages: Vec<Page<T>>, now_ms: u64) -> Generation {
        let generation = Generation(self.next_id());
        let block = Arc::new(SealedBlock::new(namespace, key, generation, pages));
        let tick = self.next_tick();
        let (uses, again) = self.ghosts.recall(&(namespace, key), tick, now_ms);
        if let Some(again) = again {
            self.policy.used_again(again);
        }
        let lease_until_ms = now_ms.saturating_add(self.config.retention_ms);
        let held = Held {
            block,
            pins: 0,
            uses,
            lease_until_ms,
            note_bytes: 0,
            condemned: false,
            stage: Stage::Memory,
        };
        self.held.insert(generation, held);
        self.index.insert((namespace, key), generation);
        self.memory_blocks += 1;
        self.queue(generation);
        self.note(namespace, key, None);
        if let Some(disk) = &mut self.disk {
            disk.filter.touch(&key);
        }
        self.totals.stored += 1;
        // The others' pages are of no use any more.
        let mut superseded = 0;
        for writer in self.writers.values_mut().filter(|writer| writer.namespace == namespace) {
            if let Some(open @ Open::Pages(_)) = writer.open.get_mut(&key) {
                *open = Open::Superseded;
                superseded += 1;
            }
        }
        (0..superseded).for_each(|_| self.ended(namespace));
        generation
    }

    /// Drops what a writer brought of one block, because a tile of it was bad.
    pub fn discard(&mut self, writer: WriterId, key: BlockKey) {
        let Some(state) = self.writers.get_mut(&writer) else { return };
        let namespace = state.namespace;
        if matches!(state.open.remove(&key), Some(Open::Pages(_))) {
            self.ended(namespace);
            self.totals.dropped += 1;
        }
    }

    /// Ends a writer and drops its incomplete blocks. Unknown writers are no error.
    pub fn close_writer(&mut self, writer: WriterId) {
        let Some(state) = self.writers.remove(&writer) else { return };
        let dropped = state.open_blocks();
        (0..dropped).for_each(|_| self.ended(state.namespace));
        self.totals.dropped += dropped;
        self.shares.give(state.namespace, Resource::Writers);
    }

    /// Milliseconds that a writer still has to bring a tile that is missing before it counts as stalled: after `patience_ms` without
    /// one. `None` when no block of it is open, or it is unknown.
    pub fn patience_left_ms(&self, writer: WriterId, patience_ms: u64, now_ms: u64) -> Option<u64> {
        let state = self.writers.get(&writer).filter(|state| state.open_blocks() > 0)?;
        Some(state.progress_ms.saturating_add(patience_ms).saturating_sub(now_ms))
    }

    fn writer(&mut self, id: WriterId) -> Result<&mut Writer<T>, Error> {
        self.writers.get_mut(&id).ok_or_else(|| Error::NotFound { what: "the writer".to_owned() })
    }

    /// Blocks that writers began, counted anew.
    #[cfg(test)]
    pub(super) fn count_open(&self) -> u64 {
        let open = self.writers.values().flat_map(|writer| writer.open.values());
        open.filter(|open| matches!(open, Open::Pages(_))).count() as u64
    }
}
