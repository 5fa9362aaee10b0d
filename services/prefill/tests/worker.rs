//! What a prefill stores, and how it ends.

#[path = "support/world.rs"]
mod support;

use std::{sync::atomic::Ordering, time::Duration};

use futures::StreamExt;
use longshore_attention::{KvDtype, PrefillPolicy};
use longshore_blocks::Deployment;
use longshore_engine::testing::tokens;
use longshore_fabric::Code;
use longshore_prefill::{Config, PrefixPolicy};
use longshore_proto::types::{Identity, PrefillEvent, PrefillStart};

use support::{BLOCK, World, antidiagonal, balanced, block_bytes, settles};

fn chunks_of(chunk_tokens: u32) -> Config {
    Config { chunk_tokens, ..Config::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_tiles_are_stored_whatever_the_chunks_shards_and_memory() {
    let prompt = tokens(1, 11 * BLOCK + 1);
    let small = Config { local_kv_bytes: 8 * 3 * 4096, ..chunks_of(32) };
    for (shards, config) in [(1, chunks_of(512)), (3, chunks_of(16)), (3, chunks_of(50)), (2, small)] {
        for dtype in [KvDtype::F32, KvDtype::F16] {
            let world = World::with_dtype(shards, config.clone(), dtype);
            let events = world.prefill(&prompt, 0).await;
            assert!(
                world.cluster.bodies() == world.reference(&prompt, 11),
                "{shards} shards, {config:?}, {dtype:?}"
            );
            let Some(PrefillEvent::Finished { computed_blocks, stored_bytes }) = events.last() else {
                panic!("the last event is {:?}", events.last())
            };
            let block_bytes = 3 * world.cluster.engine.tile_shape().bytes() as u64;
            assert_eq!((*computed_blocks, *stored_bytes), (11, 11 * block_bytes));
            assert!(settles(|| world.cluster.open_views() == 0).await, "views are closed");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_larger_than_the_memory_attends_to_its_own_blocks_on_the_shards() {
    let prompt = tokens(2, 20 * BLOCK + 3);
    let world = World::new(3, Config { local_kv_bytes: 4 * 3 * 2048, ..chunks_of(16) });
    world.prefill(&prompt, 0).await;
    assert!(world.cluster.shards.iter().any(|shard| shard.attends() > 0), "queries were shipped");
    assert!(world.cluster.bodies() == world.reference(&prompt, 20));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cached_prefix_is_not_computed_again_and_changes_no_bit() {
    let prompt = tokens(3, 10 * BLOCK);
    for prefix in [PrefixPolicy::Auto, PrefixPolicy::Ship, PrefixPolicy::Fetch] {
        let world = World::new(3, Config { prefix, ..chunks_of(32) });
        world.prefill(&prompt[..5 * BLOCK + 1], 0).await;
        let computed = world.metrics.tokens.get();
        let events = world.prefill(&prompt, 5).await;
        // The last block is left to the decode worker.
        assert!(
            matches!(events.last(), Some(PrefillEvent::Finished { computed_blocks: 4, .. })),
            "{events:?}"
        );
        assert_eq!(world.metrics.tokens.get() - computed, 4 * BLOCK as u64);
        assert!(world.cluster.bodies() == world.reference(&prompt, 9), "{prefix:?}");
        let attends: u64 = world.cluster.shards.iter().map(|shard| shard.attends()).sum();
        let shipped = match prefix {
            PrefixPolicy::Auto => continue,
            PrefixPolicy::Ship => true,
            PrefixPolicy::Fetch => false,
        };
        assert_eq!(attends > 0, shipped, "{prefix:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_is_shipped_to_or_fetched_for_a_policy_that_selects() {
    let prompt = tokens(16, 10 * BLOCK);
    // Blocks of a policy that reads all keys are fetched whatever the settings say.
    for (policy, needs_keys) in [(balanced(), false), (antidiagonal(), true)] {
        for prefix in [PrefixPolicy::Auto, PrefixPolicy::Ship, PrefixPolicy::Fetch] {
            // Room for its 9 blocks and not one more.
            let world = World::new(3, Config { prefix, local_kv_bytes: 9 * block_bytes(), ..chunks_of(32) });
            let start = |tokens: usize, cached: usize| PrefillStart {
                prefill_policy: policy.fingerprint(),
                ..world.balanced(tokens, cached)
            };
            world.events(start(5 * BLOCK + 1, 0), &prompt[..5 * BLOCK + 1]).await;
            let events = world.events(start(prompt.len(), 5), &prompt).await;
            assert!(
                matches!(events.last(), Some(PrefillEvent::Finished { computed_blocks: 4, .. })),
                "{events:?}"
            );
            let attends = world.cluster.shards.iter().map(|shard| shard.attends()).sum::<u64>();
            let shipped = match prefix {
                PrefixPolicy::Auto => attends > 0,
                PrefixPolicy::Ship => !needs_keys,
                PrefixPolicy::Fetch => false,
            };
            assert_eq!(attends > 0, shipped && !needs_keys, "{prefix:?}, {policy}");
            let metrics = &world.metrics;
            let moved = [&metrics.visited_blocks, &metrics.shipped_bytes, &metrics.summary_bytes];
            assert!(moved.iter().all(|moved| (moved.get() > 0) == (attends > 0)), "{prefix:?}, {policy}");
            // Short prompts are exact whatever the policy.
            assert!(world.cluster.bodies() == world.reference(&prompt, 9), "{prefix:?}, {policy}");
        }
    }
}

/// Less room than the prompt takes, and the same blocks.
#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_reads_summaries_leaves_its_oldest_blocks_to_the_shards() {
    let prompt = tokens(19, 30 * BLOCK + 1);
    let sparse =
        "blocks:scorer=row-normalised,selector=top-k,k=2,sink=0,local=0,dense_layers=0,min_positions=0";
    let prefill_policy = PrefillPolicy::parse(sparse, None).expect("the text is a policy").fingerprint();
    let mut bodies = Vec::new();
    for (blocks, cached) in [(64, 0), (10, 0), (10, 8)] {
        let world = World::new(2, Config { local_kv_bytes: blocks * block_bytes(), ..chunks_of(64) });
        let dense_from = prompt.len() as u64 / 32 * 32;
        let start = |tokens: usize, cached_blocks: u64| PrefillStart {
            prefill_policy: prefill_policy.clone(),
            dense_from: dense_from.min(tokens as u64 / 32 * 32),
            cached_blocks,
            ..world.start(tokens, 0)
        };
        if cached > 0 {
            let tokens = cached as usize * BLOCK + 1;
            world.events(start(tokens, 0), &prompt[..tokens]).await;
        }
        world.events(start(prompt.len(), cached), &prompt).await;
        let attends = world.cluster.shards.iter().map(|shard| shard.attends()).sum::<u64>();
        assert_eq!(attends > 0, blocks == 10);
        bodies.push(world.cluster.bodies());
    }
    assert!(bodies.iter().all(|other| *other == bodies[0]), "a worker's memory changed a block");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_a_policy_has_no_room_for_is_refused_before_anything_is_computed() {
    let prompt = tokens(17, 20 * BLOCK + 3);
    let world = World::new(2, Config { local_kv_bytes: 19 * block_bytes(), ..chunks_of(16) });
    let prefill_policy = antidiagonal().fingerprint();
    let of = |start: PrefillStart| PrefillStart { prefill_policy: prefill_policy.clone(), ..start };
    let stored = of(world.balanced(prompt.len(), 3));
    let error = world.failure(stored.clone(), &prompt).await;
    assert_eq!((error.code, error.field.as_deref()), (Code::OutOfRange, Some("start.prompt_tokens")));
    assert!(
        error.message.contains("`prefill.local_kv_bytes`") && error.message.contains("`exact`"),
        "{error}"
    );
    assert_eq!(world.cluster.model.layers_computed.load(Ordering::SeqCst), 0);
    assert_eq!(world.metrics.requests.get(), 0);
    // One block less fits, and so does what is in the store already; `exact` and policies that read summaries leave their oldest
    // blocks to the shards.
    world.events(of(world.balanced(20 * BLOCK, 0)), &prompt[..20 * BLOCK]).await;
    world.prefill(&prompt, 0).await;
    world.events(world.balanced(prompt.len(), 0), &prompt).await;
    let events = world.events(PrefillStart { cached_blocks: 20, ..stored }, &prompt).await;
    assert_eq!(events, [PrefillEvent::Finished { computed_blocks: 0, stored_bytes: 0 }]);
    // Summaries must fit too.
    let tiny = World::new(2, Config { local_kv_bytes: 7_000, ..chunks_of(16) });
    let error = tiny.failure(tiny.balanced(prompt.len(), 0), &prompt).await;
    assert_eq!((error.code, error.field.as_deref()), (Code::OutOfRange, Some("start.prompt_tokens")));
    assert!(error.message.contains("summaries"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_of_a_policy_end_on_its_grid_whatever_is_cached() {
    let prompt = tokens(18, 62 * BLOCK + 1);
    let multiple = balanced().chunk_multiple();
    let world = World::new(2, Config { progress_layers: 3, ..chunks_of(50) });
    let chunk = 50usize.next_multiple_of(multiple).next_multiple_of(BLOCK);
    for cached in [0, 5, 6, 13] {
        if cached > 0 {
            world.prefill(&prompt[..cached * BLOCK + 1], 0).await;
        }
        let events = world.events(world.balanced(prompt.len(), cached), &prompt).await;
        let ends: Vec<usize> = events
            .iter()
            .filter_map(|event| match event {
                PrefillEvent::Progress { done_tokens } => Some(*done_tokens as usize),
                PrefillEvent::Finished { .. } => None,
            })
            .collect();
        let (last, whole) = ends.split_last().expect("there is progress");
        assert_eq!(*last, 62 * BLOCK, "{ends:?}");
        assert!(whole.iter().all(|end| end.is_multiple_of(multiple)), "{cached} cached: {ends:?}");
        let starts = std::iter::once(cached * BLOCK).chain(whole.iter().copied());
        for (start, end) in starts.zip(&ends) {
            assert!(start < *end && end - start <= chunk, "{cached} cached: {ends:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_computed_when_everything_is_cached_or_short() {
    let world = World::new(1, Config::default());
    let prompt = tokens(4, 3 * BLOCK);
    world.prefill(&prompt, 0).await;
    let computed = world.metrics.tokens.get();
    for (length, cached) in [(3 * BLOCK, 2), (3 * BLOCK, 99), (BLOCK, 0), (1, 0)] {
        let events = world.prefill(&prompt[..length], cached).await;
        assert_eq!(events, [PrefillEvent::Finished { computed_blocks: 0, stored_bytes: 0 }]);
    }
    assert_eq!(world.metrics.tokens.get(), computed);
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_rises_to_the_end() {
    let world = World::new(2, Config { progress_layers: 1, ..chunks_of(32) });
    let events = world.prefill(&tokens(5, 6 * BLOCK + 1), 0).await;
    let done: Vec<u64> = events
        .iter()
        .filter_map(|event| match event {
            PrefillEvent::Progress { done_tokens } => Some(*done_tokens),
            PrefillEvent::Finished { .. } => None,
        })
        .collect();
    assert_eq!(done, [10, 21, 32, 42, 53, 64, 74, 85, 96]);
}

#[tokio::test(flavor = "multi_thread")]
async fn tiles_leave_while_later_layers_compute() {
    let world = World::new(1, Config::default());
    // The last layer waits for the tiles of the first one.
    let allowed = &world.cluster.model.layers_allowed;
    allowed.store(2, Ordering::SeqCst);
    let prompt = tokens(6, 4 * BLOCK + 1);
    let stream = world.call(world.start(prompt.len(), 0), &prompt).await.expect("the call is good");
    let shard = &world.cluster.shards[0];
    let left = settles(|| shard.tiles_received() >= 4).await;
    // Before anything fails: the runtime does not end while a thread waits.
    allowed.store(u64::MAX, Ordering::SeqCst);
    assert!(left, "the first layer leaves before the last begins");
    assert!(stream.collect::<Vec<_>>().await.iter().all(Result::is_ok));
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_the_answer_stops_the_computation_and_releases_everything() {
    let world = World::new(2, chunks_of(16));
    let prompt = tokens(7, 40 * BLOCK);
    world.prefill(&prompt[..3 * BLOCK + 1], 0).await;
    // Far from its end when the answer is dropped, however late that is.
    world.cluster.model.layer_delay_ms.store(100, Ordering::SeqCst);
    let before = world.cluster.model.layers_computed.load(Ordering::SeqCst);
    let mut stream = world.call(world.start(prompt.len(), 3), &prompt).await.expect("the call is good");
    stream.next().await.expect("there is progress").expect("nothing fails");
    drop(stream);
    let layers = || world.cluster.model.layers_computed.load(Ordering::SeqCst) - before;
    let at_drop = layers();
    assert!(settles(|| world.cluster.open_views() == 0 && world.metrics.queue_depth.get() == 0).await);
    assert!(layers() <= at_drop + 2, "{} layers after {at_drop}", layers());
    assert_eq!(world.metrics.cancelled.get(), 1);
    world.cluster.model.layer_delay_ms.store(0, Ordering::SeqCst);
    world.prefill(&tokens(8, 2 * BLOCK), 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_with_a_hint_when_to_retry() {
    let world = World::new(1, Config { queue_max: 1, ..Config::default() });
    // Neither of the first two ends before the third comes.
    let allowed = &world.cluster.model.layers_allowed;
    allowed.store(0, Ordering::SeqCst);
    let prompt = tokens(9, 2 * BLOCK);
    let start = world.start(prompt.len(), 0);
    let under_way = [world.call(start.clone(), &prompt).await, world.call(start.clone(), &prompt).await];
    let third = world.call(start, &prompt).await;
    // Before anything fails: the runtime does not end while a thread waits.
    allowed.store(u64::MAX, Ordering::SeqCst);
    let error = third.err().expect("two prompts fill the worker");
    assert_eq!(error.code, Code::ResourceExhausted);
    assert!(error.retry_after.is_some());
    assert_eq!(world.metrics.rejected.get(), 1);
    for stream in under_way {
        let events: Vec<_> = stream.expect("there was room").collect().await;
        assert!(events.iter().all(Result::is_ok), "{events:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_cached_blocks_are_not_found() {
    for prefix in [PrefixPolicy::Ship, PrefixPolicy::Fetch] {
        let world = World::new(2, Config { prefix, ..Config::default() });
        let prompt = tokens(10, 5 * BLOCK);
        let error = world.failure(world.start(prompt.len(), 2), &prompt).await;
        assert_eq!(error.code, Code::NotFound, "{error}");
        assert!(settles(|| world.cluster.open_views() == 0).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_blocks_are_sent_again_once() {
    let world = World::new(1, Config::default());
    let prompt = tokens(11, 5 * BLOCK + 1);
    world.cluster.shards[0].faults.corrupt_puts.store(3, Ordering::SeqCst);
    world.prefill(&prompt, 0).await;
    assert_eq!(world.metrics.resent_blocks.get(), 3);
    assert!(world.cluster.bodies() == world.reference(&prompt, 5));

    let prompt = tokens(12, 2 * BLOCK + 1);
    world.cluster.shards[0].faults.corrupt_all_puts.store(true, Ordering::SeqCst);
    let error = world.failure(world.start(prompt.len(), 0), &prompt).await;
    assert_eq!(error.code, Code::DataLoss, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn full_and_ill_shards_have_their_own_codes() {
    let world = World::new(1, chunks_of(16));
    let prompt = tokens(13, 5 * BLOCK + 1);
    world.cluster.shards[0].faults.refused_puts.store(1, Ordering::SeqCst);
    let error = world.failure(world.start(prompt.len(), 0), &prompt).await;
    assert_eq!(error.code, Code::ResourceExhausted, "{error}");
    assert!(error.retry_after.is_some());

    world.cluster.shards[0].faults.failed_puts.store(1, Ordering::SeqCst);
    let error = world.failure(world.start(prompt.len(), 0), &prompt).await;
    assert_eq!(error.code, Code::Unavailable, "{error}");

    let nowhere = World::new(0, Config::default());
    let error = nowhere.failure(nowhere.start(prompt.len(), 0), &prompt).await;
    assert_eq!(error.code, Code::Unavailable, "{error}");
    world.prefill(&prompt, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_name_their_field() {
    let world = World::new(1, Config::default());
    let good = world.start(20, 0);
    let prompt = tokens(14, 20);
    let other = Identity { deployment: Deployment::from_bytes([9; 32]), ..good.identity };
    let old = Identity { shard_map_epoch: good.identity.shard_map_epoch + 1, ..good.identity };
    let policy = |text: &str| PrefillStart { prefill_policy: text.to_owned(), ..good.clone() };
    let dense_from = |position| PrefillStart { dense_from: position, ..world.balanced(20, 0) };
    let table = [
        (
            PrefillStart { identity: other, ..good.clone() },
            prompt.clone(),
            Code::FailedPrecondition,
            "identity.deployment",
        ),
        (
            PrefillStart { identity: old, ..good.clone() },
            prompt.clone(),
            Code::FailedPrecondition,
            "identity.shard_map_epoch",
        ),
        (world.start(0, 0), Vec::new(), Code::InvalidArgument, "start.prompt_tokens"),
        (world.start(1_025, 0), prompt.clone(), Code::OutOfRange, "start.prompt_tokens"),
        (policy("sparsest"), prompt.clone(), Code::InvalidArgument, "start.prefill_policy"),
        (policy(""), prompt.clone(), Code::InvalidArgument, "start.prefill_policy"),
        (policy("balanced balanced"), prompt.clone(), Code::InvalidArgument, "start.prefill_policy"),
        (dense_from(31), prompt.clone(), Code::InvalidArgument, "start.dense_from"),
        (dense_from(32), prompt.clone(), Code::InvalidArgument, "start.dense_from"),
        (dense_from(u64::MAX), prompt.clone(), Code::InvalidArgument, "start.dense_from"),
        (world.start(21, 0), prompt.clone(), Code::InvalidArgument, "tokens"),
        (world.start(19, 0), prompt.clone(), Code::InvalidArgument, "tokens"),
        (good.clone(), [&prompt[..19], &[97]].concat(), Code::InvalidArgument, "tokens.token_ids"),
    ];
    for (start, prompt, code, field) in table {
        let error = world.failure(start, &prompt).await;
        assert_eq!((error.code, error.field.as_deref()), (code, Some(field)), "{error}");
        assert!(error.message.contains('`'), "{error}");
    }
    world.prefill(&prompt, 0).await;
    assert!(settles(|| world.metrics.queue_depth.get() == 0).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_stops_ends_its_prompts_and_takes_no_more() {
    let world = World::new(1, chunks_of(16));
    // Far from their ends when the worker stops, however late that is.
    world.cluster.model.layer_delay_ms.store(100, Ordering::SeqCst);
    let prompt = tokens(15, 30 * BLOCK);
    let start = world.start(prompt.len(), 0);
    let streams = [world.call(start.clone(), &prompt).await, world.call(start.clone(), &prompt).await];
    assert!(settles(|| world.cluster.model.layers_computed.load(Ordering::SeqCst) > 0).await);
    assert_eq!(world.tasks.drain(Duration::from_secs(60)).await, Vec::<String>::new());
    for stream in streams {
        let events: Vec<_> = stream.expect("the worker ran").collect().await;
        let error = events.last().expect("there is an end").as_ref().expect_err("it did not finish");
        assert_eq!(error.code, Code::Unavailable, "{error}");
    }
    let error = world.call(start, &prompt).await.err().expect("it is over");
    assert_eq!(error.code, Code::Unavailable, "{error}");
}

/// A decode worker died with a part of the answer: whoever computes its rows again does as it did.
#[tokio::test(flavor = "multi_thread")]
async fn rows_of_an_answer_are_computed_as_a_decode_worker_computes_them() {
    let all = tokens(20, 14 * BLOCK + 5);
    let prompt_tokens = 100;
    let text = "streaming:sink=16,recent=20,min_positions=0";
    let policy = std::sync::Arc::new(PrefillPolicy::parse(text, None).expect("the text is a policy"));
    for prefix in [PrefixPolicy::Ship, PrefixPolicy::Fetch] {
        let world = World::new(2, Config { prefix, ..chunks_of(64) });
        let start = |tokens: usize, cached: usize| PrefillStart {
            prefill_policy: policy.fingerprint(),
            dense_from: 64,
            generated_tokens: (tokens - tokens.min(prompt_tokens)) as u64,
            ..world.start(tokens, cached)
        };
        world.events(start(prompt_tokens, 0), &all[..prompt_tokens]).await;
        world.events(start(all.len(), 6), &all).await;
        let expected = world.reference_answer(&policy, 64, prompt_tokens, &all[..14 * BLOCK]);
        assert!(world.cluster.bodies() == expected, "{prefix:?}");
    }
    let world = World::new(1, Config::default());
    let start = PrefillStart { generated_tokens: 21, ..world.start(20, 0) };
    let error = world.failure(start, &all[..20]).await;
    assert_eq!(error.field.as_deref(), Some("start.generated_tokens"), "{error}");
}
