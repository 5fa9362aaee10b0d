//! A picture of the cluster at one epoch.

#[cfg(test)]
mod tests;

use longshore_blocks::{ShardEntry, ShardId, ShardMap};

use crate::{Error, Member, Role};

/// Members that a cluster has at most.
pub const MEMBERS_MAX: usize = 4096;

/// The members at one epoch. The epoch changes exactly when the set of shards (id, weight, labels) changes, so that equal epochs
/// mean equal placement, in whatever order members were told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterView {
    epoch: u64,
    members: Vec<Member>,
}

impl ClusterView {
    /// Sorts members by role and id and derives the epoch: the first 8 bytes of BLAKE3 over the shards.
    pub fn new(mut members: Vec<Member>) -> Result<Self, Error> {
        if members.len() > MEMBERS_MAX {
            return Err(Error::TooMany { members: members.len(), members_max: MEMBERS_MAX });
        }
        members.iter().try_for_each(Member::check)?;
        let mut ids: Vec<&str> = members.iter().map(|member| member.id.as_str()).collect();
        ids.sort_unstable();
        if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::Taken { id: pair[0].to_owned() });
        }
        members.sort_by(|a, b| (a.role, &a.id).cmp(&(b.role, &b.id)));
        let epoch = epoch_of(members.iter().filter(|member| member.role == Role::KvStore));
        Ok(Self { epoch, members })
    }

    /// Epoch of the shard map.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Everybody, sorted by role and id.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The member with this id.
    pub fn member(&self, id: &str) -> Option<&Member> {
        self.members.iter().find(|member| member.id == id)
    }

    /// Members of one role.
    pub fn with_role(&self, role: Role) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(move |member| member.role == role)
    }

    /// The shard map of this epoch.
    pub fn shard_map(&self) -> ShardMap {
        let shards = self.with_role(Role::KvStore).map(|m| {
            ShardEntry::new(ShardId(m.id.clone()), m.weight).located(&m.labels.host, &m.labels.zone)
        });
        ShardMap::new(self.epoch, shards.collect()).expect("a view has unique ids and positive weights")
    }
}

/// First 8 bytes, little endian, of BLAKE3 over (length of id, id, weight, labels that are set) of the shards, sorted by id. Addresses and
/// incarnations do not count: a shard that restarts keeps its stripes.
fn epoch_of<'a>(shards: impl Iterator<Item = &'a Member>) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key("longshore.v1 shard map epoch");
    for shard in shards {
        hasher.update(&(shard.id.len() as u64).to_le_bytes());
        hasher.update(shard.id.as_bytes());
        hasher.update(&shard.weight.to_le_bytes());
        // Clusters without labels keep the epochs of the time before there were any.
        for (name, label) in [("host", &shard.labels.host), ("zone", &shard.labels.zone)] {
            if !label.is_empty() {
                hasher.update(name.as_bytes());
                hasher.update(&(label.len() as u64).to_le_bytes());
                hasher.update(label.as_bytes());
            }
        }
    }
    let mut word = [0; 8];
    hasher.finalize_xof().fill(&mut word);
    u64::from_le_bytes(word)
}
