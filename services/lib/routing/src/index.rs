//! What shards tell of their blocks, namespace by namespace: a hint that says how far a prompt's prefix may be held. Shards number
//! their events; whoever follows resumes after the last one that it took, and compares count and digest now and then. Bounded: of a
//! block it keeps 8 bytes of its key.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};

use longshore_blocks::{BlockKey, Namespace, ShardId};

/// One message of a shard about the blocks of a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct News {
    /// Start of the shard.
    pub incarnation: u64,
    /// All that was known of the shard is to be forgotten: the events begin anew.
    pub reset: bool,
    /// (number, block, whether it is held now), ascending; number 0 for blocks that were held when it began anew.
    pub events: Vec<(u64, BlockKey, bool)>,
    /// Number up to which everything was told.
    pub told: u64,
    /// Blocks that are held; as of `told` in a message without events.
    pub blocks: u64,
    /// Exclusive or of the first 8 bytes, little endian, of their keys.
    pub digest: u64,
}

/// Why a shard's news were not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Untaken {
    /// They do not follow what was told before, or make other blocks than the shard says: begin anew.
    #[error("what the shard tells does not follow what it told before")]
    OutOfStep,
    /// There is no room for so many blocks; the shard's are forgotten.
    #[error("the index has no room for the shard's blocks")]
    Full,
}

/// How well a shard is followed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum State {
    /// Not all of its blocks came yet.
    #[default]
    Filling,
    /// Its blocks are known.
    Current,
    /// Its blocks were known, and nobody listens now.
    Lost,
}

#[derive(Debug, Default)]
struct Followed {
    incarnation: u64,
    told: u64,
    words: HashSet<u64>,
    digest: u64,
    state: State,
}

/// The blocks of the namespaces that are followed, by shard.
#[derive(Debug)]
pub struct InventoryIndex {
    blocks_max: usize,
    blocks: usize,
    followed: HashMap<Namespace, HashMap<ShardId, Followed>>,
}

impl InventoryIndex {
    /// An empty index of at most so many blocks, counted once for each shard that holds them.
    pub fn new(blocks_max: usize) -> Self {
        Self { blocks_max, blocks: 0, followed: HashMap::new() }
    }

    /// Takes what a shard told. After an error the shard is not current until it began anew.
    pub fn take(&mut self, namespace: Namespace, shard: &ShardId, news: &News) -> Result<(), Untaken> {
        let shards = self.followed.entry(namespace).or_default();
        let followed = shards.entry(shard.clone()).or_default();
        let before = followed.words.len();
        let room = self.blocks_max.saturating_sub(self.blocks - before);
        let taken = followed.take(news, room);
        self.blocks = self.blocks - before + followed.words.len();
        if taken.is_err() {
            self.forget(namespace, shard);
        }
        taken
    }

    /// Start of the shard and number of its last event that was taken, to resume there; `None`: begin anew.
    pub fn position(&self, namespace: Namespace, shard: &ShardId) -> Option<(u64, u64)> {
        let followed = self.followed.get(&namespace)?.get(shard)?;
        (followed.state != State::Filling).then_some((followed.incarnation, followed.told))
    }

    /// Nobody listens to the shard now: what is known of it says nothing until it is resumed.
    pub fn lost(&mut self, namespace: Namespace, shard: &ShardId) {
        let followed = self.followed.get_mut(&namespace).and_then(|shards| shards.get_mut(shard));
        match followed {
            Some(followed) if followed.state != State::Filling => followed.state = State::Lost,
            Some(_) => self.forget(namespace, shard),
            None => {}
        }
    }

    /// Forgets a shard's blocks of a namespace.
    pub fn forget(&mut self, namespace: Namespace, shard: &ShardId) {
        let Some(shards) = self.followed.get_mut(&namespace) else { return };
        if let Some(gone) = shards.remove(shard) {
            self.blocks -= gone.words.len();
        }
        if shards.is_empty() {
            self.followed.remove(&namespace);
        }
    }

    /// Whether a shard may hold a block: it says so, or it is not known what it holds.
    pub fn may_hold(&self, namespace: Namespace, shard: &ShardId, key: &BlockKey) -> bool {
        let followed = self.followed.get(&namespace).and_then(|shards| shards.get(shard));
        let current = followed.filter(|followed| followed.state == State::Current);
        current.is_none_or(|followed| followed.words.contains(&word(key)))
    }

    /// Whether the blocks of any shard are known.
    pub fn knows(&self, namespace: Namespace) -> bool {
        let shards = self.followed.get(&namespace);
        shards.is_some_and(|shards| shards.values().any(|followed| followed.state == State::Current))
    }

    /// Blocks in the index.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Pairs of namespace and shard whose blocks are known.
    pub fn current(&self) -> usize {
        let all = self.followed.values().flat_map(HashMap::values);
        all.filter(|followed| followed.state == State::Current).count()
    }
}

impl Followed {
    fn take(&mut self, news: &News, room: usize) -> Result<(), Untaken> {
        if news.reset {
            *self = Self { incarnation: news.incarnation, ..Self::default() };
        }
        if news.incarnation != self.incarnation || news.told < self.told {
            return Err(Untaken::OutOfStep);
        }
        let mut last = self.told;
        for &(number, key, held) in &news.events {
            let follows = match number {
                0 => self.state == State::Filling && held,
                number => number > last && number <= news.told,
            };
            if !follows {
                return Err(Untaken::OutOfStep);
            }
            last = last.max(number);
            self.note(word(&key), held);
            if self.words.len() > room {
                return Err(Untaken::Full);
            }
        }
        self.told = news.told;
        // A message with events may tell of fewer of them than count and digest do.
        match (self.words.len() as u64, self.digest) == (news.blocks, news.digest) {
            true => self.state = State::Current,
            false if news.events.is_empty() => return Err(Untaken::OutOfStep),
            false => {}
        }
        Ok(())
    }

    fn note(&mut self, word: u64, held: bool) {
        let changed = if held { self.words.insert(word) } else { self.words.remove(&word) };
        if changed {
            self.digest ^= word;
        }
    }
}

/// The part of a key that is kept, and that digests are made of.
fn word(key: &BlockKey) -> u64 {
    let (word, _) = key.0.split_first_chunk::<8>().expect("a key has 16 bytes");
    u64::from_le_bytes(*word)
}
