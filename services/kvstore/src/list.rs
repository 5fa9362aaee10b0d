//! Pages of held blocks for operators, checked where they lie when somebody asks for it.

use std::sync::Arc;

use longshore_blocks::{
    BlockPlace,
    pool::{Generation, Listed, Moving},
    tier::Tier,
};
use longshore_proto::types::{BlockEntry, BlockPage, BlockState, ListBlocks};

use crate::{Error, store::Store};

/// Bytes that are checked for one page: a page is to come in seconds, from a slow disk too.
const CHECKED_BYTES_MAX: u64 = 256 << 20;

/// One page.
pub(crate) async fn page(store: &Arc<Store>, list: ListBlocks) -> Result<BlockPage, Error> {
    let worker = Arc::clone(store);
    store.off_reactor(move || worker.page(&list)).await
}

impl Store {
    fn page(&self, list: &ListBlocks) -> BlockPage {
        let (namespaces, keys) = (Prefix::new(&list.namespace_prefix), Prefix::new(&list.key_prefix));
        let limit = list.limit as usize;
        let listed: Vec<(Listed, Option<BlockPlace>)> = self.with_inventory(|pool, inventory, now| {
            let listed = pool.list(
                |namespace, key| namespaces.begins(namespace.as_bytes()) && keys.begins(&key.0),
                list.after,
                limit,
                now,
            );
            let place = |block: Listed| (block, inventory.place_of(block.namespace, block.key));
            listed.into_iter().map(place).collect()
        });
        let is_full = listed.len() >= limit;
        let (mut blocks, mut last, mut checked_bytes) = (Vec::with_capacity(listed.len()), None, 0);
        for (block, place) in listed {
            if checked_bytes >= CHECKED_BYTES_MAX {
                return BlockPage { blocks, next: last };
            }
            last = Some((block.namespace, block.key));
            let mut entry = self.entry(&block, place);
            if list.check {
                checked_bytes += entry.bytes;
                // A block that went meanwhile is no finding.
                let Some((sound, checksums)) = self.checked(block.generation) else { continue };
                (entry.sound, entry.checksums) = (Some(sound), checksums);
            }
            blocks.push(entry);
        }
        BlockPage { blocks, next: last.filter(|_| is_full) }
    }

    fn entry(&self, block: &Listed, place: Option<BlockPlace>) -> BlockEntry {
        BlockEntry {
            namespace: block.namespace,
            key: block.key,
            tier: block.tier.name().to_owned(),
            state: match block.moving {
                None => BlockState::Sealed,
                Some(Moving::Down) => BlockState::Leaving,
                Some(Moving::Up) => BlockState::Rising,
            },
            bytes: self.block_bytes(),
            views: block.pins,
            lease_ms: block.lease_ms,
            on_disk_too: block.tier == Tier::Dram && block.below_too,
            place,
            generation: block.generation.number(),
            sound: None,
            checksums: Vec::new(),
        }
    }

    /// Whether a block's tiles match their checksums, and those. A damaged block is dropped.
    fn checked(&self, generation: Generation) -> Option<(bool, Vec<u32>)> {
        let block = self.with_pool(|pool, _| pool.block(generation))?;
        let (_, sound) = self.check_block(&block, 0..self.identity().layers);
        Some((sound, block.checksums().to_vec()))
    }
}

/// The first digits of a digest or key.
struct Prefix(Vec<u8>);

impl Prefix {
    /// Of hexadecimal digits; the wire refuses others.
    fn new(digits: &str) -> Self {
        let value = |digit: char| digit.to_digit(16).map(|value| value as u8);
        Self(digits.chars().filter_map(value).collect())
    }

    fn begins(&self, bytes: &[u8]) -> bool {
        let digit = |at: usize| {
            bytes.get(at / 2).map(|byte| if at.is_multiple_of(2) { byte >> 4 } else { byte & 15 })
        };
        self.0.iter().enumerate().all(|(at, wanted)| digit(at) == Some(*wanted))
    }
}

#[cfg(test)]
mod tests {
    use super::Prefix;

    #[test]
    fn prefixes_are_compared_digit_by_digit() {
        let begins = |digits: &str| Prefix::new(digits).begins(&[0x1a, 0xbc]);
        assert_eq!(["", "1", "1a", "1ab", "1abc"].map(begins), [true; 5]);
        assert_eq!(["0", "a", "1b", "1ac", "1abc0"].map(begins), [false; 5]);
    }
}
