//! What happens when processes die: `longshore up --processes` with `kill -9` and Ctrl-C.
#![allow(clippy::disallowed_methods, reason = "a test owns its tasks: it awaits them")]

use std::time::{Duration, Instant};

use futures::StreamExt;
use longshore_fabric::{CallContext, Code, Connector, GrpcConnector, GrpcOptions};
use longshore_proto::types::{GenerateEvent, ShardStats};
use longshore_tests::{
    client::{await_start, generate, generate_by},
    server::{Server, complete, long_prompt, post, send_signal},
};
use serde_json::{Value, json};

/// Streams a completion and calls `after` once when `after_tokens` pieces of text came; returns the text.
async fn stream(
    server: &Server,
    prompt: &str,
    max_tokens: u32,
    after_tokens: usize,
    after: impl Fn(),
) -> Result<String, String> {
    let body = json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true, "stream": true});
    let request = reqwest::Client::new().post(format!("{}/completions", server.openai)).json(&body);
    let answer = request.send().await.map_err(|error| error.to_string())?;
    let mut chunks = answer.bytes_stream();
    let (mut buffer, mut text, mut pieces) = (String::new(), String::new(), 0);
    while let Some(chunk) = chunks.next().await {
        buffer.push_str(&String::from_utf8_lossy(&chunk.map_err(|error| error.to_string())?));
        while let Some(end) = buffer.find("\n\n") {
            let event: String = buffer.drain(..end + 2).collect();
            let Some(data) = event.trim().strip_prefix("data: ") else { continue };
            if data == "[DONE]" {
                return Ok(text);
            }
            let event: Value = serde_json::from_str(data).map_err(|error| error.to_string())?;
            if let Some(error) = event.get("error") {
                return Err(error.to_string());
            }
            text.push_str(event.pointer("/choices/0/text").and_then(Value::as_str).unwrap_or_default());
            pieces += 1;
            if pieces == after_tokens {
                after();
            }
        }
    }
    Err("the stream ended without [DONE]".to_owned())
}

/// How long a killed process may take until its next start answers: a pause, then loading the model in a test build.
const BACK_WITHIN: Duration = Duration::from_secs(90);

/// A worker that a test kills.
struct Worker {
    id: &'static str,
    address: String,
}

impl Worker {
    fn of(server: &Server, id: &'static str) -> Self {
        Self { id, address: server.address(id) }
    }

    /// Nanoseconds that tell one start from the next; waits until the worker serves.
    async fn start_after(&self, before: Option<u64>) -> u64 {
        await_start(&self.address, before, BACK_WITHIN).await.this.incarnation
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_decode_worker_loses_no_token() {
    let server = Server::up(&["--processes", "--shards", "2", "--prefill", "1", "--decode", "2"]);
    let prompt: String = long_prompt().chars().take(2400).collect();
    let workers = ["decode-0", "decode-1"].map(|id| Worker::of(&server, id));
    // Exactly, and with heads that stream in the answer too: whoever takes over computes its rows as they were.
    for (round, policy) in
        [("exact", "exact"), ("streaming", "streaming:sink=64,recent=64,min_positions=0,last_tiles=1")]
    {
        let undisturbed = generate_by(policy, &server.grpc, &prompt, 96, |_| ()).await;
        let (expected, undisturbed) = undisturbed.expect("an answer");
        assert_eq!((expected.len(), undisturbed.resumed), (96, 0));
        let (visited, causal) = (undisturbed.visited_blocks, undisturbed.causal_blocks);
        let streams = policy != "exact";
        assert!((causal > 0) == streams && visited < causal.max(1), "{round}: {visited} of {causal}");
        let started = [workers[0].start_after(None).await, workers[1].start_after(None).await];
        let before = workers.each_ref().map(|worker| server.ticks(worker.id));
        let (mut tokens, mut killed) = (0, None);
        let answer = generate_by(policy, &server.grpc, &prompt, 96, |event| {
            let GenerateEvent::Tokens(piece) = event else { return };
            tokens += piece.token_ids.len();
            if tokens >= 20 && killed.is_none() {
                // Which of the two has the sequence is the router's secret, but only that one computes.
                let busy = (0..2)
                    .max_by_key(|index| server.ticks(workers[*index].id).saturating_sub(before[*index]));
                let victim = busy.expect("there are two");
                server.kill(workers[victim].id, "-KILL");
                killed = Some(victim);
            }
        });
        let (tokens, finished) = answer.await.unwrap_or_else(|error| panic!("{round}: {error:?}"));
        let victim = killed.expect("more than 20 tokens came");
        assert_eq!(tokens, expected, "{round}: {}", workers[victim].id);
        assert!(finished.resumed > 0, "{round}: nobody had to take over from {}", workers[victim].id);
        workers[victim].start_after(Some(started[victim])).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_prefill_worker_is_a_typed_error_and_comes_back() {
    let server = Server::up(&["--processes", "--shards", "1", "--prefill", "1", "--decode", "1"]);
    let worker = Worker::of(&server, "prefill-0");
    let started = worker.start_after(None).await;
    let prompt = long_prompt();
    let (mut beside, mut killed) = (None, false);
    let answer = generate(&server.grpc, &prompt, 4, |event| {
        let GenerateEvent::Progress { done_tokens, total_tokens } = *event else { return };
        if done_tokens >= total_tokens || killed {
            return;
        }
        match &beside {
            // Waits behind this one for the same worker.
            None => {
                let body = json!({"prompt": format!("Once more. {prompt}"), "max_tokens": 4});
                let url = format!("{}/completions", server.openai);
                beside = Some(tokio::spawn(async move { post(&url, &body).await }));
            }
            Some(_) => {
                server.kill(worker.id, "-KILL");
                killed = true;
            }
        }
    });
    let error = answer.await.expect_err("nobody is left to compute the prompt");
    assert!(killed, "the prefill was over before it could be killed: {error:?}");
    assert_eq!(error.code, Code::Unavailable, "{error:?}");
    assert!(error.message.contains("prefill"), "{error:?}");
    let (status, answer) = beside.expect("begun before the kill").await.expect("the request ends");
    assert_eq!(status, 503, "{answer}");
    assert!(answer["error"]["message"].as_str().is_some_and(|m| m.contains("prefill")), "{answer}");
    worker.start_after(Some(started)).await;
    let (tokens, _) = generate(&server.grpc, &prompt, 4, |_| ()).await.expect("the worker is back");
    assert_eq!(tokens.len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_shard_is_a_miss_and_not_a_wrong_token() {
    let server = Server::up(&["--processes", "--shards", "1", "--prefill", "1", "--decode", "1"]);
    let prompt: String = long_prompt().chars().take(1600).collect();
    let (expected, _) = complete(&server, &json!(prompt), 24).await;
    let shard = Worker::of(&server, "kv-0");
    let started = shard.start_after(None).await;
    server.kill(shard.id, "-KILL");
    shard.start_after(Some(started)).await;
    let began = Instant::now();
    loop {
        let body = json!({"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": true});
        let (status, answer) = post(&format!("{}/completions", server.openai), &body).await;
        if status == 200 {
            assert_eq!(answer.pointer("/choices/0/text"), Some(&json!(expected)));
            break;
        }
        assert_eq!(status, 503, "{answer}");
        assert!(began.elapsed() < Duration::from_secs(60), "{answer}");
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

/// What a shard says of itself.
async fn shard_stats(address: &str) -> Option<ShardStats> {
    let shard = GrpcConnector::new(GrpcOptions::default()).shard(address).expect("an address");
    shard.stats(&CallContext::new("test").with_timeout(Duration::from_secs(2))).await.ok()
}

/// Waits until the shards have nothing to send and hold as many copies as `wanted`, or as before; returns how many.
async fn settled(shards: &[Worker], wanted: Option<u64>) -> u64 {
    let (began, mut last) = (Instant::now(), wanted);
    loop {
        let mut all = Vec::new();
        for shard in shards {
            all.extend(shard_stats(&shard.address).await);
        }
        let copies = all.iter().map(|stats| stats.blocks).sum();
        let busy = all.iter().any(|stats| stats.open_blocks + stats.views + stats.repair.backlog_blocks > 0);
        if all.len() == shards.len()
            && !busy
            && last == Some(copies)
            && all.iter().all(|stats| stats.blocks > 0)
        {
            return copies;
        }
        assert!(began.elapsed() < BACK_WITHIN, "{copies} copies instead of {wanted:?}: {all:?}");
        last = wanted.or(Some(copies));
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_shard_of_two_copies_loses_no_token_and_no_block() {
    let flags = ["--processes", "--shards", "3", "--copies", "2", "--write-acks", "2"];
    // Short stripes, so that every shard holds some.
    let sets = ["--set", "model.stripe_blocks=1", "--set", "kvstore.repair.retry_ms=200"];
    let server = Server::up(&[&flags[..], &sets].concat());
    let prompt: String = long_prompt().chars().take(2400).collect();
    let (expected, cold) = generate(&server.grpc, &prompt, 64, |_| ()).await.expect("an answer");
    let (_, warm) = generate(&server.grpc, &prompt, 64, |_| ()).await.expect("an answer");
    assert!(cold.cached_tokens == 0 && warm.cached_tokens > 0, "{cold:?} {warm:?}");
    let shards = ["kv-0", "kv-1", "kv-2"].map(|id| Worker::of(&server, id));
    let copies = settled(&shards, None).await;
    for victim in &shards {
        let started = victim.start_after(None).await;
        let (mut tokens, mut killed) = (0, false);
        let answer = generate(&server.grpc, &prompt, 64, |event| {
            let GenerateEvent::Tokens(piece) = event else { return };
            tokens += piece.token_ids.len();
            if tokens >= 20 && !killed {
                server.kill(victim.id, "-KILL");
                killed = true;
            }
        });
        let (tokens, finished) = answer.await.unwrap_or_else(|error| panic!("{}: {error:?}", victim.id));
        assert!(killed, "more than 20 tokens came");
        assert_eq!(tokens, expected, "{}", victim.id);
        assert_eq!(finished.cached_tokens, warm.cached_tokens, "{}: no block was lost before", victim.id);
        assert_eq!(finished.resumed, 0, "{}: other copies answer, nobody starts anew", victim.id);
        victim.start_after(Some(started)).await;
        settled(&shards, Some(copies)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_lets_a_stream_finish() {
    for args in [&["--shards", "2"][..], &["--processes", "--shards", "1"]] {
        let mut server = Server::up(args);
        let pid = server.id();
        let interrupt = || assert!(send_signal(pid, "-INT"));
        let text = stream(&server, "Once upon a time", 40, 5, interrupt).await;
        assert!(text.as_ref().is_ok_and(|text| text.len() > 40), "{args:?}: {text:?}");
        let (clean, took) = server.wait(Duration::from_secs(40));
        assert!(clean, "{args:?}: it did not end cleanly within {took:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_a_stream_that_outlives_the_drain_with_an_error() {
    for args in [&["--shards", "2"][..], &["--processes", "--shards", "1"]] {
        let args = [args, &["--set", "router.drain_ms=500"]].concat();
        let mut server = Server::up(&args);
        let pid = server.id();
        let interrupt = || assert!(send_signal(pid, "-INT"));
        let ended = stream(&server, "Once upon a time", 4000, 5, interrupt).await;
        let error = ended.expect_err("4,000 tokens take longer than the drain");
        let event: Value = serde_json::from_str(&error)
            .unwrap_or_else(|_| panic!("{args:?}: the stream broke off without an error event: {error}"));
        let message = event["message"].as_str().unwrap_or_default();
        assert!(message.contains("shutting down") && message.contains("hint:"), "{args:?}: {event}");
        assert!(event["type"].is_string(), "{args:?}: {event}");
        // `drain.deadline_ms` is 20 s by default; nothing is left that would need it.
        let (clean, took) = server.wait(Duration::from_secs(20));
        assert!(clean, "{args:?}: it did not end cleanly within {took:?}");
    }
}
