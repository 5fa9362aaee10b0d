//! Blocks that are complete.

use std::{
    any::Any,
    fmt,
    sync::{Arc, OnceLock},
};

use crate::{BlockKey, Namespace};

/// Tells apart the blocks that were ever sealed in one pool, those of equal keys too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Generation(pub(super) u64);

/// One tile and its checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// The tile.
    pub payload: T,
    /// CRC-32C of its body, as it was verified when the tile came in.
    pub crc32c: u32,
}

/// A complete block: one page per layer. Immutable.
#[derive(Debug)]
pub struct SealedBlock<T> {
    namespace: Namespace,
    key: BlockKey,
    generation: Generation,
    pages: Vec<Page<T>>,
    notes: Vec<Note>,
}

/// What the holder made of a page, once.
#[derive(Default)]
struct Note(OnceLock<Arc<dyn Any + Send + Sync>>);

impl fmt::Debug for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Note({})", if self.0.get().is_some() { "made" } else { "none" })
    }
}

impl<T> SealedBlock<T> {
    pub(super) fn new(
        namespace: Namespace,
        key: BlockKey,
        generation: Generation,
        pages: Vec<Page<T>>,
    ) -> Self {
        let notes = pages.iter().map(|_| Note::default()).collect();
        Self { namespace, key, generation, pages, notes }
    }

    /// What the holder noted of the page of `layer`, if it did: a summary, say. It lives as long as this handle, wherever the
    /// page itself lies. Not counted against the budget of the pool.
    pub fn note<N: Any + Send + Sync>(&self, layer: usize) -> Option<Arc<N>> {
        Arc::clone(self.notes.get(layer)?.0.get()?).downcast().ok()
    }

    /// Notes something of the page of `layer`. Of several notes the first stays.
    pub fn take_note<N: Any + Send + Sync>(&self, layer: usize, note: Arc<N>) {
        if let Some(place) = self.notes.get(layer) {
            // Whoever came first made the same: blocks are immutable.
            let _same = place.0.set(note);
        }
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

    /// Pages by layer.
    pub fn pages(&self) -> &[Page<T>] {
        &self.pages
    }

    /// The same block with the payload of one layer changed and its checksum kept.
    pub(super) fn rotten(&self, layer: u32, rot: impl Fn(&T) -> T) -> Self
    where
        T: Clone,
    {
        let mut pages = self.pages.clone();
        if let Some(page) = pages.get_mut(layer as usize) {
            page.payload = rot(&page.payload);
        }
        Self::new(self.namespace, self.key, self.generation, pages)
    }
}
