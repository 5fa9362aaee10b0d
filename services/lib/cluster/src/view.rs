//! A picture of the cluster at one epoch.

use longshore_blocks::{ShardEntry, ShardId, ShardMap};

/// What a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Front door.
    Router,
    /// Computes KV.
    Prefill,
    /// Generates.
    Decode,
    /// Holds KV.
    KvStore,
}

/// One process.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Member {
    /// Unique in the cluster, 1 to 63 characters of `a-z`, `0-9`, `-`.
    pub id: String,
    /// What it does.
    pub role: Role,
    /// `http://host:port` or `local:id`.
    pub address: String,
    /// Changes with every start of the process; 0 where nobody knows it (static membership).
    pub incarnation: u64,
    /// Share of stripes; only for shards, at least 1.
    pub weight: u32,
}

/// The members at one epoch. The epoch changes exactly when the set of shards (id, weight) changes, so that equal epochs
/// mean equal placement, in whatever order members were told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterView {
    epoch: u64,
    members: Vec<Member>,
}

impl ClusterView {
    /// Sorts members by role and id and derives the epoch: the first 8 bytes of BLAKE3 over the shards.
    pub fn new(_members: Vec<Member>) -> Result<Self, crate::Error> {
        todo!()
    }

    /// Epoch of the shard map.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Everybody, sorted by role and id.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Members of one role.
    pub fn with_role(&self, role: Role) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(move |member| member.role == role)
    }

    /// The shard map of this epoch.
    pub fn shard_map(&self) -> ShardMap {
        let shards = self.with_role(Role::KvStore).map(|m| ShardEntry { id: ShardId(m.id.clone()), weight: m.weight });
        ShardMap::new(self.epoch, shards.collect()).expect("a view has unique ids and positive weights")
    }
}
