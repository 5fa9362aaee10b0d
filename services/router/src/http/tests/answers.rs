//! Answers, whole and streamed.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::StreamExt as _;
use longshore_fabric::Code;
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::{Server, events, hello_chat, value};
use crate::{
    Config,
    fixture::{Fixture, Options, Script, encode, prompt_ids},
};

fn with(mut body: Value, more: Value) -> Value {
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

#[tokio::test]
async fn lists_its_model() {
    let server = Server::new(Options::default()).await;
    let list = value(server.get("/v1/models").await).await;
    assert_eq!((&list["object"], &list["data"][0]["id"]), (&json!("list"), &json!("tiny")));
    assert_eq!(list["data"][0]["max_model_len"], 2_000);
    assert_eq!(value(server.get("/v1/models/tiny").await).await, list["data"][0]);
    let health = server.get("/health").await;
    assert_eq!(health.status(), 200);
    server.fixture.set_members(Vec::new());
    let health = server.get("/health").await;
    assert_eq!((health.status().as_u16(), value(health).await["missing"].clone()), (503, json!("kvstore")));
}

#[tokio::test]
async fn completes_prompts_in_all_forms() {
    let server = Server::new(Options::default()).await;
    server.fixture.decoders[0].say(encode("and so on"));
    let ids = encode("hello");
    for prompt in [json!("hello"), json!(["hello"]), json!(ids), json!([ids])] {
        let answer = value(server.completion(&json!({ "model": "tiny", "prompt": prompt })).await).await;
        assert_eq!(answer["object"], "text_completion");
        assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
        assert!(answer["system_fingerprint"].as_str().unwrap().starts_with("fp_"));
        let choice = json!({ "index": 0, "text": "and so on", "logprobs": null, "finish_reason": "stop" });
        assert_eq!(answer["choices"], json!([choice]), "{prompt}");
        let tokens = encode("and so on").len();
        assert_eq!(answer["usage"]["prompt_tokens"], ids.len());
        assert_eq!(
            (&answer["usage"]["completion_tokens"], &answer["usage"]["total_tokens"]),
            (&json!(tokens), &json!(tokens + ids.len()))
        );
    }
}

#[tokio::test]
async fn a_policy_has_its_own_blocks_and_fingerprint() {
    let server = Server::new(Options::default()).await;
    let mut fingerprints = Vec::new();
    for (policy, cached) in
        [(json!(null), 0), (json!("exact"), 192), (json!("balanced"), 0), (json!("balanced"), 192)]
    {
        let body = json!({ "prompt": prompt_ids(200), "max_tokens": 2, "prefill_policy": policy });
        let answer = value(server.completion(&body).await).await;
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], cached, "{policy}: {answer}");
        fingerprints.push(answer["system_fingerprint"].clone());
    }
    assert_eq!((&fingerprints[0], &fingerprints[2]), (&fingerprints[1], &fingerprints[3]));
    assert_ne!(fingerprints[0], fingerprints[2]);
}

#[tokio::test]
async fn usage_tells_cached_tokens() {
    let server = Server::new(Options::default()).await;
    let body = json!({ "prompt": prompt_ids(200), "max_tokens": 2 });
    for cached in [0, 192] {
        let answer = value(server.completion(&body).await).await;
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], cached);
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
    }
}

#[tokio::test]
async fn streams_completions() {
    let server = Server::new(Options::default()).await;
    server.fixture.decoders[0].say(encode("naïve 漢字"));
    let body = json!({ "prompt": "hello", "stream": true, "stream_options": { "include_usage": true } });
    let chunks = events(server.completion(&body).await).await;
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, "naïve 漢字");
    let (last, before) = (&chunks[chunks.len() - 1], &chunks[chunks.len() - 2]);
    assert_eq!((&last["choices"], last["usage"]["prompt_tokens"].as_u64()), (&json!([]), Some(1)));
    assert_eq!((&before["choices"][0]["finish_reason"], &before["usage"]), (&json!("stop"), &Value::Null));
    assert!(
        chunks.iter().all(|chunk| chunk["id"] == chunks[0]["id"] && chunk["object"] == "text_completion")
    );
}

#[tokio::test]
async fn chats_whole_and_streamed() {
    let server = Server::new(Options::default()).await;
    server.fixture.decoders[0].say(encode("hello there"));
    let answer = value(server.chat(&hello_chat()).await).await;
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["choices"][0]["message"]["role"], "assistant");
    assert_eq!(answer["choices"][0]["message"]["content"], "hello there");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let chunks = events(server.chat(&with(hello_chat(), json!({ "stream": true }))).await).await;
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": "" }));
    let text: String =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "hello there");
    let last = chunks.last().unwrap();
    assert_eq!(
        (&last["choices"][0]["finish_reason"], last["object"].as_str()),
        (&json!("stop"), Some("chat.completion.chunk"))
    );
    assert!(last.get("usage").is_none(), "nobody asked for it");
}

#[tokio::test]
async fn content_parts_and_newer_names_are_understood() {
    let server = Server::new(Options::default()).await;
    let parts = json!([{ "type": "text", "text": "hel" }, { "type": "text", "text": "lo" }]);
    let messages = json!([
        { "role": "developer", "content": "be brief" }, { "role": "user", "content": parts, "name": "me" },
        { "role": "assistant", "content": null }, { "role": "user", "content": "hello" },
    ]);
    let body = json!({
        "model": "tiny", "messages": messages, "max_completion_tokens": 3, "max_tokens": 99, "user": "someone",
        "n": 1, "tools": [], "logit_bias": {}, "response_format": { "type": "text" }, "top_k": -1, "seed": -5,
        "ignore_eos": true, "min_tokens": 3, "some_new_field": { "deep": [1, 2] }, "stop": null,
    });
    let answer = value(server.chat(&body).await).await;
    assert_eq!(answer["usage"]["completion_tokens"], 3);
    let sampling = server.fixture.decoders[0].calls()[0].sampling.clone();
    assert_eq!((sampling.seed, sampling.top_k, sampling.ignore_eos), (Some(-5i64 as u64), 0, true));
    let rendered = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n\
                    <|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(answer["usage"]["prompt_tokens"], encode(rendered).len());
}

#[tokio::test]
async fn stop_strings_end_answers() {
    let server = Server::new(Options::default()).await;
    server.fixture.decoders[0].say(encode("one two three"));
    for (stop, expected) in
        [(json!("two"), "one "), (json!(["x", " three"]), "one two"), (json!([]), "one two three")]
    {
        let answer = value(server.completion(&json!({ "prompt": "a", "stop": stop })).await).await;
        assert_eq!(answer["choices"][0]["text"], expected);
        let chunks =
            events(server.completion(&json!({ "prompt": "a", "stop": stop, "stream": true })).await).await;
        let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
        assert_eq!(text, expected);
    }
}

#[tokio::test]
async fn log_probabilities_have_the_form_of_their_endpoint() {
    let server = Server::new(Options::default()).await;
    server.fixture.decoders[0].say(encode("hello é"));
    let answer = value(server.completion(&json!({ "prompt": "a", "logprobs": 2 })).await).await;
    let logprobs = &answer["choices"][0]["logprobs"];
    let tokens = logprobs["tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), encode("hello é").len());
    assert_eq!((&logprobs["text_offset"][0], &logprobs["text_offset"][1]), (&json!(0), &json!(5)));
    assert_eq!(
        (&logprobs["token_logprobs"][0], logprobs["top_logprobs"][0].as_object().unwrap().len()),
        (&json!(-0.5), 2)
    );
    let chat = with(hello_chat(), json!({ "logprobs": true, "top_logprobs": 1 }));
    let content = value(server.chat(&chat).await).await["choices"][0]["logprobs"]["content"].clone();
    assert_eq!((&content[0]["token"], &content[0]["bytes"]), (&json!("hello"), &json!(b"hello")));
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 1);
    let bytes: Vec<Value> = content
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|token| token["bytes"].as_array().unwrap().clone())
        .collect();
    assert_eq!(Value::Array(bytes), json!("hello é".as_bytes()), "bytes put together are the text");
    let chunks = events(server.chat(&with(chat, json!({ "stream": true }))).await).await;
    let tokens = chunks.iter().filter(|chunk| chunk["choices"][0]["logprobs"]["content"][0].is_object());
    assert_eq!(tokens.count(), encode("hello é").len());
}

#[tokio::test]
async fn requests_keep_their_names() {
    let server = Server::new(Options::default()).await;
    let named =
        |id: &'static str| server.client.post(server.url("/v1/completions")).header("x-request-id", id);
    let body = json!({ "prompt": "a", "max_tokens": 1 }).to_string();
    let answer = named("my-id.7").body(body.clone()).send().await.unwrap();
    assert_eq!(answer.headers()["x-request-id"], "my-id.7");
    assert_eq!(value(answer).await["id"], "cmpl-my-id.7");
    assert_eq!(server.fixture.decoders[0].calls()[0].request_id, "my-id.7");
    for unfit in ["has space", "", "\u{e9}"] {
        let answer = named(unfit).body(body.clone()).send().await.unwrap();
        assert!(answer.headers()["x-request-id"].to_str().unwrap().starts_with("req-"), "{unfit}");
    }
}

#[tokio::test]
async fn a_long_prefill_keeps_the_stream_alive() {
    let mut config = Config::default();
    config.http.keep_alive_ms = 20;
    let server = Server::new(Options { config, ..Options::default() }).await;
    let begin = Arc::new(Notify::new());
    server.fixture.prefillers[0].script(Script::Await(Arc::clone(&begin)));
    let body = json!({ "prompt": prompt_ids(200), "max_tokens": 1, "stream": true });
    let mut chunks = server.completion(&body).await.bytes_stream();
    let mut bytes: Vec<u8> = Vec::new();
    // The prefill lasts until it was bridged: how long that takes is up to the machine.
    while String::from_utf8_lossy(&bytes).matches(": waiting\n").count() < 2 {
        bytes.extend(chunks.next().await.expect("the stream goes on").unwrap());
    }
    begin.notify_one();
    while let Some(chunk) = chunks.next().await {
        bytes.extend(chunk.unwrap());
    }
    let text = String::from_utf8(bytes).unwrap();
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
}

#[tokio::test]
async fn a_failure_in_the_middle_ends_the_stream_with_an_error() {
    let server = Server::new(Options::default()).await;
    server.fixture.decoders[0].script(Script::FailAfter(3, Code::Internal));
    let body = json!({ "prompt": "a", "stream": true, "ignore_eos": true });
    let chunks = events(server.completion(&body).await).await;
    let error = &chunks.last().unwrap()["error"];
    assert_eq!((&error["type"], &error["param"]), (&json!("server_error"), &Value::Null));
    server.fixture.decoders[0].script(Script::FailAfter(3, Code::Internal));
    assert_eq!(server.completion(&json!({ "prompt": "a" })).await.status(), 500);
}

#[tokio::test]
async fn a_takeover_is_invisible() {
    let server = Server::new(Options { decoders: 2, ..Options::default() }).await;
    let body = json!({ "prompt": prompt_ids(150), "max_tokens": 90, "seed": 1 });
    let before = value(server.completion(&body).await).await["choices"].clone();
    server
        .fixture
        .decoders
        .iter()
        .for_each(|decoder| decoder.script(Script::FailAfter(40, Code::Unavailable)));
    assert_eq!(value(server.completion(&body).await).await["choices"], before);
    assert_eq!(server.fixture.metrics.resumes.get(), 2);
}

#[tokio::test]
async fn clients_that_go_away_cancel_the_workers() {
    for stream in [false, true] {
        let server = Server::new(Options::default()).await;
        server.fixture.decoders[0].script(Script::HangAfter(3));
        let body = json!({ "prompt": "hello", "stream": stream });
        let request = server.completion(&body);
        let decoder = &server.fixture.decoders[0];
        if stream {
            let mut chunks = request.await.bytes_stream();
            chunks.next().await.unwrap().unwrap();
        } else {
            // Goes away once the worker was asked, and not after a time that may be too short for that.
            tokio::select! {
                _ = request => panic!("the answer never ends"),
                () = Fixture::eventually("the decode", || decoder.calls().len() == 1) => {}
            }
        }
        Fixture::eventually("the end of the decode", || decoder.dropped.load(Ordering::SeqCst) == 1).await;
        Fixture::eventually("room for others", || server.fixture.metrics.in_flight.get() == 0).await;
    }
}

#[tokio::test]
async fn a_shutdown_closes_idle_connections_and_finishes_the_others() {
    let server = Server::new(Options::default()).await;
    server.fixture.decoders[0].script(Script::Delay(Duration::from_millis(100)));
    server.fixture.decoders[0].say(encode("done"));
    let body = json!({ "prompt": "hello" });
    let running = server.completion(&body);
    let stop = async {
        Fixture::eventually("the decode", || server.fixture.decoders[0].calls().len() == 1).await;
        server.fixture.tasks.drain(Duration::from_secs(60)).await
    };
    let (answer, late) = tokio::join!(running, stop);
    assert_eq!(value(answer).await["choices"][0]["text"], "done");
    assert!(late.is_empty(), "{late:?}");
    assert!(server.client.get(server.url("/health")).send().await.is_err(), "nobody listens");
}
