//! What a client sees when workers and shards fail: as little as possible.

use std::{sync::atomic::Ordering, time::Duration};

use futures::StreamExt as _;
use longshore_fabric::{CallContext, Code, Describer as _, Inference as _};
use longshore_proto::types::{FinishReason, GenerateStart, PromptChunk, Sampling};
use proptest::prelude::*;
use tokio::sync::mpsc;

use crate::{
    Config,
    fixture::{Collected, Fixture, Options, Script, encode, generated, prompt_ids},
};

fn max_tokens(count: u32) -> GenerateStart {
    let sampling = Sampling { max_tokens: Some(count), seed: Some(3), ..Sampling::default() };
    GenerateStart { sampling, ..GenerateStart::default() }
}

fn two_decoders() -> Fixture {
    Fixture::new(Options { decoders: 2, ..Options::default() })
}

fn undisturbed(answer: &Collected, prompt: u32, count: usize) {
    let expected = generated(&prompt_ids(prompt), count);
    assert_eq!(answer.ids, expected);
    assert_eq!(answer.text, crate::fixture::model().tokenizer.decode(&expected));
    assert_eq!(answer.finished().completion_tokens, count as u64);
}

#[tokio::test]
async fn another_decode_worker_goes_on_where_one_fell() {
    let fixture = two_decoders();
    fixture.decoders[0].script(Script::FailAfter(70, Code::Unavailable));
    let answer = fixture.generate_ids(max_tokens(100), 200).await.unwrap();
    undisturbed(&answer, 200, 100);
    assert_eq!(answer.finished().resumed, 1);
    let second = fixture.decoders[1].calls();
    assert_eq!(
        second.iter().map(|call| (call.prompt_tokens, call.generated_tokens)).collect::<Vec<_>>(),
        [(200, 70)]
    );
    assert_eq!(fixture.decoders[0].calls()[0].sampling, second[0].sampling);
    // 270 tokens need 4 blocks; the first 3 came from the first prefill.
    let prefills = fixture.prefillers[0].calls.lock().unwrap().clone();
    assert_eq!(
        prefills.iter().map(|call| (call.prompt_tokens, call.cached_blocks)).collect::<Vec<_>>(),
        [(200, 0), (270, 3)]
    );
}

#[tokio::test]
async fn a_takeover_keeps_where_rows_are_exact() {
    let fixture = two_decoders();
    fixture.decoders[0].script(Script::FailAfter(70, Code::Unavailable));
    let start = GenerateStart { prefill_policy: "balanced".to_owned(), ..max_tokens(100) };
    let answer = fixture.generate_ids(start, 1_500).await.unwrap();
    undisturbed(&answer, 1_500, 100);
    assert_eq!(answer.finished().resumed, 1);
    let prefills = fixture.prefillers[0].calls.lock().unwrap().clone();
    let lengths: Vec<_> = prefills.iter().map(|call| call.prompt_tokens).collect();
    assert_eq!(lengths, [1_500, 1_570]);
    assert_eq!(prefills.iter().map(|call| call.generated_tokens).collect::<Vec<_>>(), [0, 70]);
    let finished = answer.finished();
    assert_eq!((finished.visited_blocks, finished.causal_blocks), (3, 40), "what the last worker says");
    // As many tokens more would move it by two tiles.
    assert_eq!(prefills[0].dense_from, prefills[1].dense_from);
    assert!((1..1_500).contains(&prefills[0].dense_from), "{prefills:?}");
    assert_eq!(prefills[0].prefill_policy, prefills[1].prefill_policy);
    assert_eq!(prefills[0].identity.namespace, prefills[1].identity.namespace);
}

#[tokio::test]
async fn stop_strings_are_found_across_a_takeover() {
    let fixture = two_decoders();
    let ids = encode("one two END three");
    fixture.decoders.iter().for_each(|decoder| decoder.say(ids.clone()));
    let cut = encode("one two E").len();
    fixture.decoders[0].script(Script::FailAfter(cut, Code::Unavailable));
    let start = GenerateStart { stop: vec!["END".to_owned()], ..max_tokens(100) };
    let answer = fixture.generate_ids(start, 10).await.unwrap();
    assert_eq!((answer.text.as_str(), answer.finished().reason), ("one two ", FinishReason::Stop));
}

#[tokio::test]
async fn missing_blocks_are_computed_again_on_the_same_worker() {
    let fixture = Fixture::new(Options::default());
    fixture.generate_ids(max_tokens(5), 300).await.unwrap();
    fixture.decoders[0].script(Script::Refuse(Code::NotFound));
    fixture.store.clear();
    let answer = fixture.generate_ids(max_tokens(5), 300).await.unwrap();
    undisturbed(&answer, 300, 5);
    assert_eq!(answer.finished().resumed, 0);
}

#[tokio::test]
async fn a_prefix_that_is_evicted_before_the_prefill_is_looked_up_again() {
    let fixture = Fixture::new(Options::default());
    fixture.prefillers[0].script(Script::Refuse(Code::NotFound));
    let answer = fixture.generate_ids(max_tokens(5), 300).await.unwrap();
    undisturbed(&answer, 300, 5);
    assert_eq!(fixture.prefillers[0].calls(), 2);
}

#[tokio::test]
async fn a_single_decode_worker_that_is_back_is_used_again() {
    let fixture = Fixture::new(Options::default());
    fixture.decoders[0].script(Script::FailAfter(3, Code::Unavailable));
    let answer = fixture.generate_ids(max_tokens(9), 100).await.unwrap();
    undisturbed(&answer, 100, 9);
    assert_eq!(fixture.describers.iter().map(|(_, d)| d.calls.load(Ordering::SeqCst)).sum::<usize>(), 3);
}

#[tokio::test]
async fn gives_up_after_a_bounded_number_of_attempts() {
    let fixture = two_decoders();
    for decoder in &fixture.decoders {
        (0..9).for_each(|_| decoder.script(Script::FailAfter(1, Code::Unavailable)));
    }
    let error = fixture.generate_ids(max_tokens(100), 100).await.unwrap_err();
    assert_eq!(error.code, Code::Unavailable);
    assert!(error.message.contains("gave up after 4 attempts") && error.message.contains("hint:"), "{error}");
    assert!(error.retry_after.is_some());
    let calls: usize = fixture.decoders.iter().map(|decoder| decoder.calls().len()).sum();
    assert_eq!(calls, 4);
}

#[tokio::test]
async fn a_block_of_progress_restarts_the_count() {
    let fixture = two_decoders();
    for decoder in &fixture.decoders {
        (0..4).for_each(|_| decoder.script(Script::FailAfter(64, Code::Unavailable)));
    }
    let answer = fixture.generate_ids(max_tokens(600), 100).await.unwrap();
    undisturbed(&answer, 100, 600);
    assert_eq!(answer.finished().resumed, 8);
}

#[tokio::test]
async fn a_failure_after_the_last_token_costs_nothing() {
    let fixture = two_decoders();
    fixture.decoders[0].script(Script::EndAfter(10));
    let answer = fixture.generate_ids(max_tokens(10), 100).await.unwrap();
    undisturbed(&answer, 100, 10);
    assert!(fixture.decoders[1].calls().is_empty());
}

#[tokio::test]
async fn faults_that_no_other_worker_mends_reach_the_client() {
    let fixture = two_decoders();
    fixture.decoders[0].script(Script::FailAfter(2, Code::Internal));
    let error = fixture.generate_ids(max_tokens(10), 100).await.unwrap_err();
    assert_eq!(error.code, Code::Internal);
    assert!(error.message.contains("decode-0"), "{error}");
    assert!(fixture.decoders[1].calls().is_empty());
}

#[tokio::test]
async fn another_prefill_worker_takes_over() {
    let fixture = Fixture::new(Options { prefillers: 2, ..Options::default() });
    fixture.prefillers[0].script(Script::FailAfter(1, Code::Unavailable));
    let answer = fixture.generate_ids(max_tokens(5), 300).await.unwrap();
    undisturbed(&answer, 300, 5);
    assert_eq!(fixture.prefillers[1].calls(), 1);
}

#[tokio::test]
async fn without_a_prefill_worker_the_client_is_told_and_may_come_again() {
    let fixture = Fixture::new(Options::default());
    fixture.prefillers[0].script(Script::EndAfter(2));
    let error = fixture.generate_ids(max_tokens(5), 300).await.unwrap_err();
    assert_eq!(error.code, Code::Unavailable);
    assert!(error.message.contains("prefill") && error.message.contains("hint:"), "{error}");
    undisturbed(&fixture.generate_ids(max_tokens(5), 300).await.unwrap(), 300, 5);
}

#[tokio::test]
async fn no_workers_and_no_shards_are_unavailable() {
    for (what, options) in [
        ("decode", Options { decoders: 0, ..Options::default() }),
        ("prefill", Options { prefillers: 0, ..Options::default() }),
        ("kvstore", Options { shards: 0, ..Options::default() }),
    ] {
        let fixture = Fixture::new(options);
        let error = fixture.generate_ids(max_tokens(5), 300).await.unwrap_err();
        assert_eq!(error.code, Code::Unavailable, "{what}");
        assert!(error.message.contains(what), "{error}");
    }
}

#[tokio::test]
async fn busy_workers_exhaust_the_resource() {
    let fixture = Fixture::new(Options::default());
    fixture.prefillers[0].script(Script::Refuse(Code::ResourceExhausted));
    let error = fixture.generate_ids(max_tokens(5), 300).await.unwrap_err();
    assert_eq!(error.code, Code::ResourceExhausted);
    assert!(error.retry_after.is_some());
    (0..4).for_each(|_| fixture.decoders[0].script(Script::Refuse(Code::ResourceExhausted)));
    assert_eq!(fixture.generate_ids(max_tokens(5), 300).await.unwrap_err().code, Code::ResourceExhausted);
}

#[tokio::test]
async fn workers_of_another_deployment_are_refused() {
    let fixture = two_decoders();
    let describer = |id: &str| &fixture.describers.iter().find(|(known, _)| known == id).unwrap().1;
    describer("decode-0").other_deployment.store(true, Ordering::SeqCst);
    for _ in 0..3 {
        fixture.generate_ids(max_tokens(5), 100).await.unwrap();
    }
    assert!(fixture.decoders[0].calls().is_empty());
    assert_eq!(describer("decode-0").calls.load(Ordering::SeqCst), 1, "the result is kept");
    assert_eq!(fixture.metrics.mismatches.get(), 1);
    describer("prefill-0").other_deployment.store(true, Ordering::SeqCst);
    fixture.generate_ids(max_tokens(5), 300).await.expect("prefill-0 was checked before");
    let mut members = fixture.members();
    members.iter_mut().for_each(|member| member.incarnation += 1);
    fixture.set_members(members);
    let error = fixture.generate_ids(max_tokens(5), 500).await.unwrap_err();
    assert_eq!(error.code, Code::FailedPrecondition);
    assert!(error.message.contains("`prefill-0`") && error.message.contains("hint:"), "{error}");
}

#[tokio::test]
async fn a_worker_that_does_not_answer_its_handshake_is_passed_over() {
    let fixture = two_decoders();
    fixture.connector.remove("decode-0");
    undisturbed(&fixture.generate_ids(max_tokens(5), 100).await.unwrap(), 100, 5);
    fixture.connector.remove("decode-1");
    let error = fixture.generate_ids(max_tokens(5), 100).await.unwrap_err();
    assert_eq!(error.code, Code::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn shards_that_fail_or_are_slow_count_as_a_miss() {
    let config = Config { lookup_timeout_ms: 20, ..Config::default() };
    let fixture = Fixture::new(Options { config, shards: 1, ..Options::default() });
    fixture.generate_ids(max_tokens(5), 300).await.unwrap();
    fixture.shards[0].broken.store(true, Ordering::SeqCst);
    assert_eq!(fixture.generate_ids(max_tokens(5), 300).await.unwrap().cached_tokens, 0);
    fixture.shards[0].broken.store(false, Ordering::SeqCst);
    fixture.shards[0].silent.store(true, Ordering::SeqCst);
    assert_eq!(fixture.generate_ids(max_tokens(5), 300).await.unwrap().cached_tokens, 0);
    assert_eq!(fixture.metrics.lookup_failures.get(), 2);
    assert_eq!(fixture.store.blocks(), 4);
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_the_workers() {
    let fixture = Fixture::new(Options::default());
    fixture.prefillers[0].script(Script::HangAfter(1));
    let start = GenerateStart { progress: true, ..max_tokens(5) };
    let mut events = fixture.start(start, vec![PromptChunk::Tokens(prompt_ids(300))]).await.unwrap();
    for _ in 0..2 {
        futures::StreamExt::next(&mut events).await.unwrap().unwrap();
    }
    drop(events);
    Fixture::eventually("the end of the prefill", || {
        fixture.prefillers[0].dropped.load(Ordering::SeqCst) == 1
    })
    .await;
    fixture.decoders[0].script(Script::HangAfter(2));
    let mut events = fixture.start(max_tokens(5), vec![PromptChunk::Tokens(prompt_ids(30))]).await.unwrap();
    for _ in 0..3 {
        futures::StreamExt::next(&mut events).await.unwrap().unwrap();
    }
    drop(events);
    Fixture::eventually("the end of the decode", || fixture.decoders[0].dropped.load(Ordering::SeqCst) == 1)
        .await;
    Fixture::eventually("room for others", || fixture.metrics.in_flight.get() == 0).await;
}

/// Starts a request for 300 tokens under `ctx`, waits until `begun`, cancels, and gives the error.
async fn cancelled_when(fixture: &Fixture, ctx: CallContext, begun: impl Fn() -> bool) -> Code {
    let (sender, receiver) = mpsc::channel(1);
    sender.try_send(PromptChunk::Tokens(prompt_ids(300))).unwrap();
    drop(sender);
    let mut events = fixture.router.generate(&ctx, max_tokens(5), receiver).await.unwrap();
    Fixture::eventually("the call", begun).await;
    if ctx.deadline.is_none() {
        ctx.cancel.cancel();
    }
    loop {
        if let Err(error) = events.next().await.expect("the stream ends with an error") {
            return error.code;
        }
    }
}

async fn all_healthy(fixture: &Fixture) -> bool {
    let description = fixture.router.describe(&CallContext::new("test")).await.unwrap();
    description.members.iter().all(|member| member.healthy)
}

#[tokio::test]
async fn clients_that_leave_do_not_make_workers_fail() {
    let fixture = Fixture::new(Options { prefillers: 2, ..Options::default() });
    fixture.prefillers[0].script(Script::HangAfter(1));
    let begun = || fixture.prefillers[0].calls() == 1;
    assert_eq!(cancelled_when(&fixture, CallContext::new("test"), begun).await, Code::Cancelled);
    assert!(all_healthy(&fixture).await);
    assert_eq!(fixture.prefillers[1].calls(), 0);

    fixture.decoders[0].script(Script::HangAfter(1));
    let begun = || fixture.decoders[0].calls().len() == 1;
    assert_eq!(cancelled_when(&fixture, CallContext::new("test"), begun).await, Code::Cancelled);
    assert!(all_healthy(&fixture).await);
}

#[tokio::test(start_paused = true)]
async fn handshakes_cut_short_by_the_client_do_not_make_workers_fail() {
    for timeout in [None, Some(Duration::from_millis(100))] {
        let fixture = Fixture::new(Options { prefillers: 2, ..Options::default() });
        // The time of one case is not that of the other.
        let ctx = CallContext::new("test");
        let (ctx, expected) = match timeout {
            Some(timeout) => (ctx.with_timeout(timeout), Code::DeadlineExceeded),
            None => (ctx, Code::Cancelled),
        };
        let calls = |id: &str| &fixture.describers.iter().find(|(known, _)| known == id).unwrap().1;
        for id in ["prefill-0", "prefill-1"] {
            calls(id).silent.store(true, Ordering::SeqCst);
        }
        let asked = || {
            let count = |id| calls(id).calls.load(Ordering::SeqCst);
            count("prefill-0") + count("prefill-1")
        };
        assert_eq!(cancelled_when(&fixture, ctx, || asked() == 1).await, expected);
        assert!(all_healthy(&fixture).await);
        assert_eq!(asked(), 1);
    }
}

#[tokio::test]
async fn an_answer_under_way_waits_for_room() {
    let config = Config { retry_backoff_ms: 1, retry_after_ms: 30, ..Config::default() };
    let fixture = Fixture::new(Options { config, decoders: 2, ..Options::default() });
    fixture.decoders[0].script(Script::FailAfter(70, Code::Unavailable));
    // The takeover needs a prefill that finds nobody, and then a decode worker that has no room.
    fixture.prefillers[0].script(Script::Delay(Duration::ZERO));
    fixture.prefillers[0].script(Script::Refuse(Code::ResourceExhausted));
    fixture.decoders[1].script(Script::Refuse(Code::ResourceExhausted));
    let began = std::time::Instant::now();
    let answer = fixture.generate_ids(max_tokens(100), 200).await.unwrap();
    undisturbed(&answer, 200, 100);
    assert!(began.elapsed() >= Duration::from_millis(30), "the wait that the workers ask for is kept");
    assert_eq!(answer.finished().resumed, 1);
    assert_eq!(fixture.metrics.resumes.get(), 1);
}

#[tokio::test]
async fn a_cluster_that_stays_full_ends_an_answer_under_way() {
    let config = Config { retry_backoff_ms: 1, retry_after_ms: 1, ..Config::default() };
    let fixture = Fixture::new(Options { config, ..Options::default() });
    fixture.decoders[0].script(Script::FailAfter(1, Code::ResourceExhausted));
    (0..9).for_each(|_| fixture.decoders[0].script(Script::Refuse(Code::ResourceExhausted)));
    let error = fixture.generate_ids(max_tokens(100), 100).await.unwrap_err();
    assert_eq!(error.code, Code::ResourceExhausted);
    assert!(error.message.contains("every decode worker is at its limit, the last said: "), "{error}");
    assert_eq!(fixture.decoders[0].calls().len(), 4);
    assert_eq!(fixture.metrics.resumes.get(), 0);
}

/// Time passes only while everybody waits, so that the answer is done before the shutdown's time is over.
#[tokio::test(start_paused = true)]
async fn a_shutdown_lets_answers_finish_and_then_ends_them() {
    let config = Config { drain_ms: 200, ..Config::default() };
    let fixture = Fixture::new(Options { config, decoders: 2, ..Options::default() });
    fixture.decoders[0].script(Script::Delay(Duration::from_millis(50)));
    fixture.decoders[1].script(Script::HangAfter(1));
    let ids = || vec![PromptChunk::Tokens(prompt_ids(10))];
    let finishing = fixture.start(max_tokens(5), ids()).await.unwrap();
    Fixture::eventually("the first decode", || fixture.decoders[0].calls().len() == 1).await;
    let hanging = fixture.start(max_tokens(5), ids()).await.unwrap();
    Fixture::eventually("the second decode", || fixture.decoders[1].calls().len() == 1).await;
    fixture.tasks.cancel();
    assert_eq!(fixture.generate_ids(max_tokens(5), 10).await.unwrap_err().code, Code::Unavailable);
    undisturbed(&crate::fixture::collect(finishing).await.unwrap(), 10, 5);
    let error = crate::fixture::collect(hanging).await.unwrap_err();
    assert_eq!(error.code, Code::Unavailable);
    assert!(error.message.contains("shutting down"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Whatever fails and whenever: the answer is the one of an undisturbed run.
    #[test]
    fn failures_never_change_the_answer(
        prompt in 1u32..300,
        count in 1usize..150,
        failures in prop::collection::vec((0usize..160, 0usize..5, any::<bool>()), 0..4),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let fixture = two_decoders();
            for (at, kind, first) in &failures {
                let script = match kind {
                    0 => Script::FailAfter(*at, Code::Unavailable),
                    1 => Script::FailAfter(*at, Code::DataLoss),
                    2 => Script::FailAfter(*at, Code::FailedPrecondition),
                    3 => Script::EndAfter(*at),
                    _ => Script::Refuse(Code::NotFound),
                };
                fixture.decoders[usize::from(*first)].script(script);
            }
            let answer = fixture.generate_ids(max_tokens(count as u32), prompt).await.unwrap();
            undisturbed(&answer, prompt, count);
        });
    }
}
