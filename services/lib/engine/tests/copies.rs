//! Several copies of each block: what one of them does or does not do changes no bit of a result.

#[path = "support/world.rs"]
mod support;

use std::{collections::BTreeMap, sync::atomic::Ordering};

use longshore_blocks::BlockKey;
use longshore_engine::{Error, Sequence, store_copies, testing::tokens};
use longshore_fabric::{CallContext, Code};
use longshore_proto::types::PutOutcome;

use support::{BLOCK, World, bits};

/// Copies of each block.
fn counts(world: &World) -> BTreeMap<BlockKey, usize> {
    let mut counts = BTreeMap::new();
    for shard in &world.cluster.shards {
        shard
            .bodies()
            .keys()
            .filter(|(_, layer)| *layer == 0)
            .for_each(|(key, _)| *counts.entry(*key).or_default() += 1);
    }
    counts
}

fn away(world: &World, shard: usize, away: bool) {
    world.cluster.shards[shard].faults.away.store(away, Ordering::SeqCst);
}

fn expected(world: &World, tokens: &[u32]) -> Vec<u32> {
    bits(&world.reference(tokens).1)
}

fn step(world: &World, sequence: &mut Sequence, tokens: &[u32]) -> Vec<u32> {
    bits(&world.step(sequence, tokens).expect("logits were asked for"))
}

#[test]
fn every_block_lies_on_as_many_shards_as_asked_for() {
    for copies in 1..=3 {
        let world = World::with_copies(4, copies, copies);
        world.store(&tokens(1, 20 * BLOCK));
        let counts = counts(&world);
        assert_eq!(counts.len(), 20);
        assert!(counts.values().all(|count| *count == copies), "{counts:?}");
    }
}

#[test]
fn any_one_shard_may_be_away_when_a_sequence_is_opened_or_fetched() {
    let world = World::with_copies(4, 2, 2);
    let prompt = tokens(2, 20 * BLOCK + 3);
    world.store(&prompt);
    let expected = expected(&world, &prompt);
    for victim in 0..4 {
        away(&world, victim, true);
        let mut opened = world.open(&prompt[..20 * BLOCK]);
        assert_eq!(step(&world, &mut opened, &prompt[20 * BLOCK..]), expected, "without shard {victim}");
        let mut fetched = world.fetch(&prompt[..20 * BLOCK]).expect("the other copies are read");
        assert_eq!(step(&world, &mut fetched, &prompt[20 * BLOCK..]), expected, "without shard {victim}");
        away(&world, victim, false);
    }
    assert!(world.views_settle_at(0));
}

#[test]
fn what_came_before_a_shard_broke_off_does_not_come_again() {
    let prompt = tokens(12, 20 * BLOCK);
    for victim in 0..4 {
        let world = World::with_copies(4, 2, 2);
        world.store(&prompt);
        let tiles = world.full_tiles(&world.fetch(&prompt).expect("all is well"));
        let sent = |world: &World| world.cluster.shards.iter().map(|shard| shard.tiles_sent()).sum::<u64>();
        assert_eq!(sent(&world), tiles.len() as u64);
        world.cluster.shards[victim].faults.broken_gets.store(1, Ordering::SeqCst);
        let again = world.fetch(&prompt).expect("the other copies are read");
        assert!(world.full_tiles(&again) == tiles, "without shard {victim}");
        let layers = (tiles.len() / 20) as u64;
        let more = sent(&world) - 2 * tiles.len() as u64;
        assert!(more < layers, "{more} tiles of at most one block came twice");
    }
}

#[test]
fn two_shards_away_are_one_too_many_and_said_so() {
    let world = World::with_copies(3, 2, 2);
    let prompt = tokens(3, 30 * BLOCK);
    world.store(&prompt);
    away(&world, 0, true);
    away(&world, 1, true);
    let error = world.open_as(b"", &prompt).expect_err("some blocks have no copy left");
    assert!(matches!(error.kind(), Code::Unavailable | Code::NotFound), "{error}");
}

#[test]
fn a_shard_that_dies_or_lies_in_the_middle_changes_no_bit() {
    let prompt = tokens(4, 20 * BLOCK + 2);
    let (next, last) = ([7], [9]);
    for fault in ["dies", "lies", "leaves out"] {
        for victim in 0..3 {
            let world = World::with_copies(3, 2, 2);
            world.store(&prompt);
            let mut sequence = world.open(&prompt[..20 * BLOCK]);
            step(&world, &mut sequence, &prompt[20 * BLOCK..]);
            let faults = &world.cluster.shards[victim].faults;
            match fault {
                "dies" => faults.away.store(true, Ordering::SeqCst),
                "lies" => faults.corrupt_attends.store(3, Ordering::SeqCst),
                _ => faults.short_attends.store(2, Ordering::SeqCst),
            }
            let all = [&prompt[..], &next].concat();
            assert_eq!(step(&world, &mut sequence, &next), expected(&world, &all), "shard {victim} {fault}");
            let all = [&all[..], &last].concat();
            assert_eq!(step(&world, &mut sequence, &last), expected(&world, &all), "shard {victim} {fault}");
            drop(sequence);
            if fault != "dies" {
                assert!(world.views_settle_at(0), "no view is left behind");
            }
        }
    }
}

#[test]
fn blocks_are_handed_over_to_the_copies_that_are_there() {
    let prompt = tokens(5, 9 * BLOCK);
    for victim in 0..3 {
        let world = World::with_copies(3, 2, 2);
        world.store(&prompt);
        let mut sequence = world.open(&prompt[..4 * BLOCK]);
        step(&world, &mut sequence, &prompt[4 * BLOCK..]);
        away(&world, victim, true);
        world.append(&mut sequence, 5).expect("the other copies take over");
        assert_eq!((sequence.remote_blocks(), sequence.broken()), (9, None));
        let all = [&prompt[..], &[3]].concat();
        assert_eq!(step(&world, &mut sequence, &[3]), expected(&world, &all), "without shard {victim}");
    }
}

#[test]
fn an_append_without_an_answer_moves_the_sequence_instead_of_breaking_it() {
    let world = World::with_copies(3, 2, 2);
    let prompt = tokens(6, 6 * BLOCK);
    world.store(&prompt);
    let mut sequence = world.open(&prompt[..BLOCK]);
    step(&world, &mut sequence, &prompt[BLOCK..]);
    for shard in &world.cluster.shards {
        shard.faults.failed_appends.store(1, Ordering::SeqCst);
    }
    world.append(&mut sequence, 5).expect("another copy takes over");
    assert_eq!((sequence.remote_blocks(), sequence.broken()), (6, None));
    let all = [&prompt[..], &[3]].concat();
    assert_eq!(step(&world, &mut sequence, &[3]), expected(&world, &all));
}

#[test]
fn copies_that_open_views_and_take_no_appends_are_an_error() {
    let world = World::with_copies(2, 2, 2);
    let prompt = tokens(6, 3 * BLOCK);
    world.store(&prompt);
    let mut sequence = world.open(&prompt[..BLOCK]);
    step(&world, &mut sequence, &prompt[BLOCK..]);
    for shard in &world.cluster.shards {
        shard.faults.failed_appends.store(u64::MAX, Ordering::SeqCst);
    }
    let ctx = CallContext::new("test").with_timeout(std::time::Duration::from_secs(60));
    let appended = world.runtime.block_on(sequence.append_remote(&ctx, 1, 60_000));
    assert!(matches!(appended, Err(Error::Shard { .. })), "{appended:?}");
    assert!(sequence.broken().is_some(), "nobody knows whether the block was appended");
}

/// Believed, it would be asked for the same blocks for ever.
#[test]
fn a_shard_that_lacks_what_nobody_asked_for_is_not_asked_again() {
    let prompt = tokens(7, 12 * BLOCK + 1);
    let ctx = CallContext::new("test").with_timeout(std::time::Duration::from_secs(60));
    let open = |world: &World| {
        let (identity, links) = (world.cluster.identity(b""), world.links());
        let prefix = &prompt[..12 * BLOCK];
        world.runtime.block_on(Sequence::open(&world.cluster.engine, &ctx, identity, links, prefix, 60_000))
    };
    for victim in 0..2 {
        let world = World::with_copies(2, 2, 2);
        world.store(&prompt);
        let liar = &world.cluster.shards[victim];
        liar.faults.alien_missing.store(true, Ordering::SeqCst);
        let mut opened = open(&world).expect("the other copy is opened");
        assert_eq!(liar.asked_to_open(), 1, "one call for all of its stripes");
        assert_eq!(step(&world, &mut opened, &prompt[12 * BLOCK..]), expected(&world, &prompt));

        let mut sequence = world.empty();
        step(&world, &mut sequence, &prompt);
        let appended = world.runtime.block_on(sequence.append_remote(&ctx, 12, 60_000));
        appended.expect("the other copy takes over");
        let all = [&prompt[..], &[3]].concat();
        assert_eq!(step(&world, &mut sequence, &[3]), expected(&world, &all));
    }
    let world = World::with_copies(1, 1, 1);
    world.store(&prompt);
    world.cluster.shards[0].faults.alien_missing.store(true, Ordering::SeqCst);
    match open(&world) {
        Err(Error::Mismatch { shard, problem }) => {
            assert!(shard.0 == "shard-0" && problem.contains("not asked for"), "{shard} {problem}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_block_that_one_copy_lacks_is_read_from_the_other() {
    let world = World::with_copies(2, 2, 2);
    let prompt = tokens(7, 12 * BLOCK + 1);
    world.store(&prompt);
    world.cluster.shards[0].forget();
    let mut sequence = world.open(&prompt[..12 * BLOCK]);
    assert_eq!(step(&world, &mut sequence, &prompt[12 * BLOCK..]), expected(&world, &prompt));
}

fn try_store(world: &World, prompt: &[u32]) -> Result<PutOutcome, Error> {
    try_store_in(world, &CallContext::new("test"), prompt)
}

fn try_store_in(world: &World, ctx: &CallContext, prompt: &[u32]) -> Result<PutOutcome, Error> {
    let mut sequence = world.empty();
    world.step(&mut sequence, prompt);
    let tiles = sequence.block_messages(0).expect("the block is local");
    let links = world.links();
    let candidates = sequence.candidates(0).expect("there are shards");
    let shape = world.cluster.engine.wire_tile_shape();
    world.runtime.block_on(store_copies(ctx, &links, &candidates, world.cluster.identity(b""), shape, tiles))
}

#[test]
fn a_write_goes_around_a_shard_that_is_away_as_long_as_enough_are_left() {
    let prompt = tokens(8, BLOCK);
    for victim in 0..3 {
        let world = World::with_copies(3, 2, 2);
        away(&world, victim, true);
        assert_eq!(try_store(&world, &prompt).expect("two are left"), PutOutcome::Stored);
        assert!(counts(&world).values().all(|count| *count == 2));
        away(&world, (victim + 1) % 3, true);
        assert!(try_store(&world, &tokens(9, BLOCK)).is_err(), "one is too few for two acknowledgements");
    }
    let world = World::with_copies(2, 2, 1);
    away(&world, 0, true);
    assert_eq!(try_store(&world, &prompt).expect("one is enough"), PutOutcome::Stored);
}

#[test]
fn silence_of_a_shard_is_made_good_by_the_next_candidate() {
    let seconds = std::time::Duration::from_secs;
    for victim in 0..3 {
        let world = World::with_copies(3, 2, 2);
        world.cluster.shards[victim].faults.ack_delay_ms.store(60_000, Ordering::SeqCst);
        let ctx = CallContext::new("test").with_timeout(seconds(9));
        let stored = try_store_in(&world, &ctx, &tokens(13, BLOCK));
        assert_eq!(
            stored.expect("two others answer in time"),
            PutOutcome::Stored,
            "shard {victim} is silent"
        );
    }
}

#[test]
fn a_full_shard_is_passed_over_and_a_slow_one_not_waited_for() {
    let world = World::with_copies(3, 2, 2);
    world
        .cluster
        .shards
        .iter()
        .take(2)
        .for_each(|shard| shard.faults.refused_puts.store(1, Ordering::SeqCst));
    let outcome = try_store(&world, &tokens(10, BLOCK)).expect("shards answered");
    let held = counts(&world).values().sum::<usize>();
    assert_eq!(outcome == PutOutcome::Stored, held == 2, "{outcome:?} with {held} copies");

    let world = World::with_copies(2, 2, 1);
    world.cluster.shards[0].faults.ack_delay_ms.store(300, Ordering::SeqCst);
    try_store(&world, &tokens(11, BLOCK)).expect("one acknowledgement is enough");
    for _ in 0..6_000 {
        if counts(&world).values().all(|count| *count == 2) {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("the second copy never came: {:?}", counts(&world));
}

#[test]
fn a_late_answer_is_asked_for_elsewhere() {
    let world = World::with_copies(2, 2, 2);
    let prompt = tokens(12, 12 * BLOCK + 1);
    world.store(&prompt);
    let mut sequence = world.open(&prompt[..12 * BLOCK]);
    let mut all = prompt[..12 * BLOCK].to_vec();
    let next: Vec<u32> = (0..24).map(|token| token % 11).collect();
    for token in &next {
        all.push(*token);
        step(&world, &mut sequence, &[*token]);
    }
    // What was given up while the machine was busy is answered before.
    let last = world.ask_in_vain(0).wait_blocking().expect_err("there is no such view");
    assert_eq!(last.code, Code::NotFound);
    // Far longer than anything before, and than this test takes when nobody waits for it.
    let slow = &world.cluster.shards[0];
    let (answered, moved) = (slow.attends(), world.cluster.shards[1].attends());
    slow.faults.attend_delay_ms.store(20_000, Ordering::SeqCst);
    all.push(5);
    assert_eq!(step(&world, &mut sequence, &[5]), expected(&world, &all));
    assert_eq!(slow.attends(), answered, "nobody waited for it");
    assert!(world.cluster.shards[1].attends() > moved);
}
