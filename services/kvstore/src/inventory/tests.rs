//! The log: bounded, numbered, per tenant.

use longshore_blocks::{Deployment, EXACT_PREFILL};

use super::*;

fn tenant(salt: u8) -> Namespace {
    Deployment::from_bytes([1; 32]).namespace(EXACT_PREFILL, &[salt])
}

fn key(name: u64) -> BlockKey {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&name.to_le_bytes());
    BlockKey(key)
}

fn stored(inventory: &mut Inventory, namespace: Namespace, name: u64) {
    inventory.apply(vec![PoolEvent { namespace, key: key(name), gone: None }]);
}

#[test]
fn events_are_told_in_pieces_and_from_any_number_on() {
    let mut inventory = Inventory::new(1);
    for name in 0..10 {
        stored(&mut inventory, tenant((name % 2) as u8), name);
    }
    let numbers = |after, limit| match inventory.news(tenant(0), after, limit) {
        News::Events(events, told) => (events.iter().map(|(number, ..)| *number).collect::<Vec<_>>(), told),
        News::Gap => panic!("nothing is gone"),
    };
    assert_eq!(numbers(0, 99), (vec![1, 3, 5, 7, 9], 10));
    assert_eq!(numbers(0, 2), (vec![1, 3], 3));
    assert_eq!(numbers(3, 99), (vec![5, 7, 9], 10));
    assert_eq!(numbers(10, 99), (vec![], 10));
    assert_eq!(inventory.news(tenant(0), 11, 99), News::Gap, "a number from nowhere");
}

#[test]
fn what_is_older_than_the_log_is_a_gap() {
    let mut inventory = Inventory::new(1);
    let events = EVENTS_KEPT as u64 + 10;
    for name in 0..events {
        stored(&mut inventory, tenant(0), name);
    }
    assert_eq!(inventory.news(tenant(0), 9, 1), News::Gap);
    let News::Events(first, _) = inventory.news(tenant(0), 10, 1) else { panic!("it is kept") };
    assert_eq!(first, [(11, key(10), InventoryChange::Stored)]);
    assert_eq!(inventory.tenant(tenant(0)).blocks, events);
}

#[test]
fn counts_and_digests_forget_what_went() {
    let mut inventory = Inventory::new(1);
    stored(&mut inventory, tenant(0), 5);
    stored(&mut inventory, tenant(0), 6);
    assert_eq!(inventory.tenant(tenant(0)), Tenant { blocks: 2, digest: 5 ^ 6 });
    let place = BlockPlace { stripe_seed: [1; 32], index: 2 };
    inventory.place(tenant(0), key(5), Some(place));
    for (name, gone) in [(5, Departure::Evicted), (6, Departure::Moved)] {
        inventory.apply(vec![PoolEvent { namespace: tenant(0), key: key(name), gone: Some(gone) }]);
    }
    assert_eq!(inventory.tenant(tenant(0)), Tenant::default());
    assert!(inventory.tenants.is_empty() && inventory.places.is_empty());
}
