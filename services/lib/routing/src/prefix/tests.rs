//! Plans against a walk over single blocks.

use std::collections::{BTreeMap, HashSet};

use longshore_blocks::{Deployment, EXACT_PREFILL, Geometry, ShardEntry};
use proptest::prelude::*;

use super::*;
use crate::Kind;

fn chain(tokens: u32, stripe_blocks: u32) -> KeyChain {
    let geometry = Geometry::new(16, stripe_blocks).unwrap();
    let mut chain = KeyChain::new(Deployment::from_bytes([7; 32]).namespace(EXACT_PREFILL, b""), geometry);
    chain.push(&(0..tokens).collect::<Vec<_>>());
    chain
}

fn map(weights: &[u32]) -> ShardMap {
    let entry = |(index, weight): (usize, &u32)| ShardEntry::new(ShardId(format!("kv-{index}")), *weight);
    ShardMap::new(1, weights.iter().enumerate().map(entry).collect()).unwrap()
}

#[test]
fn one_shard_gets_everything_in_order() {
    let chain = chain(16 * 10 + 5, 4);
    let plan = plan_lookup(&chain, &map(&[1]));
    assert_eq!(plan.len(), 1);
    let expected: Vec<(u64, BlockKey)> =
        chain.keys().iter().enumerate().map(|(i, k)| (i as u64, *k)).collect();
    assert_eq!(plan[0], (ShardId("kv-0".into()), expected));
}

#[test]
fn without_shards_nothing_is_planned() {
    assert!(plan_lookup(&chain(160, 4), &map(&[])).is_empty());
    assert!(placement_bytes(&chain(160, 4), &map(&[]), 10, 100).is_empty());
    let error = PrefixPlan::new(&chain(160, 4), &map(&[]), 10, KEYS_MAX, 1).unwrap_err();
    assert_eq!((error.kind(), error.retryable()), (Kind::Unavailable, true));
    assert_eq!(PrefixPlan::new(&chain(5, 4), &map(&[]), 10, KEYS_MAX, 1).unwrap().prefix_blocks(), 0);
}

#[test]
fn what_is_worth_asking_for_ends_with_the_stripe_of_the_first_gap() {
    let (chain, map) = (chain(16 * 20, 4), map(&[1, 1, 1]));
    let position = |key: &BlockKey| chain.keys().iter().position(|other| other == key).unwrap();
    for (held, ask) in [(0, 4), (3, 4), (4, 8), (5, 8), (19, 20), (20, 20)] {
        for copies in [1, 2] {
            let likely = likely_prefix(&chain, &map, 20, copies, |_, key| position(key) < held);
            assert_eq!(likely, Likely { blocks: held as u64, ask }, "{held} of 20, {copies} copies");
        }
    }
    // Blocks of one stripe on different shards make no prefix beyond the first of them; a shard that is not known may hold all.
    let owner = |index: u64, rank: usize| {
        let owners = map.owners(&chain.stripe_seed(index), 2);
        map.shards()[owners[rank]].id.clone()
    };
    let split = |shard: &ShardId, key: &BlockKey| {
        let at = position(key);
        *shard == owner(at as u64, at % 2)
    };
    assert_eq!(likely_prefix(&chain, &map, 20, 2, split), Likely { blocks: 1, ask: 4 });
    assert_eq!(likely_prefix(&chain, &map, 20, 2, |_, _| true), Likely { blocks: 20, ask: 20 });
    assert_eq!(likely_prefix(&chain, &map, 6, 1, |_, _| true), Likely { blocks: 6, ask: 6 });
    assert_eq!(likely_prefix(&chain, &map, 6, 1, |_, _| false), Likely { blocks: 0, ask: 4 });
}

#[test]
fn wrong_answers_are_refused_and_change_nothing() {
    let mut plan = PrefixPlan::new(&chain(160, 4), &map(&[1]), 10, KEYS_MAX, 1).unwrap();
    for held in [&[][..], &[true; 9], &[true; 11]] {
        let error = plan.answer(0, held).unwrap_err();
        assert_eq!((error.kind(), error.retryable()), (Kind::InvalidInput, false));
    }
    assert!(plan.answer(1, &[true; 10]).is_err());
    assert_eq!(plan.prefix_blocks(), 0);
    plan.answer(0, &[true; 10]).unwrap();
    assert_eq!(plan.prefix_blocks(), 10);
    assert!(PrefixPlan::new(&chain(160, 4), &map(&[1]), 10, 0, 1).is_err());
}

#[test]
fn stripes_stay_together_and_weights_count() {
    let chain = chain(16 * 4000, 4);
    let bytes = placement_bytes(&chain, &map(&[1, 3]), 4000, 10);
    assert_eq!(bytes.iter().map(|(_, bytes)| bytes).sum::<u64>(), 40_000);
    let share = bytes[1].1 as f64 / 40_000.0;
    assert!((0.70..0.80).contains(&share), "{share}");
    for (_, keys) in plan_lookup(&chain, &map(&[1, 3])) {
        for stripe in keys.chunk_by(|a, b| a.0 / 4 == b.0 / 4) {
            assert_eq!(stripe.len(), 4);
        }
    }
}

proptest! {
    #[test]
    fn plans_equal_a_naive_walk(
        tokens in 0u32..3000, stripe_blocks in 1u32..9, weights in prop::collection::vec(1u32..5, 1..6),
        limit in 0u64..250, keys_max in 1usize..40, missing in prop::collection::hash_set(0u64..200, 0..4),
        silent in prop::option::weighted(0.2, 0usize..6),
    ) {
        let (chain, map) = (chain(tokens, stripe_blocks), map(&weights));
        let mut plan = PrefixPlan::new(&chain, &map, limit, keys_max, 1).unwrap();
        let blocks = limit.min(chain.keys().len() as u64);
        prop_assert_eq!(plan.blocks(), blocks);

        let owner = |index: u64| map.owner(&chain.stripe_seed(index)).unwrap().id.clone();
        let mut naive: BTreeMap<ShardId, Vec<(u64, BlockKey)>> = BTreeMap::new();
        for index in 0..blocks {
            naive.entry(owner(index)).or_default().push((index, chain.keys()[index as usize]));
        }
        let mut joined: BTreeMap<ShardId, Vec<(u64, BlockKey)>> = BTreeMap::new();
        for (shard, keys) in plan.lookups() {
            prop_assert!((1..=keys_max).contains(&keys.len()));
            joined.entry(shard.clone()).or_default().extend(keys);
        }
        prop_assert_eq!(&joined, &naive);

        let silent = silent.and_then(|shard| map.shards().get(shard)).map(|shard| shard.id.clone());
        for (position, (shard, keys)) in plan.lookups().to_vec().into_iter().enumerate() {
            if Some(&shard) != silent.as_ref() {
                let held: Vec<bool> = keys.iter().map(|(index, _)| !missing.contains(index)).collect();
                plan.answer(position, &held).unwrap();
            }
        }
        let held: HashSet<u64> =
            (0..blocks).filter(|index| !missing.contains(index) && Some(&owner(*index)) != silent.as_ref()).collect();
        let mut prefix = 0;
        while held.contains(&prefix) {
            prefix += 1;
        }
        prop_assert_eq!(plan.prefix_blocks(), prefix);
        prop_assert_eq!(plan.held_beyond_prefix(), held.len() as u64 - prefix);

        for (shard, bytes) in placement_bytes(&chain, &map, limit, 7) {
            prop_assert_eq!(bytes, 7 * naive.get(&shard).map_or(0, Vec::len) as u64);
        }
    }

    #[test]
    fn with_copies_a_stripe_counts_as_far_as_one_shard_holds_it(
        tokens in 0u32..1200, stripe_blocks in 1u32..9, copies in 1usize..4, shards in 1usize..6,
        held in prop::collection::vec(prop::collection::vec(prop::bool::weighted(0.9), 75), 6),
        silent in prop::option::weighted(0.3, 0usize..6),
    ) {
        let (chain, map) = (chain(tokens, stripe_blocks), map(&vec![1; shards]));
        let mut plan = PrefixPlan::new(&chain, &map, u64::MAX, 7, copies).unwrap();
        let position = |id: &ShardId| map.shards().iter().position(|shard| shard.id == *id).unwrap();
        let holds = |shard: usize, index: u64| Some(shard) != silent && held[shard][index as usize];
        for (at, (shard, keys)) in plan.lookups().to_vec().into_iter().enumerate() {
            let shard = position(&shard);
            if Some(shard) != silent {
                let answer: Vec<bool> = keys.iter().map(|(index, _)| holds(shard, *index)).collect();
                plan.answer(at, &answer).unwrap();
            }
        }
        let (blocks, stripe_blocks) = (chain.keys().len() as u64, u64::from(stripe_blocks));
        let mut expected = 0;
        while expected < blocks {
            let end = (expected + stripe_blocks).min(blocks);
            let seed = chain.stripe_seed(expected);
            let candidates = if copies == 1 { map.owners(&seed, 1) } else { map.candidates(&seed, copies) };
            let runs = candidates.iter().map(|&shard| (expected..end).take_while(|&index| holds(shard, index)).count());
            let run = runs.max().unwrap() as u64;
            expected += run;
            if expected < end {
                break;
            }
        }
        prop_assert_eq!(plan.prefix_blocks(), expected);
    }
}
