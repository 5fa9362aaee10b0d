//! What the shard tells of its blocks: where they belong, and a numbered, bounded log of what came and went.

#[cfg(test)]
mod tests;
mod watch;

use std::collections::{HashMap, VecDeque};

use longshore_blocks::{
    BlockKey, BlockPlace, Namespace,
    pool::{Departure, PoolEvent},
};
use longshore_proto::types::InventoryChange;
use tokio::sync::watch as changes;

pub(crate) use watch::start;

/// Events that are remembered for watchers that resume; older ones are told as a snapshot.
const EVENTS_KEPT: usize = 65_536;

/// One event, of any namespace.
#[derive(Debug, Clone, Copy)]
struct Entry {
    sequence: u64,
    namespace: Namespace,
    key: BlockKey,
    change: InventoryChange,
}

/// Blocks of one namespace that are held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tenant {
    /// How many.
    pub(crate) blocks: u64,
    /// Exclusive or of the first 8 bytes, little endian, of their keys.
    pub(crate) digest: u64,
}

/// Places of the held blocks and the log of events. Lives under the pool's lock and is told everything that the pool does.
#[derive(Debug)]
pub(crate) struct Inventory {
    incarnation: u64,
    sequence: u64,
    log: VecDeque<Entry>,
    places: HashMap<(Namespace, BlockKey), BlockPlace>,
    tenants: HashMap<Namespace, Tenant>,
    changed: changes::Sender<u64>,
}

/// What a watcher is to be told.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// These events of its namespace, in order, complete up to the second number.
    Events(Vec<(u64, BlockKey, InventoryChange)>, u64),
    /// The events that follow its last one are gone.
    Gap,
}

impl Inventory {
    pub(crate) fn new(incarnation: u64) -> Self {
        let (changed, _) = changes::channel(0);
        Self {
            incarnation,
            sequence: 0,
            log: VecDeque::new(),
            places: HashMap::new(),
            tenants: HashMap::new(),
            changed,
        }
    }

    /// Start of the shard.
    pub(crate) fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Number of the last event.
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Shows the number of the last event as it changes.
    pub(crate) fn changes(&self) -> changes::Receiver<u64> {
        self.changed.subscribe()
    }

    /// What is held of a namespace.
    pub(crate) fn tenant(&self, namespace: Namespace) -> Tenant {
        self.tenants.get(&namespace).copied().unwrap_or_default()
    }

    /// Notes what places a block that is held. What is known already stays.
    pub(crate) fn place(&mut self, namespace: Namespace, key: BlockKey, place: Option<BlockPlace>) {
        if let Some(place) = place {
            self.places.entry((namespace, key)).or_insert(place);
        }
    }

    /// Every held block whose place is known.
    pub(crate) fn placed(&self) -> Vec<(Namespace, BlockKey, BlockPlace)> {
        self.places.iter().map(|((namespace, key), place)| (*namespace, *key, *place)).collect()
    }

    /// How many held blocks have a place that is known.
    pub(crate) fn placed_blocks(&self) -> u64 {
        self.places.len() as u64
    }

    /// What places a held block.
    pub(crate) fn place_of(&self, namespace: Namespace, key: BlockKey) -> Option<BlockPlace> {
        self.places.get(&(namespace, key)).copied()
    }

    /// Takes note of what the pool did.
    pub(crate) fn apply(&mut self, events: Vec<PoolEvent>) {
        if events.is_empty() {
            return;
        }
        for PoolEvent { namespace, key, gone } in events {
            let change = match gone {
                None => InventoryChange::Stored,
                Some(Departure::Evicted) => InventoryChange::Evicted,
                Some(Departure::Condemned) => InventoryChange::Condemned,
                Some(Departure::Moved) => InventoryChange::Moved,
            };
            self.count(namespace, key, change);
            self.sequence += 1;
            if self.log.len() == EVENTS_KEPT {
                self.log.pop_front();
            }
            self.log.push_back(Entry { sequence: self.sequence, namespace, key, change });
        }
        self.changed.send_replace(self.sequence);
    }

    fn count(&mut self, namespace: Namespace, key: BlockKey, change: InventoryChange) {
        let tenant = self.tenants.entry(namespace).or_default();
        let (word, _) = key.0.split_first_chunk::<8>().expect("a key has 16 bytes");
        tenant.digest ^= u64::from_le_bytes(*word);
        if change == InventoryChange::Stored {
            tenant.blocks += 1;
            return;
        }
        tenant.blocks -= 1;
        if tenant.blocks == 0 {
            self.tenants.remove(&namespace);
        }
        self.places.remove(&(namespace, key));
    }

    /// At most `limit` events of a namespace after number `after`.
    pub(crate) fn news(&self, namespace: Namespace, after: u64, limit: usize) -> News {
        let first_kept = self.log.front().map_or(self.sequence + 1, |entry| entry.sequence);
        if after > self.sequence || after + 1 < first_kept {
            return News::Gap;
        }
        let skipped = usize::try_from(after + 1 - first_kept).unwrap_or(usize::MAX);
        let (mut events, mut told) = (Vec::new(), after);
        for entry in self.log.iter().skip(skipped) {
            if events.len() == limit {
                return News::Events(events, told);
            }
            told = entry.sequence;
            if entry.namespace == namespace {
                events.push((entry.sequence, entry.key, entry.change));
            }
        }
        News::Events(events, told)
    }
}
