//! Balance, minimal movement and pinned owners.

mod copies;

use proptest::prelude::*;

use super::*;

fn map(shards: &[(String, u32)]) -> ShardMap {
    let shards = shards.iter().map(|(id, weight)| ShardEntry::new(ShardId(id.clone()), *weight));
    ShardMap::new(1, shards.collect()).expect("the shards are valid")
}

fn named(weights: &[u32]) -> Vec<(String, u32)> {
    weights.iter().enumerate().map(|(at, weight)| (format!("kv-{at}"), *weight)).collect()
}

fn seed(salt: u64, stripe: u64) -> [u8; 32] {
    *blake3::keyed_hash(&[9; 32], &[salt.to_le_bytes(), stripe.to_le_bytes()].concat()).as_bytes()
}

fn owner(map: &ShardMap, seed: &[u8; 32]) -> String {
    map.owner(seed).expect("there are shards").id.0.clone()
}

#[test]
fn owners_never_change() {
    // As an independent implementation chose them.
    let map = map(&named(&[1, 1, 2]));
    let owners: Vec<u8> =
        (0u8..16).map(|i| owner(&map, blake3::hash(&[i]).as_bytes()).as_bytes()[3] - b'0').collect();
    assert_eq!(owners, [1, 2, 2, 1, 0, 2, 0, 2, 2, 2, 2, 0, 1, 0, 0, 2]);
}

#[test]
fn refuses_maps_that_cannot_be() {
    let entry = |id: &str, weight| ShardEntry::new(ShardId(id.to_owned()), weight);
    let twice = ShardMap::new(1, vec![entry("a", 1), entry("b", 1), entry("a", 2)]).unwrap_err();
    assert_eq!(twice.to_string(), "`shards` names `a` twice");
    let weightless = ShardMap::new(1, vec![entry("a", 0)]).unwrap_err();
    assert_eq!(weightless.to_string(), "`weight` of `a` is 0");
    assert_eq!(ShardMap::new(1, Vec::new()).unwrap().owner(&[0; 32]), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn shares_follow_weights(weights in prop::collection::vec(1u32..6, 1..8), salt in any::<u64>()) {
        const STRIPES: u64 = 20_000;
        let map = map(&named(&weights));
        let mut counts = vec![0u64; weights.len()];
        for stripe in 0..STRIPES {
            let id = owner(&map, &seed(salt, stripe));
            counts[id["kv-".len()..].parse::<usize>().expect("ids end in numbers")] += 1;
        }
        let total: u32 = weights.iter().sum();
        for (count, weight) in counts.iter().zip(&weights) {
            let share = f64::from(*weight) / f64::from(total);
            let sigma = (STRIPES as f64 * share * (1.0 - share)).sqrt();
            let off = (*count as f64 - STRIPES as f64 * share).abs();
            prop_assert!(off <= 6.0 * sigma, "{counts:?} for {weights:?}");
        }
    }

    #[test]
    fn only_stripes_of_the_shard_that_leaves_move(
        weights in prop::collection::vec(1u32..6, 2..8),
        leaves in any::<prop::sample::Index>(),
        salt in any::<u64>(),
    ) {
        let before = named(&weights);
        let mut after = before.clone();
        let (gone, _) = after.remove(leaves.index(after.len()));
        let (before, after) = (map(&before), map(&after));
        for stripe in 0..2_000 {
            let seed = seed(salt, stripe);
            let (old, new) = (owner(&before, &seed), owner(&after, &seed));
            prop_assert!(old == new || old == gone, "stripe {stripe} moved from {old} to {new}");
            prop_assert_ne!(new, gone.clone());
        }
    }

    #[test]
    fn a_heavier_shard_only_gains(
        weights in prop::collection::vec(1u32..6, 2..8),
        grows in any::<prop::sample::Index>(),
        salt in any::<u64>(),
    ) {
        let before = named(&weights);
        let mut after = before.clone();
        let grown = grows.index(after.len());
        after[grown].1 += 2;
        let gainer = after[grown].0.clone();
        let (before, after) = (map(&before), map(&after));
        for stripe in 0..2_000 {
            let seed = seed(salt, stripe);
            let (old, new) = (owner(&before, &seed), owner(&after, &seed));
            prop_assert!(old == new || new == gainer, "stripe {stripe} moved from {old} to {new}");
        }
    }

    #[test]
    fn the_order_of_members_makes_no_difference(
        shards in prop::collection::btree_map("[a-z]{1,6}", 1u32..6, 1..8),
        salt in any::<u64>(),
    ) {
        let forward: Vec<_> = shards.into_iter().collect();
        let backward: Vec<_> = forward.iter().rev().cloned().collect();
        let (forward, backward) = (map(&forward), map(&backward));
        for stripe in 0..100 {
            let seed = seed(salt, stripe);
            prop_assert_eq!(owner(&forward, &seed), owner(&backward, &seed));
        }
    }
}
