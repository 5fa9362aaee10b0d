//! What happens when processes die: `longshore up --processes` with `kill -9` and Ctrl-C.
#![allow(clippy::disallowed_methods, reason = "a test owns its tasks: it awaits them")]

use std::time::{Duration, Instant};

use futures::StreamExt;
use longshore_tests::server::{Server, complete, long_prompt, post};
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

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_decode_worker_loses_no_token() {
    let server = Server::up(&["--processes", "--shards", "2", "--prefill", "1", "--decode", "2"]);
    let prompt: String = long_prompt().chars().take(2400).collect();
    let expected = stream(&server, &prompt, 96, usize::MAX, || {}).await.expect("an undisturbed stream");
    // Which of the two has the sequence is the router's secret: kill one, then the other once the first is back.
    for victim in ["decode-0", "decode-1"] {
        let text = stream(&server, &prompt, 96, 20, || server.kill(victim, "-KILL")).await;
        assert_eq!(text.as_ref(), Ok(&expected), "{victim} was killed");
        await_process(&server, victim).await;
    }
}

async fn await_process(server: &Server, id: &str) {
    let began = Instant::now();
    while server.process(id).is_none() {
        assert!(began.elapsed() < Duration::from_secs(30), "{id} was not restarted");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_prefill_worker_is_a_typed_error_and_comes_back() {
    let server = Server::up(&["--processes", "--shards", "1", "--prefill", "1", "--decode", "1"]);
    let url = format!("{}/completions", server.openai);
    let body = json!({"prompt": long_prompt(), "max_tokens": 4, "temperature": 0});
    let request = tokio::spawn({
        let (url, body) = (url.clone(), body.clone());
        async move { post(&url, &body).await }
    });
    // Some 3,000 tokens take seconds: after one the prefill is in its middle.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(!request.is_finished(), "the prefill was over before it could be killed");
    server.kill("prefill-0", "-KILL");
    let (status, answer) = request.await.expect("the request ends");
    assert_eq!(status, 503, "{answer}");
    assert!(answer["error"]["message"].as_str().is_some_and(|m| m.contains("prefill")), "{answer}");
    let began = Instant::now();
    loop {
        let (status, answer) = post(&url, &body).await;
        if status == 200 {
            break;
        }
        assert_eq!(status, 503, "{answer}");
        assert!(began.elapsed() < Duration::from_secs(90), "prefill did not come back: {answer}");
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_shard_is_a_miss_and_not_a_wrong_token() {
    let server = Server::up(&["--processes", "--shards", "1", "--prefill", "1", "--decode", "1"]);
    let prompt: String = long_prompt().chars().take(1600).collect();
    let (expected, _) = complete(&server, &json!(prompt), 24).await;
    server.kill("kv-0", "-KILL");
    await_process(&server, "kv-0").await;
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

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_lets_a_stream_finish() {
    for args in [&["--shards", "2"][..], &["--processes", "--shards", "1"]] {
        let mut server = Server::up(args);
        let pid = server.id().to_string();
        let interrupt = || {
            let sent = std::process::Command::new("kill").args(["-INT", &pid]).status();
            assert!(sent.is_ok_and(|status| status.success()));
        };
        let text = stream(&server, "Once upon a time", 40, 5, interrupt).await;
        assert!(text.as_ref().is_ok_and(|text| text.len() > 40), "{args:?}: {text:?}");
        let (clean, took) = server.wait(Duration::from_secs(40));
        assert!(clean, "{args:?}: it did not end cleanly within {took:?}");
    }
}
