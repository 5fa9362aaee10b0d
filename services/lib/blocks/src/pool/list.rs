//! Lists of held blocks, a page at a time, for operators.

use std::collections::BinaryHeap;

use super::{BlockPool, Generation, Stage};
use crate::{BlockKey, Namespace, tier::Tier};

/// A held block as it is at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listed {
    /// Whose it is.
    pub namespace: Namespace,
    /// Key.
    pub key: BlockKey,
    /// Generation.
    pub generation: Generation,
    /// Tier that it is read from.
    pub tier: Tier,
    /// Whether it is on its way to another tier.
    pub moving: Option<Moving>,
    /// Views that pin it, counted with multiplicity.
    pub pins: u64,
    /// How long its lease still runs, milliseconds.
    pub lease_ms: u64,
    /// It is in memory, and the tier below has it too.
    pub below_too: bool,
}

/// Where a block is on its way to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moving {
    /// The tier below.
    Down,
    /// The tier above.
    Up,
}

/// Order of lists: namespace, then key.
type Name = ([u8; 32], [u8; 16]);

fn name(namespace: &Namespace, key: &BlockKey) -> Name {
    (*namespace.as_bytes(), key.0)
}

impl<T> BlockPool<T> {
    /// The first `limit` blocks after `after`, in the order of namespace and key, of those that `wanted` says yes to. Blocks that
    /// can be found only: neither open nor condemned ones. Looks at every name and keeps `limit` of them.
    pub fn list(
        &self,
        wanted: impl Fn(&Namespace, &BlockKey) -> bool,
        after: Option<(Namespace, BlockKey)>,
        limit: usize,
        now_ms: u64,
    ) -> Vec<Listed> {
        let after = after.map(|(namespace, key)| name(&namespace, &key));
        // The largest name on top: it goes when a smaller one comes.
        let mut first: BinaryHeap<(Name, Generation)> = BinaryHeap::new();
        for ((namespace, key), generation) in &self.index {
            let name = name(namespace, key);
            let is_late = first.len() >= limit && first.peek().is_none_or(|(last, _)| *last <= name);
            if is_late || after.is_some_and(|after| name <= after) || !wanted(namespace, key) {
                continue;
            }
            first.push((name, *generation));
            if first.len() > limit {
                first.pop();
            }
        }
        let listed = first.into_sorted_vec().into_iter();
        listed.filter_map(|(_, generation)| self.listed(generation, now_ms)).collect()
    }

    fn listed(&self, generation: Generation, now_ms: u64) -> Option<Listed> {
        let held = self.held.get(&generation)?;
        let (namespace, key) = (held.block.namespace(), held.block.key());
        let moving = match held.stage {
            Stage::Leaving => Some(Moving::Down),
            Stage::Coming => Some(Moving::Up),
            Stage::Memory | Stage::Disk => None,
        };
        let tier = held.block.tier();
        let below_too = tier == Tier::Dram && held.block.extent().is_some();
        let lease_ms = held.lease_until_ms.saturating_sub(now_ms);
        Some(Listed { namespace, key, generation, tier, moving, pins: held.pins, lease_ms, below_too })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::pool::{Page, PoolConfig};

    fn space(byte: u8) -> Namespace {
        Namespace::from_bytes([byte; 32])
    }

    fn pool(blocks: &[(u8, u8)]) -> BlockPool<u8> {
        let config = PoolConfig {
            budget_bytes: 1_000,
            tile_bytes: 1,
            layers: 1,
            retention_ms: 50,
            writers_max: 4,
            readers_max: 4,
            tenant_percent: 100,
            views_max: 4,
            view_blocks_max: 16,
            view_secret: [7; 32],
        };
        let mut pool = BlockPool::new(config).unwrap();
        for &(namespace, key) in blocks {
            let writer = pool.open_writer(space(namespace)).unwrap();
            let page = Page { payload: key, crc32c: 0 };
            pool.put(writer, BlockKey([key; 16]), 0, page, 10).unwrap();
            pool.close_writer(writer);
        }
        pool
    }

    fn names(listed: &[Listed]) -> Vec<(u8, u8)> {
        listed.iter().map(|block| (block.namespace.as_bytes()[0], block.key.0[0])).collect()
    }

    #[test]
    fn pages_of_any_size_list_every_block_once_and_in_order() {
        let held: Vec<(u8, u8)> = (0..40u32).map(|at| ((at * 7 % 3) as u8, (at * 11 % 41) as u8)).collect();
        let pool = pool(&held);
        let expected: Vec<_> = held.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
        for limit in [1, 2, 7, 39, 40, 41, 100] {
            let (mut all, mut after) = (Vec::new(), None);
            loop {
                let page = pool.list(|_, _| true, after, limit, 20);
                assert!(page.len() <= limit);
                let Some(last) = page.last() else { break };
                after = Some((last.namespace, last.key));
                all.extend(names(&page));
            }
            assert_eq!(all, expected, "{limit}");
        }
        assert_eq!(pool.list(|_, _| true, None, 0, 20), []);
    }

    #[test]
    fn a_filter_leaves_out_what_is_not_wanted_and_nothing_else() {
        let pool = pool(&[(1, 1), (1, 2), (2, 1), (2, 2), (2, 3)]);
        let wanted = |namespace: &Namespace, key: &BlockKey| *namespace == space(2) && key.0[0] != 2;
        assert_eq!(names(&pool.list(wanted, None, 10, 20)), [(2, 1), (2, 3)]);
        assert_eq!(names(&pool.list(wanted, Some((space(2), BlockKey([1; 16]))), 10, 20)), [(2, 3)]);
        assert_eq!(names(&pool.list(wanted, None, 1, 20)), [(2, 1)]);
    }

    #[test]
    fn what_keeps_a_block_is_told() {
        let mut pool = pool(&[(1, 1), (1, 2)]);
        pool.open_view(space(1), &[(0, BlockKey([2; 16]))], 1_000, 20).unwrap();
        let listed = pool.list(|_, _| true, None, 10, 20);
        assert_eq!(
            listed.iter().map(|block| (block.pins, block.lease_ms)).collect::<Vec<_>>(),
            [(0, 40), (1, 40)]
        );
        assert!(
            listed.iter().all(|block| block.tier == Tier::Dram && block.moving.is_none() && !block.below_too)
        );
        assert_eq!(pool.list(|_, _| true, None, 10, 1_000)[0].lease_ms, 0);
        pool.condemn(listed[0].generation);
        assert_eq!(names(&pool.list(|_, _| true, None, 10, 20)), [(1, 2)]);
    }
}
