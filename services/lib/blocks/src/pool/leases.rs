//! Blocks in memory that were promised for a while and that no view pins: by the end of the promise, among all and among those of a tenant.

use std::collections::BTreeSet;

use super::Generation;
use crate::Namespace;

/// The promises.
#[derive(Debug, Default)]
pub(super) struct Leases {
    by_end: BTreeSet<(u64, Generation)>,
    by_tenant: BTreeSet<([u8; 32], u64, Generation)>,
}

impl Leases {
    pub(super) fn insert(&mut self, tenant: Namespace, (until_ms, generation): (u64, Generation)) {
        self.by_end.insert((until_ms, generation));
        self.by_tenant.insert((*tenant.as_bytes(), until_ms, generation));
    }

    /// Whether it was there.
    pub(super) fn remove(&mut self, tenant: Namespace, (until_ms, generation): (u64, Generation)) -> bool {
        self.by_tenant.remove(&(*tenant.as_bytes(), until_ms, generation));
        self.by_end.remove(&(until_ms, generation))
    }

    /// The one that ends first.
    pub(super) fn first(&self) -> Option<(u64, Generation)> {
        self.by_end.first().copied()
    }

    /// The one of `tenant` that ends first.
    pub(super) fn first_of(&self, tenant: Namespace) -> Option<Generation> {
        let own = *tenant.as_bytes();
        let first = self.by_tenant.range((own, 0, Generation(0))..).next();
        first.filter(|(tenant, ..)| *tenant == own).map(|(.., generation)| *generation)
    }

    #[cfg(test)]
    pub(super) fn contains(&self, lease: &(u64, Generation)) -> bool {
        assert_eq!(self.by_end.len(), self.by_tenant.len(), "both orders have the same blocks");
        self.by_end.contains(lease)
    }

    #[cfg(test)]
    pub(super) fn of(&self, tenant: Namespace) -> usize {
        self.by_tenant.iter().filter(|(owner, ..)| owner == tenant.as_bytes()).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_a_tenant_is_found_among_those_of_others() {
        let tenants = [1, 2, 3].map(|byte| Namespace::from_bytes([byte; 32]));
        let mut leases = Leases::default();
        for (number, (tenant, until_ms)) in (1u64..).zip([(0, 5), (2, 1), (1, 9), (1, 7), (0, 2)]) {
            leases.insert(tenants[tenant], (until_ms, Generation(number)));
        }
        assert_eq!(
            tenants.map(|tenant| leases.first_of(tenant)),
            [5, 4, 2].map(|number| Some(Generation(number)))
        );
        assert_eq!(leases.first(), Some((1, Generation(2))));
        assert!(
            leases.remove(tenants[2], (1, Generation(2))) && !leases.remove(tenants[2], (1, Generation(2)))
        );
        assert_eq!((leases.first_of(tenants[2]), leases.first()), (None, Some((2, Generation(5)))));
        assert_eq!(leases.first_of(Namespace::from_bytes([0; 32])), None);
        assert!(leases.contains(&(9, Generation(3))) && leases.of(tenants[1]) == 2);
    }
}
