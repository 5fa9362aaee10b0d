//! Sparse prefill over blocks on shards gives the bits of sparse prefill over blocks that are all here: any policy, prefix, chunking,
//! number of shards and lane.

#[path = "support/world.rs"]
mod support;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use longshore_attention::{HeadBudgets, HeadPlan, KvDtype, PrefillPolicy};
use longshore_engine::{
    EngineOptions, Error, Logits, RemoteVisits, Sequence, StepInput, StepObserver, testing::tokens,
};
use longshore_fabric::{CallContext, Code};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::Barrier;

use support::{BLOCK, World, bits, tiles};

/// Policies that read only summaries, or none.
const POLICIES: [&str; 10] = [
    "blocks:scorer=row-normalised,selector=top-k,k=1,sink=0,local=0,dense_layers=1,min_positions=64",
    "blocks:scorer=pooled,selector=alpha,alpha=0.6,sink=1,local=1,dense_layers=0,min_positions=0",
    "blocks:scorer=pooled,selector=alpha,alpha=0.9,sink=0,local=0,dense_layers=0,min_positions=0,correction=off",
    "blocks:scorer=second-order,selector=mass,gamma=0.5,peak=0.5,sink=0,local=1,dense_layers=0,min_positions=32",
    "blocks:scorer=pooled-query,selector=top-k,k=2,sink=0,local=0,escape=0.4,dense_layers=1,min_positions=0",
    "blocks:scorer=row-normalised,selector=mass,gamma=0.6,skip=1.5,sink=0,local=0,dense_layers=0,min_positions=0",
    "balanced:min_positions=0,sink=0,local=0",
    "fast:min_positions=32",
    "streaming:sink=16,recent=40,dense_layers=1,min_positions=0",
    "heads:level=mixed,min_positions=0",
];

/// Two KV heads in each of three layers: dense ones beside different rules.
const PLAN: &str = r#"{
 "format": "longshore-head-budgets", "version": 1, "model": "tiny",
 "levels": [{"name": "mixed", "note": "", "blocks": "selector=mass,sink=0,local=0", "heads": [
  ["dense", "scorer=row-normalised,gamma=0.5"],
  ["scorer=second-order,gamma=0.7", "scorer=pooled,selector=alpha,alpha=0.6"],
  ["scorer=row-normalised,gamma=0.9,peak=0.3", "dense"]
 ]}]
}"#;

#[derive(Default)]
struct Watch {
    visits: RemoteVisits,
}

impl StepObserver for Watch {
    fn layer_done(&mut self, _: usize, _: &[StepInput<'_>]) -> Result<(), Error> {
        Ok(())
    }

    fn visited_remotely(&mut self, visits: &RemoteVisits) {
        self.visits.lists += visits.lists;
        self.visits.blocks += visits.blocks;
        self.visits.query_bytes += visits.query_bytes;
        self.visits.partial_bytes += visits.partial_bytes;
    }
}

fn policy(text: &str) -> Arc<PrefillPolicy> {
    let plan: HeadPlan = HeadBudgets::from_json(PLAN, 3, 2).expect("the text is a plan").into();
    Arc::new(PrefillPolicy::parse(text, Some(&plan)).expect("the text is a policy"))
}

/// Computes `tokens` in chunks; the logits of all rows of the last chunk, and what shards did.
fn compute(world: &World, sequence: &mut Sequence, tokens: &[u32], chunk: usize) -> (Vec<u32>, RemoteVisits) {
    compute_in(world, &CallContext::new("test"), sequence, tokens, chunk)
}

fn compute_in(
    world: &World,
    ctx: &CallContext,
    sequence: &mut Sequence,
    tokens: &[u32],
    chunk: usize,
) -> (Vec<u32>, RemoteVisits) {
    let (mut watch, mut logits) = (Watch::default(), Vec::new());
    for part in tokens.chunks(chunk) {
        let input = StepInput { sequence, tokens: part, logits: Logits::All };
        let outputs = world.cluster.engine.step(ctx, &mut [input], &mut watch);
        let all = outputs.expect("the step runs").remove(0).expect("shards answer");
        logits = all.expect("they were wanted").into_all();
    }
    (bits(&logits), watch.visits)
}

fn opened(world: &World, prefix: &[u32], text: &str, dense_from: u64) -> (Sequence, u64) {
    let mut sequence = world.open(prefix);
    sequence.set_prefill(policy(text), dense_from).expect("stripes are small");
    let loaded = world.runtime.block_on(sequence.load_summaries(&CallContext::new("test")));
    (sequence, loaded.expect("shards make summaries"))
}

/// One case: a prefix on shards against the same prefix here.
fn check(world: &World, text: &str, rng: &mut ChaCha8Rng) -> RemoteVisits {
    let length = rng.random_range(6..24) * BLOCK + [0, 3, 16][rng.random_range(0..3)];
    let prompt = tokens(rng.random(), length);
    let cached = rng.random_range(1..length / BLOCK) * BLOCK;
    let dense_from = [u64::MAX, (length as u64 - 20) / 32 * 32][rng.random_range(0..2)];
    let chunk = [32, 64, 96, 400][rng.random_range(0..4)];
    world.store(&prompt[..cached]);
    let mut here = world.fetch(&prompt[..cached]).expect("the blocks are there");
    here.set_prefill(policy(text), dense_from).expect("stripes are small");
    let (expected, none) = compute(world, &mut here, &prompt[cached..], chunk);
    assert_eq!(none, RemoteVisits::default(), "nothing is remote");
    let (mut there, loaded) = opened(world, &prompt[..cached], text, dense_from);
    let (found, visits) = compute(world, &mut there, &prompt[cached..], chunk);
    let what =
        format!("{text}, {length} tokens, {cached} cached, chunks of {chunk}, dense from {dense_from}");
    assert_eq!(found, expected, "logits: {what}");
    let from = (cached / BLOCK) as u64;
    assert!(tiles(&there, from) == tiles(&here, from), "tiles: {what}");
    assert_eq!(loaded == 0, text.starts_with("streaming"), "{what}");
    visits
}

#[test]
fn remote_equals_local_for_every_policy_shard_count_and_wave() {
    let mut rng = ChaCha8Rng::seed_from_u64(41);
    for shards in 1..=4 {
        let kv_dtype = KvDtype::ALL[shards % 4];
        // Waves of a few rows, and of all.
        let wave_bytes = [2_000, 64 << 20][shards % 2];
        let options = EngineOptions { kv_dtype, wave_bytes, ..EngineOptions::default() };
        let world = World::with_options(shards, options);
        let mut blocks = 0;
        for text in POLICIES {
            for _ in 0..3 {
                blocks += check(&world, text, &mut rng).blocks;
            }
        }
        assert!(blocks > 0, "shards visited nothing");
    }
}

#[test]
fn the_grpc_lane_gives_the_same() {
    let mut rng = ChaCha8Rng::seed_from_u64(42);
    for shards in [1, 3] {
        let world =
            World::over_grpc(shards, EngineOptions { kv_dtype: KvDtype::F16, ..EngineOptions::default() });
        for text in POLICIES {
            check(&world, text, &mut rng);
        }
    }
}

#[test]
fn selection_ships_less_and_visits_less() {
    let world = World::new(2, KvDtype::F32);
    let prompt = tokens(43, 400);
    world.store(&prompt[..320]);
    let sparse = "blocks:scorer=pooled,selector=top-k,k=1,sink=0,local=0,dense_layers=0,min_positions=0,correction=off";
    let full = "blocks:scorer=pooled,selector=alpha,alpha=0,dense_layers=0,min_positions=0";
    let visits = |text: &str| {
        let (mut sequence, _) = opened(&world, &prompt[..320], text, u64::MAX);
        compute(&world, &mut sequence, &prompt[320..], 80).1
    };
    let (few, all) = (visits(sparse), visits(full));
    // 20 blocks and 3 layers; 2 KV heads of 3 query tiles, the last of which is not whole and thus exact.
    assert_eq!(all.blocks, 20 * 3 * 2 * 3);
    assert!(few.blocks * 2 < all.blocks, "{few:?} of {all:?}");
    assert!(few.partial_bytes * 2 < all.partial_bytes, "{few:?} of {all:?}");
}

/// A prompt that outgrows its worker hands its oldest blocks over and goes on, summaries and all.
#[test]
fn blocks_handed_over_on_the_way_change_nothing() {
    let world = World::new(3, KvDtype::F16);
    for text in POLICIES {
        // All policies share a namespace here, and equal keys would find another policy's blocks.
        world.cluster.shards.iter().for_each(|shard| shard.forget());
        let prompt = tokens(44, 320);
        let mut whole = world.empty();
        whole.set_prefill(policy(text), u64::MAX).expect("stripes are small");
        let (expected, _) = compute(&world, &mut whole, &prompt, 64);
        let mut sequence = world.empty();
        sequence.set_prefill(policy(text), u64::MAX).expect("stripes are small");
        let mut found = Vec::new();
        for (chunk, part) in prompt.chunks(64).enumerate() {
            (found, _) = compute(&world, &mut sequence, part, 64);
            store_blocks(&world, &sequence);
            world.append(&mut sequence, 3 - chunk as u64 % 2).expect("the shards hold the blocks");
        }
        assert_eq!(found, expected, "{text}");
    }
}

/// Stores the local blocks of a sequence, as a prefill worker does.
fn store_blocks(world: &World, sequence: &Sequence) {
    let shape = world.cluster.engine.wire_tile_shape();
    for block in sequence.remote_blocks()..sequence.full_blocks() {
        let link = &sequence.links().links()[sequence.owner(block).expect("there are shards")];
        let tiles = sequence.block_messages(block).expect("the block is local");
        let ctx = CallContext::new("store");
        let store = longshore_engine::store_block(&ctx, link, *sequence.identity(), shape, tiles);
        world.runtime.block_on(store).expect("the shard takes the block");
    }
}

#[test]
fn summaries_and_partials_that_do_not_fit_are_data_loss() {
    let world = World::new(1, KvDtype::F32);
    let prompt = tokens(45, 8 * BLOCK);
    world.store(&prompt);
    let prefix = &prompt[..6 * BLOCK];
    let faults = &world.cluster.shards[0].faults;
    for fault in [&faults.misplaced_summaries, &faults.infinite_summaries] {
        fault.store(1, Ordering::SeqCst);
        let mut sequence = world.open(prefix);
        sequence.set_prefill(policy(POLICIES[1]), u64::MAX).expect("stripes are small");
        let loaded = world.runtime.block_on(sequence.load_summaries(&CallContext::new("test")));
        assert_eq!(loaded.expect_err("the summaries are wrong").kind(), Code::DataLoss);
    }
    for (fault, code) in [
        (&faults.short_attends, Code::DataLoss),
        (&faults.corrupt_attends, Code::DataLoss),
        (&faults.failed_attends, Code::Unavailable),
    ] {
        let (mut sequence, _) = opened(&world, prefix, POLICIES[1], u64::MAX);
        fault.store(1, Ordering::SeqCst);
        let error = world.try_step(&mut sequence, &prompt[6 * BLOCK..]).expect_err("the shard fails");
        assert_eq!(error.kind(), code, "{error}");
    }
}

/// Another copy takes over in the middle of a prompt.
#[test]
fn a_shard_that_dies_or_lies_changes_no_bit_of_a_sparse_step() {
    let prompt = tokens(46, 20 * BLOCK);
    let (prefix, suffix) = prompt.split_at(12 * BLOCK);
    for fault in ["dies", "lies", "leaves out"] {
        for victim in 0..3 {
            let world = World::with_copies(3, 2, 2);
            world.store(prefix);
            let mut here = world.fetch(prefix).expect("the blocks are there");
            here.set_prefill(policy(POLICIES[1]), u64::MAX).expect("stripes are small");
            let (expected, _) = compute(&world, &mut here, suffix, 64);
            let (mut there, _) = opened(&world, prefix, POLICIES[1], u64::MAX);
            let faults = &world.cluster.shards[victim].faults;
            match fault {
                "dies" => faults.away.store(true, Ordering::SeqCst),
                "lies" => faults.corrupt_attends.store(3, Ordering::SeqCst),
                _ => faults.short_attends.store(2, Ordering::SeqCst),
            }
            let (found, _) = compute(&world, &mut there, suffix, 64);
            assert_eq!(found, expected, "shard {victim} {fault}");
        }
    }
}

/// Whoever waited for it would fail: an attention query may take longer than the caller has time.
#[test]
fn a_shard_that_falls_silent_is_passed_over_and_nothing_counts_twice() {
    let prompt = tokens(47, 20 * BLOCK);
    let (prefix, suffix) = prompt.split_at(12 * BLOCK);
    let time = Duration::from_secs(40);
    for victim in 0..3 {
        let world = World::hasty(3);
        world.store(prefix);
        let (mut sequence, _) = opened(&world, prefix, POLICIES[1], u64::MAX);
        let (expected, usual) = compute(&world, &mut sequence, suffix, 64);
        let (mut sequence, _) = opened(&world, prefix, POLICIES[1], u64::MAX);
        let silent = &world.cluster.shards[victim];
        assert!(silent.views() > 0, "every shard has a part");
        // What was given up while the machine was busy is answered before.
        let last = world.ask_in_vain(victim).wait_blocking().expect_err("there is no such view");
        assert_eq!(last.code, Code::NotFound);
        silent.faults.silent.store(true, Ordering::SeqCst);
        let answered = silent.attends();
        let ctx = CallContext::new("test").with_timeout(time);
        let (found, visits) = compute_in(&world, &ctx, &mut sequence, suffix, 64);
        assert_eq!(found, expected, "without shard {victim}");
        assert_eq!(silent.attends(), answered, "nobody waited for shard {victim}");
        assert_eq!(visits.blocks, usual.blocks, "what shard {victim} was asked in vain does not count");
    }
}

/// Answers come after other copies were asked, and those are as slow: they are waited for, and what comes late is nobody's.
#[test]
fn answers_that_come_too_late_count_once() {
    let prompt = tokens(49, 16 * BLOCK);
    let (prefix, suffix) = prompt.split_at(12 * BLOCK);
    let world = World::hasty(2);
    world.store(prefix);
    let (mut sequence, _) = opened(&world, prefix, POLICIES[4], u64::MAX);
    let (expected, usual) = compute(&world, &mut sequence, suffix, 400);
    let (mut sequence, _) = opened(&world, prefix, POLICIES[4], u64::MAX);
    let asked = world.attends();
    for shard in &world.cluster.shards {
        shard.faults.attend_delay_ms.store(700, Ordering::SeqCst);
    }
    let (found, visits) = compute(&world, &mut sequence, suffix, 400);
    assert_eq!((found, visits.blocks), (expected, usual.blocks));
    assert!(world.attends() > asked, "shards visited nothing");
}

/// The first owner is gone, breaks off or lies when its summaries are asked for: those of another copy give the same bits.
#[test]
fn summaries_come_from_another_copy_when_a_shard_fails() {
    let prompt = tokens(47, 20 * BLOCK);
    let (prefix, suffix) = prompt.split_at(12 * BLOCK);
    for fault in ["dies", "breaks off", "lies", "answers nonsense"] {
        for victim in 0..3 {
            let world = World::with_copies(3, 2, 2);
            world.store(prefix);
            let mut here = world.fetch(prefix).expect("the blocks are there");
            here.set_prefill(policy(POLICIES[1]), u64::MAX).expect("stripes are small");
            let (expected, _) = compute(&world, &mut here, suffix, 64);
            let mut there = world.open(prefix);
            there.set_prefill(policy(POLICIES[1]), u64::MAX).expect("stripes are small");
            assert!(world.cluster.shards[victim].views() > 0, "every shard has a part");
            let faults = &world.cluster.shards[victim].faults;
            match fault {
                "dies" => faults.away.store(true, Ordering::SeqCst),
                "breaks off" => faults.broken_summaries.store(2, Ordering::SeqCst),
                "lies" => faults.misplaced_summaries.store(2, Ordering::SeqCst),
                _ => faults.infinite_summaries.store(2, Ordering::SeqCst),
            }
            let loaded = world.runtime.block_on(there.load_summaries(&CallContext::new("test")));
            assert!(loaded.expect("another copy has them") > 0, "shard {victim} {fault}");
            let (found, visits) = compute(&world, &mut there, suffix, 64);
            assert_eq!(found, expected, "shard {victim} {fault}");
            assert!(visits.blocks > 0, "shards visited nothing");
        }
    }
}

/// Every shard waits until all others are read, so that whoever reads one after the other reads nothing.
#[test]
fn summaries_come_from_all_shards_at_once() {
    let prompt = tokens(50, 20 * BLOCK);
    let (prefix, suffix) = prompt.split_at(12 * BLOCK);
    let world = World::new(3, KvDtype::F32);
    world.store(prefix);
    let mut here = world.fetch(prefix).expect("the blocks are there");
    here.set_prefill(policy(POLICIES[1]), u64::MAX).expect("stripes are small");
    let (expected, _) = compute(&world, &mut here, suffix, 64);
    let mut there = world.open(prefix);
    there.set_prefill(policy(POLICIES[1]), u64::MAX).expect("stripes are small");
    let parts = world.cluster.open_views();
    assert!(parts >= 2, "two shards at least have a part");
    let together = Arc::new(Barrier::new(parts));
    for shard in &world.cluster.shards {
        *shard.faults.summaries_together.lock().expect("nobody panicked") = Some(Arc::clone(&together));
    }
    let ctx = CallContext::new("test").with_timeout(Duration::from_secs(30));
    let loaded = world.runtime.block_on(there.load_summaries(&ctx)).expect("all are read at once");
    assert!(loaded > 0);
    assert_eq!(compute(&world, &mut there, suffix, 64).0, expected, "they are in their places");
}

/// Two of three are gone: some stripes have no copy left.
#[test]
fn summaries_that_no_copy_can_give_are_an_error() {
    let world = World::with_copies(3, 2, 2);
    let prompt = tokens(3, 30 * BLOCK);
    world.store(&prompt);
    let mut sequence = world.open(&prompt);
    sequence.set_prefill(policy(POLICIES[1]), u64::MAX).expect("stripes are small");
    for shard in &world.cluster.shards[..2] {
        shard.faults.away.store(true, Ordering::SeqCst);
    }
    let loaded = world.runtime.block_on(sequence.load_summaries(&CallContext::new("test")));
    let kind = loaded.expect_err("nobody has some of them").kind();
    assert!(matches!(kind, Code::Unavailable | Code::NotFound), "{kind:?}");
}
