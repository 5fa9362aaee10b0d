//! Blocks that are complete.

use std::{
    any::Any,
    sync::{Arc, PoisonError, RwLock},
};

use crate::{
    BlockKey, Namespace,
    tier::{Extent, Tier},
};

/// Tells apart the blocks that were ever sealed in one pool, those of equal keys too, and those that a restart found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Generation(pub(super) u64);

impl Generation {
    /// The number, as it is kept beside the block on a tier.
    pub fn number(self) -> u64 {
        self.0
    }
}

/// One tile and its checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// The tile.
    pub payload: T,
    /// CRC-32C of its body, as it was verified when the tile came in.
    pub crc32c: u32,
}

/// The tiles of a block, one per layer.
pub type Pages<T> = Arc<[Page<T>]>;

/// Where the tiles of a block are at the moment. It may change as soon as it was asked for; what is held here stays readable.
#[derive(Debug)]
pub enum Payload<T> {
    /// In memory.
    Memory(Pages<T>),
    /// On the tier below.
    Disk(Arc<Extent>),
}

/// A complete block: one page per layer. Its contents never change; its tiles move between the tiers.
#[derive(Debug)]
pub struct SealedBlock<T> {
    namespace: Namespace,
    key: BlockKey,
    generation: Generation,
    /// CRC-32C by layer; stays when the tiles leave memory.
    checksums: Box<[u32]>,
    place: RwLock<Place<T>>,
    /// By layer; empty while there is none.
    notes: RwLock<Vec<Option<Note>>>,
}

/// What the holder made of a page.
pub type Note = Arc<dyn Any + Send + Sync>;

#[derive(Debug)]
enum Place<T> {
    /// In memory, and perhaps also below.
    Memory(Pages<T>, Option<Arc<Extent>>),
    Disk(Arc<Extent>),
}

impl<T> SealedBlock<T> {
    pub(super) fn new(
        namespace: Namespace,
        key: BlockKey,
        generation: Generation,
        pages: Vec<Page<T>>,
    ) -> Self {
        let checksums = pages.iter().map(|page| page.crc32c).collect();
        Self::at(namespace, key, generation, checksums, Place::Memory(pages.into(), None))
    }

    /// A block that lies on the tier below.
    pub(super) fn on_disk(
        namespace: Namespace,
        key: BlockKey,
        generation: Generation,
        checksums: Box<[u32]>,
        extent: Arc<Extent>,
    ) -> Self {
        Self::at(namespace, key, generation, checksums, Place::Disk(extent))
    }

    fn at(
        namespace: Namespace,
        key: BlockKey,
        generation: Generation,
        checksums: Box<[u32]>,
        place: Place<T>,
    ) -> Self {
        Self { namespace, key, generation, checksums, place: RwLock::new(place), notes: RwLock::default() }
    }

    /// What the holder noted of the page of `layer` ([`super::BlockPool::take_note`]), while it is kept, wherever the page lies.
    pub fn note<N: Any + Send + Sync>(&self, layer: usize) -> Option<Arc<N>> {
        let notes = self.notes.read().unwrap_or_else(PoisonError::into_inner);
        notes.get(layer)?.clone()?.downcast().ok()
    }

    pub(super) fn has_note(&self, layer: usize) -> bool {
        let notes = self.notes.read().unwrap_or_else(PoisonError::into_inner);
        notes.get(layer).is_some_and(Option::is_some)
    }

    /// False when there is a note, which is the same (blocks are immutable), or no such layer.
    pub(super) fn put_note(&self, layer: usize, note: Note) -> bool {
        let mut notes = self.notes.write().unwrap_or_else(PoisonError::into_inner);
        if notes.is_empty() {
            notes.resize(self.checksums.len(), None);
        }
        match notes.get_mut(layer) {
            Some(place @ None) => {
                *place = Some(note);
                true
            }
            _ => false,
        }
    }

    pub(super) fn drop_notes(&self) {
        *self.notes.write().unwrap_or_else(PoisonError::into_inner) = Vec::new();
    }

    /// Whose block it is.
    pub fn namespace(&self) -> Namespace {
        self.namespace
    }

    /// Key.
    pub fn key(&self) -> BlockKey {
        self.key
    }

    /// Generation, never given to another block of the pool.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// CRC-32C of the tiles, by layer.
    pub fn checksums(&self) -> &[u32] {
        &self.checksums
    }

    /// Where the tiles are now.
    pub fn payload(&self) -> Payload<T> {
        match &*self.read() {
            Place::Memory(pages, _) => Payload::Memory(pages.clone()),
            Place::Disk(extent) => Payload::Disk(extent.clone()),
        }
    }

    /// Which tier the tiles are read from now.
    pub fn tier(&self) -> Tier {
        match &*self.read() {
            Place::Memory(..) => Tier::Dram,
            Place::Disk(_) => Tier::Disk,
        }
    }

    /// The tiles when they are in memory.
    pub fn pages(&self) -> Option<Pages<T>> {
        match self.payload() {
            Payload::Memory(pages) => Some(pages),
            Payload::Disk(_) => None,
        }
    }

    /// The place below memory that holds the block too or alone.
    pub(super) fn extent(&self) -> Option<Arc<Extent>> {
        match &*self.read() {
            Place::Memory(_, copy) => copy.clone(),
            Place::Disk(extent) => Some(extent.clone()),
        }
    }

    /// The tiles were written to `extent` and leave memory.
    pub(super) fn leave_memory(&self, extent: Arc<Extent>) {
        *self.write() = Place::Disk(extent);
    }

    /// The tiles are in memory again; what is on disk stays as a copy.
    pub(super) fn enter_memory(&self, pages: Pages<T>) {
        let extent = self.extent();
        *self.write() = Place::Memory(pages, extent);
    }

    /// Forgets the copy below memory of a block that is in memory.
    pub(super) fn drop_copy(&self) -> Option<Arc<Extent>> {
        match &mut *self.write() {
            Place::Memory(_, copy) => copy.take(),
            Place::Disk(_) => None,
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Place<T>> {
        // Only whole values are written under the lock.
        self.place.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Place<T>> {
        self.place.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the payload of one layer and keeps its checksum. False when the tiles are not in memory.
    pub(super) fn rot(&self, layer: u32, rot: impl Fn(&T) -> T) -> bool
    where
        T: Clone,
    {
        let Place::Memory(pages, _) = &mut *self.write() else { return false };
        let mut rotten = pages.to_vec();
        if let Some(page) = rotten.get_mut(layer as usize) {
            page.payload = rot(&page.payload);
        }
        *pages = rotten.into();
        true
    }
}
