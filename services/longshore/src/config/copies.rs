//! Copies that can never be: no two copies of a block lie on one host, so there are at most as many as hosts with shards.

use longshore_blocks::ShardMap;

use super::StoreConfig;

/// `store.copies` is more than there can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TooManyCopies {
    /// `longshore up` starts fewer shards.
    #[error(
        "`store.copies` is {copies}, and {shards} {} started; no two copies of a block lie on one shard, so nothing would be as safe \
         as asked for; hint: start more (`--shards {copies}`), or lower `--copies` to {shards}{}",
        if *shards == 1 { "shard is" } else { "shards are" },
        acks_too(*write_acks, *shards)
    )]
    Started {
        /// Copies that were asked for.
        copies: usize,
        /// Copies that must be confirmed.
        write_acks: usize,
        /// Shards that there will be.
        shards: usize,
    },
    /// The member list has fewer hosts with shards.
    #[error(
        "`store.copies` is {copies}, and `cluster.members` lists shards on {hosts} {}; no two copies of a block lie on one host; hint: list \
         more shards in every process (`--member kvstore=ID@http://HOST:PORT`, those that fail apart with `;host=` labels of their own), \
         or lower `--copies` to {hosts}{}",
        if *hosts == 1 { "host" } else { "hosts" },
        acks_too(*write_acks, *hosts)
    )]
    Listed {
        /// Copies that were asked for.
        copies: usize,
        /// Copies that must be confirmed.
        write_acks: usize,
        /// Hosts with shards.
        hosts: usize,
    },
}

/// What else has to be lowered.
fn acks_too(write_acks: usize, most: usize) -> String {
    if write_acks > most {
        format!(" and `--write-acks` (it is {write_acks}) with it")
    } else {
        String::new()
    }
}

impl StoreConfig {
    /// Refuses more copies than `longshore up` starts shards.
    pub(crate) fn check_started(&self, shards: usize) -> Result<(), TooManyCopies> {
        let (copies, write_acks) = (self.copies, self.write_acks);
        if copies > shards { Err(TooManyCopies::Started { copies, write_acks, shards }) } else { Ok(()) }
    }

    /// Refuses more copies than hosts with shards. A list without shards is refused elsewhere.
    pub(crate) fn check_listed(&self, map: &ShardMap) -> Result<(), TooManyCopies> {
        let (copies, write_acks, hosts) = (self.copies, self.write_acks, hosts(map));
        match hosts > 0 && copies > hosts {
            true => Err(TooManyCopies::Listed { copies, write_acks, hosts }),
            false => Ok(()),
        }
    }
}

/// Hosts with shards.
fn hosts(map: &ShardMap) -> usize {
    (0..map.shards().len()).filter(|&shard| map.host_of(shard) == shard).count()
}

#[cfg(test)]
mod tests {
    use longshore_blocks::{ShardEntry, ShardId};

    use super::*;

    fn rule(copies: usize, write_acks: usize) -> StoreConfig {
        StoreConfig { copies, write_acks, ..StoreConfig::default() }
    }

    #[test]
    fn as_many_copies_as_shards_are_fine_and_more_name_field_limit_and_remedy() {
        assert_eq!(rule(1, 1).check_started(1), Ok(()));
        assert_eq!(rule(3, 3).check_started(3), Ok(()));
        let error = rule(3, 2).check_started(1).unwrap_err().to_string();
        for sign in ["`store.copies` is 3", "1 shard is started", "--shards 3", "`--copies` to 1", "it is 2"]
        {
            assert!(error.contains(sign), "`{sign}` is missing in {error}");
        }
        assert!(!rule(3, 2).check_started(2).unwrap_err().to_string().contains("--write-acks"));
    }

    #[test]
    fn shards_on_one_host_count_once() {
        let entry = |id: &str, host: &str| ShardEntry::new(ShardId(id.to_owned()), 1).located(host, "");
        let map = |entries: Vec<ShardEntry>| ShardMap::new(1, entries).unwrap();
        let two_hosts = map(vec![entry("a", "x"), entry("b", "x"), entry("c", "")]);
        assert_eq!(rule(2, 1).check_listed(&two_hosts), Ok(()));
        let error = rule(3, 1).check_listed(&two_hosts).unwrap_err().to_string();
        for sign in ["`store.copies` is 3", "2 hosts", "--member", "`--copies` to 2"] {
            assert!(error.contains(sign), "`{sign}` is missing in {error}");
        }
        assert_eq!(rule(3, 1).check_listed(&map(Vec::new())), Ok(()));
    }
}
