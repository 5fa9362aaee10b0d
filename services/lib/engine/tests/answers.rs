//! Rows of answers under policies with streaming heads: the bits of a prompt under the same policy, wherever blocks lie, however rows
//! come.

#[path = "support/world.rs"]
mod support;

use std::sync::{Arc, atomic::Ordering};

use longshore_attention::{HeadPattern, HeadPlan, KvDtype, PrefillPolicy};
use longshore_engine::{AnswerVisits, EngineOptions, Logits, Sequence, StepInput, testing::tokens};
use longshore_fabric::{CallContext, Code};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use support::{BLOCK, World, bits, tiles};

/// All heads in all layers but one; some heads in some layers.
const POLICIES: [&str; 4] = [
    "streaming:sink=16,recent=20,min_positions=0",
    "streaming:sink=0,recent=1,dense_layers=1,min_positions=0",
    "heads:min_positions=0",
    "heads:dense_layers=1,min_positions=200",
];

/// Two KV heads in each of three layers.
fn policy(text: &str) -> Arc<PrefillPolicy> {
    let stream = |sink, recent| HeadPattern::Streaming { sink, recent };
    let plan = HeadPlan::new(vec![
        vec![HeadPattern::Dense, stream(16, 33)],
        vec![stream(0, 17), stream(48, 16)],
        vec![stream(20, 1), HeadPattern::Dense],
    ]);
    let plan = plan.expect("the layers are alike");
    Arc::new(PrefillPolicy::parse(text, Some(&plan)).expect("the text is a policy"))
}

/// Logits of all rows, which come in steps of these sizes, the last one again and again.
fn compute(
    world: &World,
    sequence: &mut Sequence,
    mut tokens: &[u32],
    steps: &[usize],
) -> (Vec<u32>, AnswerVisits) {
    let (before, mut all) = (sequence.answer_visits(), Vec::new());
    let mut sizes = steps.iter();
    let mut size = 1;
    while !tokens.is_empty() {
        size = sizes.next().copied().unwrap_or(size).min(tokens.len());
        let (now, later) = tokens.split_at(size);
        let input = StepInput { sequence: &mut *sequence, tokens: now, logits: Logits::All };
        let outputs = world.cluster.engine.step(&CallContext::new("test"), &mut [input], &mut ());
        let logits = outputs.expect("the step runs").remove(0).expect("shards answer");
        all.extend(logits.expect("they were wanted").into_all());
        tokens = later;
    }
    let visits = sequence.answer_visits();
    (bits(&all), AnswerVisits { blocks: visits.blocks - before.blocks, of: visits.of - before.of })
}

fn answering(world: &World, mut sequence: Sequence, text: &str, prompt_tokens: usize) -> Sequence {
    let set = sequence.set_answer(&world.cluster.engine, &policy(text), prompt_tokens as u64);
    set.expect("the plan is of this model");
    sequence
}

/// Stores the local blocks of a sequence and hands them over.
fn hand_over(world: &World, sequence: &mut Sequence) {
    let shape = world.cluster.engine.wire_tile_shape();
    let count = sequence.full_blocks() - sequence.remote_blocks();
    for block in sequence.remote_blocks()..sequence.full_blocks() {
        let link = &sequence.links().links()[sequence.owner(block).expect("there are shards")];
        let tiles = sequence.block_messages(block).expect("the block is local");
        let ctx = CallContext::new("store");
        let store = longshore_engine::store_block(&ctx, link, *sequence.identity(), shape, tiles);
        world.runtime.block_on(store).expect("the shard takes the block");
    }
    world.append(sequence, count).expect("the shards hold the blocks");
}

/// The plan of a prompt and the rule of answers are two pieces of code; they must visit the same keys in the same order.
#[test]
fn an_answer_has_the_bits_of_a_prompt_under_the_same_policy() {
    for (kv_dtype, text) in
        [(KvDtype::F32, POLICIES[0]), (KvDtype::Int8, POLICIES[2]), (KvDtype::F16, POLICIES[3])]
    {
        let world = World::new(0, kv_dtype);
        let all = tokens(51, 320);
        let mut prompt = world.empty();
        prompt.set_prefill(policy(text), u64::MAX).expect("stripes are small");
        let (expected, none) = compute(&world, &mut prompt, &all, &[320]);
        assert_eq!(none, AnswerVisits::default());
        for (prompt_tokens, steps) in [(160, vec![160, 1]), (160, vec![160, 45, 7]), (32, vec![32, 288])] {
            let mut sequence = world.empty();
            sequence.set_prefill(policy(text), u64::MAX).expect("stripes are small");
            let mut sequence = answering(&world, sequence, text, prompt_tokens);
            let (found, visits) = compute(&world, &mut sequence, &all, &steps);
            assert!(found == expected, "{text}, {steps:?}: other logits");
            assert!(tiles(&sequence, 0) == tiles(&prompt, 0), "{text}, {steps:?}: other tiles");
            assert!(visits.blocks < visits.of, "{visits:?}");
        }
        let mut exact = world.empty();
        let (exact, _) = compute(&world, &mut exact, &all, &[320]);
        assert!(exact != expected, "{text} must change something here");
    }
}

/// One case: a prefix on shards against the same prefix here, other steps, blocks handed over on the way.
fn check(world: &World, text: &str, rng: &mut ChaCha8Rng) -> AnswerVisits {
    let cached = rng.random_range(4..24) * BLOCK;
    let tail = rng.random_range(1..2 * BLOCK);
    let all = tokens(rng.random(), cached + tail + 60);
    world.store(&all[..cached]);
    // Answers may have begun before the prefix ended, when they are resumed.
    let prompt_tokens = cached + tail - rng.random_range(0..cached.min(40));
    let here = world.fetch(&all[..cached]).expect("the blocks are there");
    let mut here = answering(world, here, text, prompt_tokens);
    let (expected, at_once) = compute(world, &mut here, &all[cached..], &[tail + 60]);
    let mut there = answering(world, world.open(&all[..cached]), text, prompt_tokens);
    let middle = cached + tail + rng.random_range(10..40);
    let (mut found, first) = compute(world, &mut there, &all[cached..middle], &[tail, 1]);
    hand_over(world, &mut there);
    let from = there.remote_blocks();
    let (rest, second) = compute(world, &mut there, &all[middle..], &[1, 3, 1]);
    found.extend(rest);
    let what = format!("{text}, {cached} cached, {tail} more, answer from {prompt_tokens}");
    assert!(found == expected, "logits: {what}");
    let own = tiles(&here, cached as u64 / BLOCK as u64);
    assert!(tiles(&there, from).iter().all(|(key, tile)| own.get(key) == Some(tile)), "tiles: {what}");
    let visits = AnswerVisits { blocks: first.blocks + second.blocks, of: first.of + second.of };
    assert_eq!(visits, at_once, "{what}");
    visits
}

#[test]
fn remote_equals_local_for_every_policy_shard_count_and_step() {
    let mut rng = ChaCha8Rng::seed_from_u64(52);
    for shards in 1..=4 {
        let kv_dtype = KvDtype::ALL[shards % 4];
        let wave_bytes = [2_000, 64 << 20][shards % 2];
        let options = EngineOptions { kv_dtype, wave_bytes, ..EngineOptions::default() };
        let world = World::with_options(shards, options);
        for text in POLICIES {
            for _ in 0..2 {
                // All policies share a namespace here, and equal keys would find another policy's blocks.
                world.cluster.shards.iter().for_each(|shard| shard.forget());
                let visits = check(&world, text, &mut rng);
                assert!(visits.of == 0 || visits.blocks < visits.of, "{text}: {visits:?}");
            }
        }
    }
}

#[test]
fn the_grpc_lane_gives_the_same_and_renews_leases() {
    let mut rng = ChaCha8Rng::seed_from_u64(53);
    let world = World::over_grpc(3, EngineOptions { kv_dtype: KvDtype::F16, ..EngineOptions::default() });
    for text in POLICIES {
        world.cluster.shards.iter().for_each(|shard| shard.forget());
        check(&world, text, &mut rng);
    }
    // Those of the last case are closed in the background.
    assert!(world.views_settle_at(0));
    let prompt = tokens(54, 12 * BLOCK);
    world.store(&prompt);
    let exact = world.open(&prompt);
    assert!(!exact.leaves_views_idle(), "queries renew the leases of exact sequences");
    let sequence = answering(&world, world.open(&prompt), POLICIES[0], prompt.len());
    assert!(sequence.leaves_views_idle());
    let before = world.cluster.open_views();
    world.runtime.block_on(sequence.keep_views(&CallContext::new("test")));
    assert_eq!(world.cluster.open_views(), before);
}

/// Blocks by the definition, key by key, of one row.
fn visited(position: u64, sink: u64, recent: u64) -> u64 {
    let (block, tile) = (BLOCK as u64, position / 32 * 32);
    let sees = |key: u64| key / block * block < sink || key >= tile || tile - key < recent;
    let mut blocks: Vec<u64> = (0..=position).filter(|&key| sees(key)).map(|key| key / block).collect();
    blocks.dedup();
    blocks.len() as u64
}

#[test]
fn only_shards_with_visited_blocks_are_asked_and_visits_are_counted() {
    let world = World::new(4, KvDtype::F32);
    let prompt = tokens(55, 40 * BLOCK);
    world.store(&prompt);
    let step = |mut sequence: Sequence| {
        let before = world.attends();
        let (_, visits) = compute(&world, &mut sequence, &[1, 2, 3], &[1]);
        (world.attends() - before, visits)
    };
    let (exact, none) = step(world.open(&prompt));
    // 3 layers and 3 rows; every shard holds some of 14 stripes.
    assert_eq!((exact, none), (4 * 9, AnswerVisits::default()));
    let (asked, visits) = step(answering(&world, world.open(&prompt), POLICIES[0], prompt.len()));
    assert!(asked < exact, "{asked} of {exact}");
    let rows = (0..3).map(|row| prompt.len() as u64 + row);
    let of = rows.clone().map(|position| 6 * (position / BLOCK as u64 + 1)).sum();
    let blocks = rows.map(|position| 6 * visited(position, 16, 20)).sum();
    assert_eq!(visits, AnswerVisits { blocks, of });
}

#[test]
fn a_batch_of_answers_and_others_gives_each_what_it_gets_alone() {
    let world = World::new(3, KvDtype::F16);
    let prompts: Vec<Vec<u32>> = (0..4).map(|seed| tokens(60 + seed, 10 * BLOCK)).collect();
    let texts = [Some(POLICIES[0]), None, Some(POLICIES[2]), Some(POLICIES[1])];
    let open = |index: usize| {
        let sequence = world.open(&prompts[index]);
        texts[index]
            .map_or_else(|| world.open(&prompts[index]), |text| answering(&world, sequence, text, 150))
    };
    prompts.iter().for_each(|prompt| world.store(prompt));
    let alone: Vec<Vec<u32>> =
        (0..4).map(|index| compute(&world, &mut open(index), &[7, 8, 9], &[3]).0).collect();
    let mut sequences: Vec<Sequence> = (0..4).map(open).collect();
    let inputs = sequences.iter_mut();
    let mut batch: Vec<StepInput<'_>> =
        inputs.map(|sequence| StepInput { sequence, tokens: &[7, 8, 9], logits: Logits::All }).collect();
    let outputs = world.cluster.engine.step(&CallContext::new("test"), &mut batch, &mut ());
    for (index, output) in outputs.expect("the step runs").into_iter().enumerate() {
        let logits = output.expect("shards answer").expect("they were wanted").into_all();
        assert!(bits(&logits) == alone[index], "sequence {index}");
    }
}

#[test]
fn another_copy_takes_over_in_the_middle_of_an_answer() {
    let all = tokens(56, 20 * BLOCK);
    let (prefix, rest) = all.split_at(14 * BLOCK);
    for (victim, text) in [(0, POLICIES[0]), (1, POLICIES[2]), (2, POLICIES[2])] {
        for lies in [false, true] {
            let world = World::with_copies(3, 2, 2);
            world.store(prefix);
            let here = world.fetch(prefix).expect("the blocks are there");
            let mut here = answering(&world, here, text, prefix.len());
            let (expected, _) = compute(&world, &mut here, rest, &[rest.len()]);
            let mut there = answering(&world, world.open(prefix), text, prefix.len());
            let (mut found, _) = compute(&world, &mut there, &rest[..20], &[1]);
            let faults = &world.cluster.shards[victim].faults;
            match lies {
                true => faults.short_attends.store(2, Ordering::SeqCst),
                false => faults.away.store(true, Ordering::SeqCst),
            }
            found.extend(compute(&world, &mut there, &rest[20..], &[1]).0);
            assert!(found == expected, "shard {victim}, {text}, lies: {lies}");
        }
    }
}

#[test]
fn plans_of_other_models_are_refused_and_other_policies_change_nothing() {
    let world = World::new(0, KvDtype::F32);
    let mut sequence = world.empty();
    let plan =
        HeadPlan::new(vec![vec![HeadPattern::Streaming { sink: 1, recent: 1 }; 2]; 2]).expect("a plan");
    let other = PrefillPolicy::parse("heads", Some(&plan)).expect("the text is a policy");
    let error = sequence.set_answer(&world.cluster.engine, &other, 5).expect_err("it has two layers");
    assert_eq!(error.kind(), Code::InvalidArgument, "{error}");
    let balanced = PrefillPolicy::parse("balanced:min_positions=0", None).expect("the text is a policy");
    sequence.set_answer(&world.cluster.engine, &balanced, 5).expect("nothing streams");
    assert!(!sequence.leaves_views_idle());
    let all = tokens(57, 100);
    let (_, visits) = compute(&world, &mut sequence, &all, &[100]);
    assert_eq!(visits, AnswerVisits::default());
    assert!(world.full_tiles(&sequence) == world.reference(&all).0);
}
