//! Copies: apart from each other, balanced, moved as little as can be, and found one change later.

use std::collections::BTreeSet;

use super::*;

/// Shards as (weight, host, zone); hosts lie in one zone each. Host 0 stands for a machine of one's own.
fn located(shards: &[(u32, u8, u8)]) -> ShardMap {
    let entries = shards.iter().enumerate().map(|(at, (weight, host, zone))| {
        let (host, zone) = match host {
            0 => (String::new(), format!("z{zone}")),
            _ => (format!("z{zone}h{host}"), format!("z{zone}")),
        };
        ShardEntry::new(ShardId(format!("kv-{at:02}")), *weight).located(&host, &zone)
    });
    ShardMap::new(1, entries.collect()).expect("the shards are valid")
}

fn ids(map: &ShardMap, positions: &[usize]) -> BTreeSet<ShardId> {
    positions.iter().map(|&at| map.shards()[at].id.clone()).collect()
}

fn without(map: &ShardMap, away: &ShardId) -> ShardMap {
    let left = map.shards().iter().filter(|shard| shard.id != *away).cloned();
    ShardMap::new(2, left.collect()).expect("the shards are valid")
}

fn clusters() -> impl Strategy<Value = Vec<(u32, u8, u8)>> {
    prop::collection::vec((1u32..5, 0u8..4, 0u8..4), 1..10)
}

#[test]
fn copies_lie_apart() {
    let map = located(&[(1, 1, 0), (1, 1, 0), (1, 2, 0), (1, 1, 1)]);
    for stripe in 0..200 {
        let owners = map.owners(&seed(5, stripe), 2);
        assert!(owners.contains(&3), "the only shard of the other zone has one of two copies");
        let three = map.owners(&seed(5, stripe), 3);
        assert!(three.contains(&2) && three.contains(&3), "then one on each host");
        assert_eq!(map.owners(&seed(5, stripe), 4).len(), 3, "never two copies on one host");
    }
    assert_eq!(map.owners(&seed(5, 0), 0), [0usize; 0]);
}

#[test]
fn unlabelled_shards_are_machines_of_their_own() {
    let map = map(&named(&[1, 1, 1]));
    for stripe in 0..50 {
        let owners = map.owners(&seed(1, stripe), 3);
        assert_eq!(owners.iter().collect::<BTreeSet<_>>().len(), 3);
        assert_eq!(map.shards()[owners[0]].id.0, owner(&map, &seed(1, stripe)));
        assert_eq!(map.candidates(&seed(1, stripe), 2).len(), 3);
        assert_eq!(map.candidates(&seed(1, stripe), 2)[..2], owners[..2]);
    }
}

#[test]
fn every_shard_has_its_share_of_copies() {
    const STRIPES: u64 = 8_000;
    let map = map(&named(&[1; 5]));
    let mut counts = [0u64; 5];
    for stripe in 0..STRIPES {
        map.owners(&seed(3, stripe), 2).into_iter().for_each(|at| counts[at] += 1);
    }
    let share = STRIPES as f64 * 2.0 / 5.0;
    let sigma = (STRIPES as f64 * 0.4 * 0.6).sqrt();
    assert!(counts.iter().all(|count| (*count as f64 - share).abs() < 6.0 * sigma), "{counts:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn owners_are_distinct_hosts_and_zones_where_there_are_enough(shards in clusters(), copies in 1usize..5, salt in any::<u64>()) {
        let map = located(&shards);
        let hosts: BTreeSet<String> = map.shards().iter().map(|shard| format!("{:?}", shard.host())).collect();
        let zones: BTreeSet<String> = map.shards().iter().map(|shard| format!("{:?}", shard.zone())).collect();
        let owners = map.owners(&seed(salt, 0), copies);
        prop_assert_eq!(owners.len(), copies.min(hosts.len()));
        let own: BTreeSet<String> = owners.iter().map(|&at| format!("{:?}", map.shards()[at].host())).collect();
        prop_assert_eq!(own.len(), owners.len());
        let own: BTreeSet<String> = owners.iter().map(|&at| format!("{:?}", map.shards()[at].zone())).collect();
        prop_assert_eq!(own.len(), copies.min(zones.len()));
        prop_assert_eq!(owners.first().map(|&at| &map.shards()[at]), map.owner(&seed(salt, 0)));
    }

    #[test]
    fn one_shard_that_comes_or_goes_moves_one_copy_at_most(shards in clusters(), copies in 1usize..5, salt in any::<u64>()) {
        let all = located(&shards);
        for shard in all.shards() {
            let fewer = without(&all, &shard.id);
            for stripe in 0..8 {
                let seed = seed(salt, stripe);
                let (before, after) = (ids(&fewer, &fewer.owners(&seed, copies)), ids(&all, &all.owners(&seed, copies)));
                let came: BTreeSet<_> = after.difference(&before).cloned().collect();
                prop_assert!(came.iter().all(|id| *id == shard.id), "only the newcomer gets copies: {came:?}");
                prop_assert!(before.difference(&after).count() <= 1);
                let found = ids(&all, &all.candidates(&seed, copies));
                prop_assert!(before.is_subset(&found), "the owners from before {} joined are candidates", shard.id);
            }
        }
    }

    #[test]
    fn owners_among_the_living_are_those_of_a_map_without_the_dead(shards in clusters(), copies in 1usize..5, dead in any::<u8>(), salt in any::<u64>()) {
        let all = located(&shards);
        let dead = usize::from(dead) % all.shards().len();
        let fewer = without(&all, &all.shards()[dead].id);
        let seed = seed(salt, 1);
        let among = all.owners_among(&seed, copies, |at| at != dead);
        prop_assert_eq!(ids(&all, &among), ids(&fewer, &fewer.owners(&seed, copies)));
    }
}
