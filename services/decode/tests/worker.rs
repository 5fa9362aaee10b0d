//! What a decode worker generates, alone and in company, and how sequences end.

#[path = "support/world.rs"]
mod support;

use std::{sync::atomic::Ordering, time::Duration};

use futures::StreamExt;
use longshore_attention::{KvDtype, PrefillPolicy};
use longshore_blocks::Deployment;
use longshore_decode::Config;
use longshore_engine::testing::tokens;
use longshore_fabric::Code;
use longshore_proto::types::{DecodeEvent, DecodeStart, Identity, Sampling};

use support::{BLOCK, World, ended, finished, greedy, settles};

/// Sampling where chance and penalties matter.
fn seeded(max_tokens: u32) -> Sampling {
    Sampling {
        temperature: 1.2,
        repetition_penalty: 1.1,
        presence_penalty: 0.3,
        seed: Some(42),
        max_tokens: Some(max_tokens),
        ..Sampling::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_those_of_the_reference_on_any_number_of_shards() {
    for (shards, dtype) in [(1, KvDtype::F32), (3, KvDtype::F32), (2, KvDtype::F16)] {
        for (seed, length) in [(1, 1), (2, BLOCK), (3, BLOCK + 1), (4, 100)] {
            let world = World::with_dtype(shards, Config::default(), dtype);
            let prompt = tokens(seed, length);
            for sampling in [greedy(40), seeded(40)] {
                let expected = world.reference(&prompt, &sampling);
                let got = world.generate(&prompt, 0, sampling).await;
                assert_eq!(got, (expected, false), "{length} tokens on {shards} shards, {dtype:?}");
            }
            assert!(
                settles(|| world.cluster.open_views() == 0 && world.metrics.queue_depth.get() == 0).await
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sealed_blocks_reach_their_shards_with_the_bytes_of_a_prefill() {
    let world = World::new(3, Config::default());
    let prompt = tokens(5, 21);
    let (answer, _) = world.generate(&prompt, 0, greedy(60)).await;
    let all = [prompt, answer].concat();
    // The last token was never an input.
    let expected = world.reference_tiles(&all[..all.len() - 1]);
    assert!(settles(|| world.cluster.bodies() == expected).await, "{} tiles", world.cluster.bodies().len());
    // The engine's thread hears of it after the shard has them.
    assert!(settles(|| world.metrics.stored_blocks.get() > 0).await, "what shards took is counted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_answer_goes_on_with_the_same_tokens() {
    let prompt = tokens(6, 45);
    for sampling in [greedy(40), seeded(40)] {
        let whole = World::new(2, Config::default()).generate(&prompt, 0, sampling.clone()).await.0;
        for generated in [1, 3, 19, 20, 39, 40] {
            let world = World::new(3, Config::default());
            let so_far = [&prompt[..], &whole[..generated]].concat();
            let (rest, stopped) = world.generate(&so_far, generated, sampling.clone()).await;
            assert_eq!((&rest[..], stopped), (&whole[generated..], false), "after {generated} tokens");
        }
    }
}

/// The prompt is exact here, the answer is not.
#[tokio::test(flavor = "multi_thread")]
async fn streaming_heads_stream_in_answers_wherever_they_are_resumed() {
    let policy = PrefillPolicy::parse("streaming:sink=16,recent=20,min_positions=0", None);
    let policy = policy.expect("the text is a policy");
    let prompt = tokens(61, 150);
    for shards in [1, 3] {
        let world = World::new(shards, Config::default());
        world.prefill(&prompt).await;
        let start = |tokens: &[u32], generated: usize| DecodeStart {
            prefill_policy: policy.fingerprint(),
            ..world.start(tokens, generated, greedy(60))
        };
        let stream = world.call(start(&prompt, 0), &prompt).await.expect("the call is good");
        let expected = world.streamed(&policy, &prompt, 60);
        assert_eq!(finished(stream).await, (expected.clone(), false));
        assert_ne!(expected, world.reference(&prompt, &greedy(60)), "the policy must change something");
        let (visited, causal) = (world.metrics.visited_blocks.get(), world.metrics.causal_blocks.get());
        assert!(visited > 0 && visited * 2 < causal, "{visited} of {causal}");
        // The blocks that were sealed on the way are found again. All of them: they come in any order.
        let so_far = [&prompt[..], &expected[..30]].concat();
        let sealed = || (prompt.len() + 60 - 1) / BLOCK * 3 == world.cluster.bodies().len();
        assert!(settles(sealed).await);
        let stream = world.call(start(&so_far, 30), &so_far).await.expect("the call is good");
        assert_eq!(finished(stream).await, (expected[30..].to_vec(), false));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_that_mean_something_else_here_are_refused() {
    let world = World::new(1, Config::default());
    let prompt = tokens(62, 20);
    for text in ["sparsest", "streaming", "heads:plan=0011"] {
        let start = DecodeStart { prefill_policy: text.to_owned(), ..world.start(&prompt, 0, greedy(5)) };
        let error = world.failure(start, &prompt).await;
        assert_eq!(
            (error.code, error.field.as_deref()),
            (Code::InvalidArgument, Some("start.prefill_policy")),
            "{error}"
        );
        assert!(error.message.contains(text), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_gives_every_sequence_what_it_gets_alone() {
    let world = World::new(3, Config { max_sequences: 4, ..Config::default() });
    let prompts: Vec<Vec<u32>> = (0..7).map(|index| tokens(20 + index, 10 + 17 * index as usize)).collect();
    let sampling = |index: usize| if index.is_multiple_of(2) { greedy(35) } else { seeded(35) };
    for prompt in &prompts {
        world.prefill(prompt).await;
    }
    let mut streams = Vec::new();
    for (index, prompt) in prompts.iter().enumerate() {
        streams.push(
            world.call(world.start(prompt, 0, sampling(index)), prompt).await.expect("the call is good"),
        );
    }
    let answers = futures::future::join_all(streams.into_iter().map(finished)).await;
    for (index, (prompt, answer)) in prompts.iter().zip(answers).enumerate() {
        assert_eq!(answer.0, world.reference(prompt, &sampling(index)), "sequence {index}");
    }
}

/// Rows of logits that left the model whole, and rows that it chose of.
fn rows(world: &World) -> [u64; 2] {
    let model = &world.cluster.model;
    [&model.whole_rows, &model.chosen_rows].map(|rows| rows.load(Ordering::SeqCst))
}

#[tokio::test(flavor = "multi_thread")]
async fn logits_leave_a_model_that_chooses_only_where_the_choice_takes_all() {
    let world = World::new(2, Config { max_sequences: 8, ..Config::default() });
    let drawn = Sampling { temperature: 0.9, top_k: 5, seed: Some(3), ..greedy(9) };
    let free = Sampling { top_k: 0, ..drawn.clone() };
    let kinds = [
        (greedy(9), false),
        (drawn, false),
        (Sampling { logprobs: Some(4), ..greedy(9) }, false),
        (free, true),
        (seeded(9), true),
    ];
    let prompts: Vec<Vec<u32>> = (0..5).map(|index| tokens(40 + index, 21)).collect();
    let expected: Vec<Vec<u32>> =
        prompts.iter().zip(&kinds).map(|(prompt, (sampling, _))| world.reference(prompt, sampling)).collect();
    world.cluster.model.chooses.store(true, Ordering::SeqCst);
    for ((prompt, (sampling, whole)), expected) in prompts.iter().zip(&kinds).zip(&expected) {
        world.prefill(prompt).await;
        let before = rows(&world);
        let stream = world.call(world.start(prompt, 0, sampling.clone()), prompt).await;
        assert_eq!(finished(stream.expect("the call is good")).await, (expected.clone(), false));
        let left = [0, 1].map(|kind| rows(&world)[kind] - before[kind]);
        assert_eq!(left, if *whole { [9, 0] } else { [0, 9] }, "{sampling:?}");
    }
    // In company: each row as its own sequence needs it.
    let mut streams = Vec::new();
    for (prompt, (sampling, _)) in prompts.iter().zip(&kinds) {
        let stream = world.call(world.start(prompt, 0, sampling.clone()), prompt).await;
        streams.push(stream.expect("the call is good"));
    }
    let answers = futures::future::join_all(streams.into_iter().map(finished)).await;
    assert!(answers.into_iter().map(|(tokens, _)| tokens).eq(expected));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_token_ends_the_answer_unless_it_is_ignored() {
    let world = World::new(1, Config::default());
    let prompt = tokens(7, 30);
    let expected = world.reference(&prompt, &greedy(12));
    let stop = expected[5];
    let first = expected.iter().position(|&token| token == stop).expect("it is one of them");
    world.prefill(&prompt).await;
    let start = DecodeStart { stop_token_ids: vec![stop], ..world.start(&prompt, 0, greedy(12)) };
    let stream = world.call(start.clone(), &prompt).await.expect("the call is good");
    assert_eq!(finished(stream).await, (expected[..first].to_vec(), true));

    let sampling = Sampling { ignore_eos: true, ..greedy(12) };
    let stream = world.call(DecodeStart { sampling, ..start }, &prompt).await.expect("the call is good");
    assert_eq!(finished(stream).await, (expected, false));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_context_ends_an_answer() {
    let world = World::new(1, Config::default());
    let prompt = tokens(8, 1_020);
    let (answer, stopped) = world.generate(&prompt, 0, greedy(100)).await;
    assert_eq!((answer.len(), stopped), (4, false));
    let (answer, _) = world.generate(&tokens(8, 1_024), 0, greedy(100)).await;
    assert!(answer.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn logprobs_come_with_every_token_when_asked_for() {
    let world = World::new(1, Config::default());
    let prompt = tokens(9, 20);
    let start = world.start(&prompt, 0, Sampling { logprobs: Some(3), ..greedy(2) });
    world.prefill(&prompt).await;
    let mut stream = world.call(start, &prompt).await.expect("the call is good");
    let event = stream.next().await.expect("there is a token").expect("nothing fails");
    let DecodeEvent::Token { token_id, logprob, top } = event else { panic!("{event:?}") };
    assert_eq!((top.len(), top[0].token_id, Some(top[0].logprob)), (3, token_id, logprob));
    assert!(logprob.is_some_and(|logprob| logprob <= 0.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_leaves_releases_everything_within_a_step() {
    let world = World::new(2, Config::default());
    let prompt = tokens(10, 50);
    world.prefill(&prompt).await;
    world.cluster.model.layer_delay_ms.store(10, Ordering::SeqCst);
    let mut stream =
        world.call(world.start(&prompt, 0, greedy(500)), &prompt).await.expect("the call is good");
    stream.next().await.expect("there is a token").expect("nothing fails");
    assert!(world.cluster.open_views() > 0);
    let layers = || world.cluster.model.layers_computed.load(Ordering::SeqCst);
    drop(stream);
    let at_drop = layers();
    // The gauges go down one after the other.
    let gauges = || (world.metrics.queue_depth.get(), world.metrics.active_sequences.get());
    assert!(settles(|| world.cluster.open_views() == 0 && gauges() == (0, 0)).await, "{:?}", gauges());
    assert!(layers() <= at_drop + 2 * 3, "{} layers after {at_drop}", layers());
    assert_eq!(world.metrics.cancelled.get(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_pauses_only_its_own_sequence() {
    let world = World::new(2, Config { event_buffer: 2, ..Config::default() });
    let (slow, fast) = (tokens(11, 40), tokens(12, 40));
    world.prefill(&slow).await;
    world.prefill(&fast).await;
    let slow_stream = world.call(world.start(&slow, 0, greedy(30)), &slow).await.expect("the call is good");
    assert!(settles(|| world.metrics.paused_sequences.get() == 1).await);
    let fast_stream = world.call(world.start(&fast, 0, greedy(30)), &fast).await.expect("the call is good");
    assert_eq!(finished(fast_stream).await.0, world.reference(&fast, &greedy(30)));
    assert!(world.metrics.tokens.get() < 30 + 6, "the slow one waited");
    assert_eq!(finished(slow_stream).await.0, world.reference(&slow, &greedy(30)));
    assert_eq!(world.metrics.paused_sequences.get(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_never_reads_is_given_up() {
    let world = World::new(1, Config { event_buffer: 1, stall_timeout_ms: 50, ..Config::default() });
    let prompt = tokens(13, 40);
    world.prefill(&prompt).await;
    let stream = world.call(world.start(&prompt, 0, greedy(30)), &prompt).await.expect("the call is good");
    assert!(settles(|| world.metrics.queue_depth.get() == 0).await);
    let error = ended(stream).await.expect_err("it was given up");
    assert_eq!(error.code, Code::ResourceExhausted, "{error}");
    assert!(settles(|| world.cluster.open_views() == 0).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_worker_queues_and_a_full_queue_refuses() {
    // Nobody reads before the third one came, so that the first one keeps its place until then.
    let config = Config { max_sequences: 1, queue_max: 1, event_buffer: 1, ..Config::default() };
    let world = World::new(1, config);
    let prompt = tokens(14, 10);
    let start = world.start(&prompt, 0, greedy(5));
    let under_way = [world.call(start.clone(), &prompt).await, world.call(start.clone(), &prompt).await];
    let error = world.call(start, &prompt).await.err().expect("two sequences fill the worker");
    assert_eq!(error.code, Code::ResourceExhausted);
    assert!(error.retry_after.is_some());
    for stream in under_way {
        assert_eq!(finished(stream.expect("there was room")).await.0.len(), 5);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_blocks_are_not_found() {
    let world = World::new(3, Config::default());
    let prompt = tokens(15, 60);
    let error = world.failure(world.start(&prompt, 0, greedy(5)), &prompt).await;
    assert_eq!(error.code, Code::NotFound, "{error}");
    assert!(settles(|| world.cluster.open_views() == 0 && world.metrics.active_sequences.get() == 0).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_and_ill_shards_end_a_sequence_with_their_codes() {
    for (damaged, code) in [(true, Code::DataLoss), (false, Code::Unavailable)] {
        let world = World::new(1, Config::default());
        let prompt = tokens(16, 60);
        world.prefill(&prompt).await;
        let faults = &world.cluster.shards[0].faults;
        let fault = if damaged { &faults.corrupt_attends } else { &faults.failed_attends };
        fault.store(1, Ordering::SeqCst);
        let error = world.failure(world.start(&prompt, 0, greedy(5)), &prompt).await;
        assert_eq!(error.code, code, "{error}");
        assert_eq!(world.generate(&prompt, 0, greedy(5)).await.0, world.reference(&prompt, &greedy(5)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_block_ends_its_sequence_while_the_others_go_on() {
    let world = World::new(1, Config::default());
    let (remote, local) = (tokens(17, 60), tokens(18, 12));
    world.prefill(&remote).await;
    // All that is computed from now on stays here, or it would be lost with the rest once it is handed over.
    world.cluster.shards[0].faults.refused_puts.store(1_000, Ordering::SeqCst);
    world.cluster.model.layer_delay_ms.store(5, Ordering::SeqCst);
    let lost = world.call(world.start(&remote, 0, greedy(500)), &remote).await.expect("the call is good");
    let kept = world.call(world.start(&local, 0, greedy(40)), &local).await.expect("the call is good");
    assert!(settles(|| world.metrics.tokens.get() > 4).await);
    world.cluster.shards[0].forget();
    assert_eq!(ended(lost).await.expect_err("its blocks are gone").code, Code::NotFound);
    let (answer, _) = finished(kept).await;
    assert_eq!(answer, world.reference(&local, &greedy(40)));
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_that_take_no_blocks_are_no_error_while_memory_lasts() {
    let world = World::new(2, Config::default());
    let prompt = tokens(19, 40);
    world.prefill(&prompt).await;
    for shard in &world.cluster.shards {
        shard.faults.failed_puts.store(2, Ordering::SeqCst);
        shard.faults.corrupt_puts.store(1, Ordering::SeqCst);
        shard.faults.refused_puts.store(1, Ordering::SeqCst);
    }
    let stream = world.call(world.start(&prompt, 0, greedy(120)), &prompt).await.expect("the call is good");
    assert_eq!(finished(stream).await.0, world.reference(&prompt, &greedy(120)));
    // The engine's thread may hear of the last ones after the end.
    assert!(settles(|| world.metrics.put_failures.get() > 0).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_that_nobody_takes_are_bounded() {
    let world = World::new(1, Config { local_blocks_max: 2, ..Config::default() });
    let prompt = tokens(20, 40);
    world.prefill(&prompt).await;
    world.cluster.shards[0].faults.refused_puts.store(1_000, Ordering::SeqCst);
    let error = world.failure(world.start(&prompt, 0, greedy(500)), &prompt).await;
    assert_eq!(error.code, Code::ResourceExhausted, "{error}");
    assert!(error.message.contains("no room"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_append_without_an_answer_makes_the_sequence_unavailable() {
    let world = World::new(1, Config::default());
    let prompt = tokens(21, 40);
    world.prefill(&prompt).await;
    world.cluster.shards[0].faults.failed_appends.store(1, Ordering::SeqCst);
    let error = world.failure(world.start(&prompt, 0, greedy(500)), &prompt).await;
    assert_eq!(error.code, Code::Unavailable, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_name_their_field() {
    let world = World::new(1, Config::default());
    let prompt = tokens(22, 10);
    let good = world.start(&prompt, 0, greedy(5));
    let sampling = |sampling| DecodeStart { sampling, ..good.clone() };
    let other = Identity { deployment: Deployment::from_bytes([9; 32]), ..good.identity };
    let old = Identity { shard_map_epoch: good.identity.shard_map_epoch + 1, ..good.identity };
    let table = [
        (DecodeStart { identity: other, ..good.clone() }, Code::FailedPrecondition, "identity.deployment"),
        (DecodeStart { identity: old, ..good.clone() }, Code::FailedPrecondition, "identity.shard_map_epoch"),
        (DecodeStart { prompt_tokens: 0, ..good.clone() }, Code::InvalidArgument, "start.prompt_tokens"),
        (DecodeStart { prompt_tokens: u64::MAX, ..good.clone() }, Code::OutOfRange, "start.prompt_tokens"),
        (DecodeStart { generated_tokens: 2_000, ..good.clone() }, Code::OutOfRange, "start.generated_tokens"),
        (
            DecodeStart { generated_tokens: u64::MAX, ..good.clone() },
            Code::OutOfRange,
            "start.generated_tokens",
        ),
        (DecodeStart { prompt_tokens: 11, ..good.clone() }, Code::InvalidArgument, "tokens"),
        (DecodeStart { prompt_tokens: 9, ..good.clone() }, Code::InvalidArgument, "tokens"),
        (
            sampling(Sampling { temperature: -1.0, seed: Some(1), ..greedy(5) }),
            Code::InvalidArgument,
            "start.sampling",
        ),
        (
            sampling(Sampling { temperature: f32::NAN, seed: Some(1), ..greedy(5) }),
            Code::InvalidArgument,
            "start.sampling",
        ),
        (sampling(Sampling::default()), Code::InvalidArgument, "start.sampling.seed"),
    ];
    for (start, code, field) in table {
        let error = world.failure(start, &prompt).await;
        assert_eq!((error.code, error.field.as_deref()), (code, Some(field)), "{error}");
    }
    let error = world.failure(good.clone(), &[97; 10]).await;
    assert_eq!(
        (error.code, error.field.as_deref()),
        (Code::InvalidArgument, Some("tokens.token_ids")),
        "{error}"
    );
    assert_eq!(world.generate(&prompt, 0, greedy(5)).await.0.len(), 5);
    assert!(settles(|| world.metrics.queue_depth.get() == 0).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_stops_ends_its_sequences_and_takes_no_more() {
    let world = World::new(1, Config { max_sequences: 1, ..Config::default() });
    world.cluster.model.layer_delay_ms.store(10, Ordering::SeqCst);
    let prompt = tokens(23, 10);
    let start = world.start(&prompt, 0, greedy(500));
    let streams = [world.call(start.clone(), &prompt).await, world.call(start.clone(), &prompt).await];
    assert!(settles(|| world.metrics.tokens.get() > 0).await);
    assert_eq!(world.tasks.drain(Duration::from_secs(60)).await, Vec::<String>::new());
    for stream in streams {
        let error = ended(stream.expect("the worker ran")).await.expect_err("it did not finish");
        assert_eq!(error.code, Code::Unavailable, "{error}");
    }
    let error = world.call(start, &prompt).await.err().expect("it is over");
    assert_eq!(error.code, Code::Unavailable, "{error}");
}
