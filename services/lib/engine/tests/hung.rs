//! Shards that take what they are asked and answer nothing, as processes that are stopped do: what lies on them is read from other
//! copies, nothing is counted twice, and what they open when they go on is closed.

#[path = "support/world.rs"]
mod support;

use std::{sync::atomic::Ordering, time::Duration};

use longshore_engine::{Error, Logits, Sequence, StepInput, testing::tokens};
use longshore_fabric::{CallContext, Code};

use support::{BLOCK, World, bits};

/// What callers have: far more than the patience with a shard, so that who waits for a silent one fails.
const TIME: Duration = Duration::from_secs(60);

fn silent(world: &World, shard: usize, silent: bool) {
    world.cluster.shards[shard].faults.silent.store(silent, Ordering::SeqCst);
}

fn ctx() -> CallContext {
    CallContext::new("test").with_timeout(TIME)
}

fn open(world: &World, prefix: &[u32]) -> Result<Sequence, Error> {
    let (identity, links) = (world.cluster.identity(b""), world.links());
    world.runtime.block_on(Sequence::open(&world.cluster.engine, &ctx(), identity, links, prefix, 60_000))
}

fn fetch(world: &World, prefix: &[u32]) -> Result<Sequence, Error> {
    let (identity, links) = (world.cluster.identity(b""), world.links());
    world.runtime.block_on(Sequence::fetch(&world.cluster.engine, &ctx(), identity, links, prefix))
}

fn expected(world: &World, tokens: &[u32]) -> Vec<u32> {
    bits(&world.reference(tokens).1)
}

fn step(world: &World, sequence: &mut Sequence, tokens: &[u32]) -> Vec<u32> {
    bits(&world.step(sequence, tokens).expect("logits were asked for"))
}

/// Waits until a shard has opened as many views.
fn opens(world: &World, shard: usize, views: u64) -> bool {
    for _ in 0..6_000 {
        if world.cluster.shards[shard].opened() >= views {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

/// Waits until a shard has no view.
fn closes_all(world: &World, shard: usize) -> bool {
    for _ in 0..6_000 {
        if world.cluster.shards[shard].views() == 0 {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

#[test]
fn a_sequence_is_opened_at_other_copies_and_what_opens_late_is_closed() {
    let prompt = tokens(12, 20 * BLOCK + 3);
    let mut late = 0;
    for victim in 0..3 {
        let world = World::hasty(3);
        world.store(&prompt);
        let expected = expected(&world, &prompt);
        silent(&world, victim, true);
        let mut opened = open(&world, &prompt[..20 * BLOCK]).expect("the other copies are opened");
        assert_eq!(world.cluster.shards[victim].opened(), 0, "shard {victim} opens nothing meanwhile");
        assert_eq!(step(&world, &mut opened, &prompt[20 * BLOCK..]), expected, "without shard {victim}");
        silent(&world, victim, false);
        assert!(opens(&world, victim, 1), "shard {victim} was asked first for nothing");
        late += world.cluster.shards[victim].opened();
        assert!(closes_all(&world, victim), "what shard {victim} opened late is closed");
        drop(opened);
        assert!(world.views_settle_at(0));
    }
    assert!(late >= 3);
}

/// Before anything is known of how long its answers take.
#[test]
fn attention_goes_on_at_other_copies() {
    let prompt = tokens(12, 20 * BLOCK + 3);
    for victim in 0..3 {
        let world = World::hasty(3);
        world.store(&prompt);
        let expected = expected(&world, &prompt);
        let mut opened = world.open(&prompt[..20 * BLOCK]);
        silent(&world, victim, true);
        let input = StepInput { sequence: &mut opened, tokens: &prompt[20 * BLOCK..], logits: Logits::Last };
        let ctx = CallContext::new("test").with_timeout(Duration::from_secs(40));
        let outputs = world.cluster.engine.step(&ctx, &mut [input], &mut ()).expect("the step runs");
        let logits = outputs.into_iter().next().expect("one output").expect("the other copies answer");
        assert_eq!(
            bits(&logits.expect("logits were asked for").into_all()),
            expected,
            "without shard {victim}"
        );
        assert_eq!(world.cluster.shards[victim].attends(), 0, "nobody waited for shard {victim}");
    }
}

/// Nobody looks at what it says to others until this query is answered, which waits behind theirs for longer than a silent shard is
/// waited for.
#[test]
fn a_shard_that_answers_others_is_busy_and_waited_for() {
    let prompt = tokens(12, 6 * BLOCK + 3);
    // Many answers fit into the patience, so that one that comes late because the machine is busy is no silence.
    let world = World::with_patience(2, Duration::from_secs(4));
    world.store(&prompt);
    let expected = expected(&world, &prompt);
    let mut sequence = world.open(&prompt[..6 * BLOCK]);
    let shards = &world.cluster.shards;
    let busy = shards.iter().position(|shard| shard.views() > 0).expect("somebody opened a view");
    let opened = || shards.iter().map(|shard| shard.opened()).collect::<Vec<_>>();
    let (before, delay) = (opened(), &shards[busy].faults.attend_delay_ms);
    delay.store(400, Ordering::SeqCst);
    let others: Vec<_> = (0..14).map(|_| world.ask_in_vain(busy)).collect();
    assert_eq!(step(&world, &mut sequence, &prompt[6 * BLOCK..]), expected);
    assert_eq!(opened(), before, "nothing moved to the other copy");
    for other in others {
        assert_eq!(other.wait_blocking().expect_err("there is no such view").code, Code::NotFound);
    }
}

#[test]
fn blocks_are_fetched_from_other_copies() {
    let prompt = tokens(12, 20 * BLOCK + 3);
    for victim in 0..3 {
        let world = World::hasty(3);
        world.store(&prompt);
        let expected = expected(&world, &prompt);
        silent(&world, victim, true);
        let mut fetched = fetch(&world, &prompt[..20 * BLOCK]).expect("the other copies are read");
        assert_eq!(step(&world, &mut fetched, &prompt[20 * BLOCK..]), expected, "without shard {victim}");
    }
}

#[test]
fn what_came_before_a_shard_fell_silent_does_not_come_again() {
    let prompt = tokens(12, 20 * BLOCK);
    for victim in 0..3 {
        let world = World::paused(3);
        world.store(&prompt);
        let tiles = world.full_tiles(&fetch(&world, &prompt).expect("all is well"));
        let sent = |world: &World| world.cluster.shards.iter().map(|shard| shard.tiles_sent()).sum::<u64>();
        assert_eq!(sent(&world), tiles.len() as u64);
        world.cluster.shards[victim].faults.stalled_gets.store(1, Ordering::SeqCst);
        let again = fetch(&world, &prompt).expect("the other copies are read");
        assert!(world.full_tiles(&again) == tiles, "without shard {victim}");
        let layers = (tiles.len() / 20) as u64;
        let more = sent(&world) - 2 * tiles.len() as u64;
        assert!(more < layers, "{more} tiles of at most one block came twice");
        assert_eq!(world.cluster.shards[victim].faults.stalled_gets.load(Ordering::SeqCst), 0, "{victim}");
    }
}

#[test]
fn blocks_are_handed_over_to_other_copies_and_counted_once() {
    let prompt = tokens(5, 9 * BLOCK);
    for victim in 0..3 {
        let world = World::hasty(3);
        world.store(&prompt);
        let mut sequence = world.open(&prompt[..4 * BLOCK]);
        step(&world, &mut sequence, &prompt[4 * BLOCK..]);
        silent(&world, victim, true);
        let appended = world.runtime.block_on(sequence.append_remote(&ctx(), 5, 60_000));
        appended.expect("the other copies take over");
        assert_eq!((sequence.remote_blocks(), sequence.broken()), (9, None));
        silent(&world, victim, false);
        let all = [&prompt[..], &[3]].concat();
        assert_eq!(step(&world, &mut sequence, &[3]), expected(&world, &all), "without shard {victim}");
        drop(sequence);
        assert!(world.views_settle_at(0), "shard {victim}");
    }
}

#[test]
fn when_all_copies_are_silent_they_are_waited_for() {
    let prompt = tokens(7, 9 * BLOCK);
    let world = World::hasty(2);
    world.store(&prompt);
    let wake = |world: &World| {
        let shards = world.cluster.shards.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(2_500));
            shards.iter().for_each(|shard| shard.faults.silent.store(false, Ordering::SeqCst));
        })
    };
    let hush = |world: &World| (0..2).for_each(|shard| silent(world, shard, true));

    hush(&world);
    let waking = wake(&world);
    let mut sequence = open(&world, &prompt[..2 * BLOCK]).expect("they go on in time");
    waking.join().expect("it only sleeps");
    step(&world, &mut sequence, &prompt[2 * BLOCK..]);

    hush(&world);
    let waking = wake(&world);
    // The last block of the stripe that is there, and then stripes that nobody was asked for.
    let appended = world.runtime.block_on(sequence.append_remote(&ctx(), 7, 60_000));
    appended.expect("they go on in time");
    waking.join().expect("it only sleeps");
    let all = [&prompt[..], &[3]].concat();
    assert_eq!(step(&world, &mut sequence, &[3]), expected(&world, &all));

    hush(&world);
    let waking = wake(&world);
    let fetched = fetch(&world, &prompt).expect("they go on in time");
    waking.join().expect("it only sleeps");
    assert!(world.full_tiles(&fetched) == world.reference(&prompt).0);
    drop(sequence);
    assert!(world.views_settle_at(0));
}

#[test]
fn whoever_gives_up_leaves_no_view_behind() {
    let prompt = tokens(12, 20 * BLOCK);
    let world = World::hasty(3);
    world.store(&prompt);
    silent(&world, 0, true);
    silent(&world, 1, true);
    let gone = CallContext::new("test").with_timeout(Duration::from_secs(3));
    let (identity, links) = (world.cluster.identity(b""), world.links());
    let opened = world.runtime.block_on(Sequence::open(
        &world.cluster.engine,
        &gone,
        identity,
        links,
        &prompt,
        60_000,
    ));
    assert!(matches!(opened, Err(Error::DeadlineExceeded)), "{opened:?}");
    silent(&world, 0, false);
    silent(&world, 1, false);
    assert!(opens(&world, 0, 1) && opens(&world, 1, 1), "both were asked");
    assert!(world.views_settle_at(0));
}
