//! Planning by every shard for itself, held against what the cluster as a whole should come to.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::{ShardEntry, ShardId, ShardMap};

use Holding::{Held, Lacking, Unknown};

#[test]
fn the_first_holder_pushes_to_owners_that_lack_the_block() {
    let held = |shard| if matches!(shard, 2 | 3) { Held } else { Lacking };
    assert_eq!(next_step(2, &[1, 2], &[1, 2, 3], 2, held), Step::Push(vec![1]));
    assert_eq!(next_step(3, &[1, 2], &[1, 2, 3], 2, held), Step::Nothing, "shard 2 comes first");
    assert_eq!(
        next_step(3, &[0, 1], &[0, 1], 2, held),
        Step::Push(vec![0, 1]),
        "nobody else is known to hold it"
    );
}

#[test]
fn a_copy_is_dropped_only_when_all_owners_said_that_they_hold_theirs() {
    let step = |answers: [Holding; 2]| next_step(9, &[0, 1], &[0, 1], 2, |shard| answers[shard]);
    assert_eq!(step([Held, Held]), Step::Drop);
    assert_eq!(step([Held, Unknown]), Step::Nothing);
    assert_eq!(step([Held, Lacking]), Step::Nothing, "the first holder pushes");
    assert_eq!(step([Unknown, Lacking]), Step::Push(vec![1]));
    assert_eq!(next_step(9, &[0], &[0], 2, |_| Held), Step::Nothing, "one copy elsewhere is too few");
    assert_eq!(next_step(0, &[0, 1], &[0, 1], 2, |_| Held), Step::Nothing, "an owner keeps its own");
}

#[test]
fn background_work_keeps_to_its_rate() {
    let mut rate = Rate::new(1_000);
    assert_eq!(rate.take(5_000, 10), 0, "a large first request does not wait for itself");
    assert_eq!(rate.take(1, 10), 4_000_000);
    assert_eq!(rate.take(1, 60_000_000), 0, "and an idle time is not saved up");
    let mut sent = 0u64;
    let (mut rate, mut now) = (Rate::new(1 << 20), 0);
    while now < 20_000_000 {
        now += rate.take(64 << 10, now);
        sent += 64 << 10;
        now += 1;
    }
    let limit = (20 + 1) * (1u64 << 20) + (64 << 10);
    assert!(sent <= limit && sent >= 20 << 20, "{sent} of {limit}");
}

/// One block in a cluster: who lives, who holds it.
struct Cluster {
    map: ShardMap,
    copies: usize,
    alive: BTreeSet<usize>,
    holders: BTreeSet<usize>,
}

impl Cluster {
    const SEED: [u8; 32] = [7; 32];

    fn step_of(&self, me: usize, believed: &BTreeSet<usize>, deaf: bool) -> Step {
        let owners = self.map.owners_among(&Self::SEED, self.copies, |at| at == me || believed.contains(&at));
        let mut asked = owners.clone();
        let all = self.map.candidates(&Self::SEED, self.copies);
        asked.extend(all.into_iter().filter(|at| !owners.contains(at)));
        next_step(me, &owners, &asked, self.copies, |shard| match self.alive.contains(&shard) && !deaf {
            false => Unknown,
            true if self.holders.contains(&shard) => Held,
            true => Lacking,
        })
    }

    fn apply(&mut self, me: usize, step: Step) {
        match step {
            Step::Nothing => {}
            Step::Push(to) => self.holders.extend(to.into_iter().filter(|to| self.alive.contains(to))),
            Step::Drop => _ = self.holders.remove(&me),
        }
    }

    fn live_holders(&self) -> BTreeSet<usize> {
        self.holders.intersection(&self.alive).copied().collect()
    }
}

#[derive(Debug, Clone)]
enum Event {
    /// The shard loses all that it holds and is gone.
    Die(usize),
    /// It is back, empty.
    Return(usize),
    /// It goes away with what it holds.
    Sleep(usize),
    /// It is back with what it held.
    Wake(usize),
    /// A holder acts, believing that these are alive; deaf ones get no answers.
    Act { shard: usize, believed: u16, deaf: bool },
    /// All holders decide at the same time, then all act.
    Together { believed: u16 },
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let shard = 0usize..7;
    let event = prop_oneof![
        1 => shard.clone().prop_map(Event::Die),
        2 => shard.clone().prop_map(Event::Return),
        1 => shard.clone().prop_map(Event::Sleep),
        2 => shard.clone().prop_map(Event::Wake),
        6 => (shard, any::<u16>(), any::<bool>()).prop_map(|(shard, believed, deaf)| Event::Act { shard, believed, deaf }),
        3 => any::<u16>().prop_map(|believed| Event::Together { believed }),
    ];
    prop::collection::vec(event, 0..40)
}

fn set(bits: u16) -> BTreeSet<usize> {
    (0..7).filter(|at| bits >> at & 1 == 1).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn repair_never_drops_the_last_copies_and_ends_with_every_owner_holding_one(
        weights in prop::collection::vec(1u32..4, 7),
        copies in 1usize..4,
        first in 1u16..128,
        events in events(),
    ) {
        let entries = weights.iter().enumerate().map(|(at, weight)| ShardEntry::new(ShardId(format!("kv-{at}")), *weight));
        let map = ShardMap::new(1, entries.collect()).unwrap();
        let mut cluster = Cluster { map, copies, alive: (0..7).collect(), holders: set(first) };
        for event in events {
            match event {
                Event::Die(shard) => {
                    cluster.alive.remove(&shard);
                    cluster.holders.remove(&shard);
                }
                Event::Return(shard) if !cluster.alive.contains(&shard) => {
                    cluster.holders.remove(&shard);
                    cluster.alive.insert(shard);
                }
                Event::Return(_) => {}
                Event::Sleep(shard) => _ = cluster.alive.remove(&shard),
                Event::Wake(shard) => _ = cluster.alive.insert(shard),
                Event::Act { shard, believed, deaf } => {
                    let before = cluster.live_holders().len();
                    if cluster.live_holders().contains(&shard) {
                        let step = cluster.step_of(shard, &set(believed), deaf);
                        cluster.apply(shard, step);
                    }
                    prop_assert!(cluster.live_holders().len() >= before.min(copies));
                }
                Event::Together { believed } => {
                    let before = cluster.live_holders().len();
                    let steps: Vec<_> = cluster.live_holders().into_iter()
                        .map(|shard| (shard, cluster.step_of(shard, &set(believed.rotate_left(shard as u32)), false)))
                        .collect();
                    // Drops last: pushes could hide that a drop was wrong.
                    let (drops, pushes): (Vec<_>, Vec<_>) = steps.into_iter().partition(|(_, step)| *step == Step::Drop);
                    drops.into_iter().for_each(|(shard, step)| cluster.apply(shard, step));
                    prop_assert!(cluster.live_holders().len() >= before.min(copies));
                    pushes.into_iter().for_each(|(shard, step)| cluster.apply(shard, step));
                }
            }
        }
        let lost = cluster.live_holders().is_empty();
        for _ in 0..4 {
            for shard in cluster.live_holders() {
                let step = cluster.step_of(shard, &cluster.alive.clone(), false);
                cluster.apply(shard, step);
            }
        }
        let owners = cluster.map.owners_among(&Cluster::SEED, copies, |at| cluster.alive.contains(&at));
        let owners: BTreeSet<usize> = owners.into_iter().collect();
        prop_assert_eq!(cluster.live_holders().is_empty(), lost, "nothing comes from nothing, nothing is lost");
        if !lost {
            prop_assert!(owners.is_subset(&cluster.holders), "every owner holds one");
            if owners.len() >= copies {
                prop_assert_eq!(cluster.live_holders(), owners, "and nobody else does");
            }
        }
    }
}
