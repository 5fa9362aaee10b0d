//! What is refused, and that nothing grows meanwhile.

use std::{sync::atomic::Ordering, time::Duration};

use futures::StreamExt as _;
use longshore_fabric::{CallContext, Code, Inference as _};
use longshore_proto::types::{ChatMessage, GenerateStart, PromptChunk, Sampling};
use tokio::sync::mpsc;

use crate::{
    Config,
    fixture::{CONTEXT_TOKENS, Fixture, Options, Script, model, prompt_ids},
};

fn text(text: &str) -> PromptChunk {
    PromptChunk::Text(text.to_owned())
}

fn message(role: &str, content: &str) -> PromptChunk {
    PromptChunk::Message(ChatMessage { role: role.to_owned(), content: content.to_owned() })
}

/// Sends `chunk` without end; returns the answer's error and how many chunks the router took.
async fn endless(chunk: PromptChunk) -> (longshore_fabric::Error, usize) {
    let fixture = Fixture::new(Options::default());
    let (sender, receiver) = mpsc::channel(1);
    let ctx = CallContext::new("test");
    let mut events = fixture.router.generate(&ctx, GenerateStart::default(), receiver).await.unwrap();
    let mut taken = 0;
    while sender.send(chunk.clone()).await.is_ok() {
        taken += 1;
        assert!(taken < 1_000_000, "the prompt is read without end");
    }
    let error = events.next().await.unwrap().unwrap_err();
    assert!(events.next().await.is_none());
    (error, taken)
}

#[tokio::test]
async fn endless_prompts_are_refused_as_soon_as_they_exceed_the_limit() {
    let limit = CONTEXT_TOKENS as usize - 1;
    let (error, taken) = endless(PromptChunk::Tokens(vec![7; 10])).await;
    assert_eq!((error.code, error.field.as_deref()), (Code::OutOfRange, Some("prompt")));
    for part in ["1999", "2000", "--max-context-tokens", "`tiny`"] {
        assert!(error.message.contains(part), "{error}");
    }
    // The channel holds one more chunk when the router hangs up.
    assert!((limit / 10..=limit / 10 + 2).contains(&taken), "{taken}");

    let (error, taken) = endless(text("0123456789")).await;
    assert_eq!(error.code, Code::OutOfRange);
    let most = limit * model().tokenizer.longest_token_bytes() / 10;
    assert!(taken <= most + 2, "{taken} > {most}");

    let (error, taken) = endless(message("user", "")).await;
    assert_eq!(error.code, Code::OutOfRange);
    assert!(taken <= limit + 2, "{taken}");
}

#[tokio::test]
async fn the_limit_is_exact() {
    let fixture = Fixture::new(Options::default());
    let last = CONTEXT_TOKENS as u32 - 1;
    let start = || GenerateStart::default();
    assert_eq!(fixture.generate_ids(start(), last).await.unwrap().finished().completion_tokens, 1);
    assert_eq!(fixture.generate_ids(start(), last + 1).await.unwrap_err().code, Code::OutOfRange);
    // Text that could fit by its bytes but does not once it is tokenized.
    let long = "q".repeat(last as usize + 1);
    assert_eq!(fixture.generate(start(), vec![text(&long)]).await.unwrap_err().code, Code::OutOfRange);
}

#[tokio::test]
async fn prompts_that_mean_nothing_are_refused() {
    let vocabulary = model().config.vocabulary as u32;
    let table: [(&str, &str, Vec<PromptChunk>); 9] = [
        ("prompt", "empty", vec![]),
        ("prompt", "empty", vec![text("")]),
        ("prompt", "empty", vec![PromptChunk::Tokens(vec![])]),
        ("prompt", "position 1", vec![PromptChunk::Tokens(vec![1, vocabulary])]),
        ("prompt", "position 2", vec![PromptChunk::Tokens(vec![1, 1]), PromptChunk::Tokens(vec![u32::MAX])]),
        ("prompt", "mixes", vec![text("a"), PromptChunk::Tokens(vec![1])]),
        ("prompt", "mixes", vec![PromptChunk::Tokens(vec![1]), message("user", "a")]),
        ("prompt", "mixes", vec![message("user", "a"), text("a")]),
        ("messages[1].role", "robot", vec![message("user", "a"), message("robot", "a")]),
    ];
    for (field, word, prompt) in table {
        let fixture = Fixture::new(Options::default());
        let error = fixture.generate(GenerateStart::default(), prompt.clone()).await.unwrap_err();
        assert_eq!((error.code, error.field.as_deref()), (Code::InvalidArgument, Some(field)), "{prompt:?}");
        assert!(error.message.contains(word), "{prompt:?}: {error}");
    }
}

#[tokio::test]
async fn parameters_are_checked_before_the_prompt_is_read() {
    let fixture = Fixture::new(Options::default());
    let sampling = Sampling { temperature: -1.0, ..Sampling::default() };
    let error =
        fixture.start(GenerateStart { sampling, ..GenerateStart::default() }, vec![]).await.err().unwrap();
    assert_eq!((error.code, error.field.as_deref()), (Code::InvalidArgument, Some("temperature")));
    for policy in ["sparsest", "exact\n", "naïve", &"p".repeat(257)] {
        let start = GenerateStart { prefill_policy: policy.to_owned(), ..GenerateStart::default() };
        let error = fixture.start(start, vec![]).await.err().unwrap();
        assert_eq!((error.code, error.field.as_deref()), (Code::InvalidArgument, Some("prefill_policy")));
    }
    let start = GenerateStart { model: "gpt-4\n".to_owned(), ..GenerateStart::default() };
    let error = fixture.start(start, vec![]).await.err().unwrap();
    assert_eq!((error.code, error.field.as_deref()), (Code::NotFound, Some("model")));
    assert!(error.message.contains("`gpt-4\\n`") && error.message.contains("`tiny`"), "{error}");
}

#[tokio::test]
async fn a_prompt_that_stops_coming_times_out() {
    let config = Config { prompt_idle_ms: 20, ..Config::default() };
    let fixture = Fixture::new(Options { config, ..Options::default() });
    let (sender, receiver) = mpsc::channel(1);
    let ctx = CallContext::new("test");
    let mut events = fixture.router.generate(&ctx, GenerateStart::default(), receiver).await.unwrap();
    sender.send(text("half a")).await.unwrap();
    let error = events.next().await.unwrap().unwrap_err();
    assert_eq!(error.code, Code::DeadlineExceeded);
    assert!(error.message.contains("close the prompt stream"), "{error}");
}

#[tokio::test]
async fn empty_chunks_do_not_keep_a_prompt_alive() {
    for (empty, pause_ms) in [(text(""), 5), (text(""), 0), (PromptChunk::Tokens(Vec::new()), 5)] {
        let config = Config { prompt_idle_ms: 50, ..Config::default() };
        let fixture = Fixture::new(Options { config, ..Options::default() });
        let (sender, receiver) = mpsc::channel(8);
        let ctx = CallContext::new("test");
        let mut events = fixture.router.generate(&ctx, GenerateStart::default(), receiver).await.unwrap();
        let endless = async {
            while sender.send(empty.clone()).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(pause_ms)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), endless).await.expect("the router hangs up");
        assert_eq!(events.next().await.unwrap().unwrap_err().code, Code::DeadlineExceeded);
    }
}

#[tokio::test]
async fn a_full_queue_refuses_with_a_retry_hint() {
    let config = Config { requests_max: 1, queue_max: 1, ..Config::default() };
    let fixture = Fixture::new(Options { config, ..Options::default() });
    fixture.decoders[0].script(Script::HangAfter(1));
    let ids = || vec![PromptChunk::Tokens(prompt_ids(10))];
    let running = fixture.start(GenerateStart::default(), ids()).await.unwrap();
    Fixture::eventually("the first request", || fixture.metrics.in_flight.get() == 1).await;
    let waiting = fixture.start(GenerateStart::default(), ids()).await.unwrap();
    Fixture::eventually("the second request", || fixture.metrics.queued.get() == 1).await;
    let error = fixture.generate_ids(GenerateStart::default(), 10).await.unwrap_err();
    assert_eq!((error.code, error.retry_after), (Code::ResourceExhausted, Some(Duration::from_secs(1))));
    drop(running);
    crate::fixture::collect(waiting).await.unwrap();
}

/// Time passes only while everybody waits, so that the worker is asked before the time is over.
#[tokio::test(start_paused = true)]
async fn deadlines_end_requests_and_their_workers() {
    let fixture = Fixture::new(Options::default());
    fixture.decoders[0].script(Script::HangAfter(1));
    let (sender, receiver) = mpsc::channel(1);
    sender.send(text("hello")).await.unwrap();
    drop(sender);
    let ctx = CallContext::new("test").with_timeout(Duration::from_millis(50));
    let events = fixture.router.generate(&ctx, GenerateStart::default(), receiver).await.unwrap();
    let error = crate::fixture::collect(events).await.unwrap_err();
    assert_eq!(error.code, Code::DeadlineExceeded);
    Fixture::eventually("the end of the decode", || fixture.decoders[0].dropped.load(Ordering::SeqCst) == 1)
        .await;

    let config = Config { request_timeout_ms: 50, ..Config::default() };
    let fixture = Fixture::new(Options { config, ..Options::default() });
    fixture.decoders[0].script(Script::HangAfter(1));
    let error = fixture.generate_ids(GenerateStart::default(), 10).await.unwrap_err();
    assert_eq!(error.code, Code::DeadlineExceeded);
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_cut_off() {
    let config = Config { client_stall_ms: 50, ..Config::default() };
    let fixture = Fixture::new(Options { config, ..Options::default() });
    let sampling = Sampling { max_tokens: Some(1_000), ..Sampling::default() };
    let start = GenerateStart { sampling, ..GenerateStart::default() };
    let _unread = fixture.start(start, vec![PromptChunk::Tokens(prompt_ids(10))]).await.unwrap();
    Fixture::eventually("the end of the decode", || fixture.decoders[0].dropped.load(Ordering::SeqCst) == 1)
        .await;
    Fixture::eventually("room for others", || fixture.metrics.in_flight.get() == 0).await;
}

/// Work on blocking threads cannot be stopped; if it gave its place back early, clients that hang up could pile it up.
#[test]
fn abandoned_work_keeps_its_place() {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_all().max_blocking_threads(1).build().unwrap();
    runtime.block_on(async {
        let fixture = Fixture::new(Options::default());
        let (release, blocked) = std::sync::mpsc::sync_channel::<()>(1);
        let blocker = tokio::task::spawn_blocking(move || blocked.recv());
        let ctx = CallContext::new("test");

        let call = fixture.router.tokenize(&ctx, "", "some text", false);
        tokio::time::timeout(Duration::from_millis(20), call).await.expect_err("the thread is taken");
        assert_eq!(fixture.metrics.in_flight.get(), 1);

        let long = vec![text(&"q ".repeat(2_100))];
        let events = fixture.start(GenerateStart::default(), long).await.unwrap();
        Fixture::eventually("the second place", || fixture.metrics.in_flight.get() == 2).await;
        drop(events);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(fixture.metrics.in_flight.get(), 2);

        release.send(()).unwrap();
        blocker.await.unwrap().unwrap();
        Fixture::eventually("room for others", || fixture.metrics.in_flight.get() == 0).await;
    });
}
