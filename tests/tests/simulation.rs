//! The store under partitions, broken connections, damaged tiles, crashes, and changes of its members, simulated: real shards (store,
//! repair, inventory), real clients (placement, quorum, put and get with other copies) over lanes of our own, on tokio's paused
//! clock. A seed fixes the faults, what clients do, and how every message fares ([`network`]); ADR 14 says why it is built this
//! way. Some simulations have shards with little memory above disks that are slow and fail ([`disks`]).
//!
//! After each round of faults, with at most one failure that takes blocks with it: every acknowledged block is there and is
//! read, repair has put every block where it belongs and nowhere else, and no memory is lost. At all times: no wrong byte
//! passes for a right one, and who speaks of another epoch is refused.
//!
//! `LONGSHORE_SIM_SEEDS=10000` runs more seeds, from `LONGSHORE_SIM_SEED` (0) on.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by panicking")]

#[path = "simulation/calls.rs"]
mod calls;
#[path = "simulation/cluster.rs"]
mod cluster;
#[path = "simulation/disks.rs"]
mod disks;
#[path = "simulation/drains.rs"]
mod drains;
#[path = "simulation/lanes.rs"]
mod lanes;
#[path = "simulation/network.rs"]
mod network;
#[path = "simulation/story.rs"]
mod story;

use std::{
    sync::{
        Mutex, Once,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread,
};

use longshore_blocks::quorum::CopyRule;

use cluster::{Labelled, Plan};
use lanes::Sabotage;
use network::Mark;
use story::{Totals, plan, run};

/// Seeds that every run tries.
const SEEDS: u64 = 200;
/// Of those with disks: the clock goes in steps there, which takes longer.
const DISK_SEEDS: u64 = 40;

/// Panics in any task: a shard survives them, and says so in its log only.
static PANICS: AtomicU64 = AtomicU64::new(0);

fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, SeqCst);
            before(info);
        }));
    });
}

fn setting(name: &str) -> Option<u64> {
    let value = std::env::var_os(name)?;
    Some(value.to_str().and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{name} is no number")))
}

/// Runs `count` seeds from `first` on, two at a time; what each told, in the order of the seeds.
fn runs(first: u64, count: u64, plan: impl Fn(u64) -> Plan + Sync) -> Vec<(u64, Result<Totals, String>)> {
    let (next, told) = (AtomicU64::new(first), Mutex::new(Vec::new()));
    let work = || loop {
        let seed = next.fetch_add(1, SeqCst);
        if seed >= first + count {
            break;
        }
        let ended = run(seed, plan(seed)).map(|report| report.totals);
        told.lock().unwrap().push((seed, ended));
    };
    thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(work))));
    let mut told = told.into_inner().unwrap();
    told.sort_by_key(|(seed, _)| *seed);
    told
}

/// What so many seeds told together; panics when one of them failed.
fn all_is_well(seeds: u64, plan: impl Fn(u64) -> Plan + Sync) -> (u64, Totals) {
    count_panics();
    let first = setting("LONGSHORE_SIM_SEED").unwrap_or(0);
    let count = setting("LONGSHORE_SIM_SEEDS").unwrap_or(seeds);
    let (mut all, mut failures) = (Totals::default(), Vec::new());
    for (seed, told) in runs(first, count, plan) {
        match told {
            Ok(totals) => {
                all.messages += totals.messages;
                all.stored += totals.stored;
                all.read += totals.read;
                all.failed += totals.failed;
                all.losses += totals.losses;
                all.changes += totals.changes;
                all.drains += totals.drains;
                all.disks.0 += totals.disks.0;
                all.disks.1 += totals.disks.1;
            }
            Err(story) => failures.push((seed, story)),
        }
    }
    let again =
        "LONGSHORE_SIM_SEEDS=1 LONGSHORE_SIM_SEED=N cargo nextest run --workspace -E 'binary(simulation)'";
    let seeds: Vec<u64> = failures.iter().map(|(seed, _)| *seed).collect();
    if let Some((_, story)) = failures.first() {
        panic!("seeds {seeds:?} fail; again: {again}\n\n{story}");
    }
    assert_eq!(PANICS.load(SeqCst), 0, "something panicked on the way");
    (count, all)
}

#[test]
fn one_failure_loses_nothing_that_was_acknowledged() {
    let (count, all) = all_is_well(SEEDS, plan);
    println!("{count} seeds: {all:?}");
    // A simulation in which nothing happens proves nothing.
    assert!(all.stored >= 5 * count && all.read >= 5 * count, "{all:?}");
    assert!(
        count < 20 || (all.losses >= count && all.changes > 0 && all.drains > 0 && all.failed > 0),
        "{all:?}"
    );
}

#[test]
fn a_bad_disk_among_slow_ones_loses_nothing_that_was_acknowledged() {
    let (count, all) = all_is_well(DISK_SEEDS, |seed| Plan { disks: true, ..plan(seed) });
    println!("{count} seeds with disks: {all:?}");
    assert!(all.stored >= 3 * count && all.read >= 3 * count, "{all:?}");
    assert!(count < 20 || (all.disks.0 >= count && all.disks.1 > 0 && all.losses > 0), "{all:?}");
}

#[test]
fn a_seed_is_the_same_run_every_time() {
    for seed in 0..10 {
        let [first, second] = [run(seed, plan(seed)).unwrap(), run(seed, plan(seed)).unwrap()];
        let differs = first.marks.iter().zip(&second.marks).position(|(first, second)| first != second);
        if let Some(at) = differs {
            let near = |marks: &[Mark]| {
                let near = &marks[at.saturating_sub(8)..(at + 8).min(marks.len())];
                near.iter().map(|mark| format!("{mark:?}")).collect::<Vec<_>>().join("\n")
            };
            panic!("seed {seed} from mark {at} on:\n{}\n\n{}", near(&first.marks), near(&second.marks));
        }
        assert_eq!(first, second, "seed {seed}");
    }
}

/// What a sabotaged simulation complains of, over some seeds.
fn complaints(seeds: u64, sabotaged: impl Fn(Plan) -> Plan + Sync) -> Vec<String> {
    runs(0, seeds, |seed| sabotaged(plan(seed))).into_iter().filter_map(|(_, told)| told.err()).collect()
}

#[test]
fn a_lost_block_is_noticed() {
    // The only copy of a block goes with its shard.
    let single = |plan| Plan { rule: CopyRule::new(1, 1).unwrap(), labels: Labelled::Nothing, ..plan };
    let told = complaints(8, single);
    assert!(told.iter().any(|story| story.contains("lost: acknowledged block")), "{told:?}");
}

#[test]
fn an_acknowledgement_before_the_second_copy_is_noticed() {
    let early = |plan| Plan { rule: CopyRule::new(2, 1).unwrap(), labels: Labelled::Nothing, ..plan };
    let told = complaints(100, early);
    assert!(
        told.iter().any(|story| story.contains("lost: acknowledged block")),
        "none of 100 seeds lost a block"
    );
}

#[test]
fn bad_disks_everywhere_are_noticed() {
    let told = complaints(20, |plan| Plan { sabotage: Sabotage::Disks, disks: true, ..plan });
    assert!(told.iter().any(|story| story.contains("lost: acknowledged block")), "{told:?}");
}

#[test]
fn a_shard_that_is_stopped_before_it_is_drained_is_noticed() {
    let single = CopyRule::new(1, 1).unwrap();
    let told = complaints(8, |plan| Plan {
        sabotage: Sabotage::Drains,
        rule: single,
        labels: Labelled::Nothing,
        ..plan
    });
    assert!(told.iter().any(|story| story.contains("lost: acknowledged block")), "{told:?}");
}

#[test]
fn a_wrong_byte_is_noticed() {
    let told = complaints(8, |plan| Plan { sabotage: Sabotage::Checksums, ..plan });
    assert!(told.iter().any(|story| story.contains("wrong byte")), "{told:?}");
}

#[test]
fn a_missing_fence_is_noticed() {
    let told = complaints(12, |plan| Plan { sabotage: Sabotage::Epochs, ..plan });
    assert!(told.iter().any(|story| story.contains("fence")), "{told:?}");
}
