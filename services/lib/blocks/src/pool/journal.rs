//! What came and went, for inventories; and blocks that lie elsewhere as well.

use std::sync::Arc;

use super::{BlockPool, Generation, SealedBlock};
use crate::{BlockKey, Namespace};

/// Why a block is no longer found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Departure {
    /// It made room for another one.
    Evicted,
    /// Its bytes failed a check.
    Condemned,
    /// It was given up because it lies elsewhere.
    Moved,
}

/// A block came or went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolEvent {
    /// Whose block it is.
    pub namespace: Namespace,
    /// Key.
    pub key: BlockKey,
    /// Why it went; `None` when it came.
    pub gone: Option<Departure>,
}

impl<T> BlockPool<T> {
    /// Keeps events from now on. Whoever asks for it takes them after every use of the pool, so that there are never more than one
    /// use makes.
    pub fn keep_journal(&mut self) {
        self.journal.get_or_insert_default();
    }

    /// The events since the last call, in order.
    pub fn take_events(&mut self) -> Vec<PoolEvent> {
        self.journal.as_mut().map(std::mem::take).unwrap_or_default()
    }

    pub(super) fn note(&mut self, namespace: Namespace, key: BlockKey, gone: Option<Departure>) {
        if let Some(journal) = &mut self.journal {
            journal.push(PoolEvent { namespace, key, gone });
        }
    }

    /// Says which blocks are held sealed and promises nothing: no lease, no use, no count.
    pub fn peek(&self, namespace: Namespace, keys: &[BlockKey]) -> Vec<bool> {
        keys.iter().map(|key| self.index.contains_key(&(namespace, *key))).collect()
    }

    /// A sealed block, without counting as a use.
    pub fn peek_block(&self, namespace: Namespace, key: BlockKey) -> Option<Arc<SealedBlock<T>>> {
        let generation = self.index.get(&(namespace, key))?;
        self.held.get(generation).map(|held| held.block.clone())
    }

    /// Keys of the blocks of a namespace that are held sealed, in no order.
    pub fn keys(&self, namespace: Namespace) -> Vec<BlockKey> {
        self.index.keys().filter(|(owner, _)| *owner == namespace).map(|(_, key)| *key).collect()
    }

    /// Gives up a block that lies elsewhere too. False when it is not held, a view pins it or its retention lease runs: then it
    /// stays.
    pub fn relinquish(&mut self, namespace: Namespace, key: BlockKey, now_ms: u64) -> bool {
        let Some(&generation) = self.index.get(&(namespace, key)) else { return false };
        if !self.is_idle(generation, now_ms) {
            return false;
        }
        self.remove(generation);
        self.note(namespace, key, Some(Departure::Moved));
        true
    }

    fn is_idle(&self, generation: Generation, now_ms: u64) -> bool {
        self.held.get(&generation).is_some_and(|held| held.pins == 0 && held.lease_until_ms <= now_ms)
    }
}
