//! Errors, each with its status and shape.

use std::time::Duration;

use futures::{StreamExt as _, stream};
use longshore_fabric::Code;
use serde_json::{Value, json};

use super::{Server, error, hello_chat};
use crate::{
    Config,
    fixture::{Fixture, Options, Script, prompt_ids},
};

/// Sends bodies to an endpoint; each must be refused with 400 naming its field.
async fn refused(path: &str, table: &[(&str, &str)]) {
    let server = Server::new(Options::default()).await;
    for (body, param) in table {
        let (status, _, named, message) = error(server.post(path, (*body).to_owned()).await).await;
        assert_eq!(status, 400, "{body}: {message}");
        let expected = if param.is_empty() { Value::Null } else { json!(param) };
        assert_eq!(named, expected, "{body}: {message}");
        assert!(param.is_empty() || message.contains(&format!("`{param}`")), "{body}: {message}");
    }
    assert!(server.fixture.decoders[0].calls().is_empty(), "nothing was asked of a worker");
}

#[tokio::test]
async fn bad_completions_name_their_field() {
    let table = [
        (r#"{"prompt":"a","temperature":-1}"#, "temperature"),
        (r#"{"prompt":"a","temperature":"x"}"#, "temperature"),
        (r#"{"prompt":"a","temperature":1e39}"#, "temperature"),
        (r#"{"prompt":"a","temperature":[0]}"#, "temperature"),
        (r#"{"prompt":"a","top_p":0}"#, "top_p"),
        (r#"{"prompt":"a","top_p":1.5}"#, "top_p"),
        (r#"{"prompt":"a","top_k":-2}"#, "top_k"),
        (r#"{"prompt":"a","min_p":2}"#, "min_p"),
        (r#"{"prompt":"a","repetition_penalty":0}"#, "repetition_penalty"),
        (r#"{"prompt":"a","presence_penalty":3}"#, "presence_penalty"),
        (r#"{"prompt":"a","frequency_penalty":-3}"#, "frequency_penalty"),
        (r#"{"prompt":"a","max_tokens":0}"#, "max_tokens"),
        (r#"{"prompt":"a","max_tokens":-1}"#, "max_tokens"),
        (r#"{"prompt":"a","max_tokens":1.5}"#, "max_tokens"),
        (r#"{"prompt":"a","min_tokens":3}"#, "min_tokens"),
        (r#"{"prompt":"a","n":2}"#, "n"),
        (r#"{"prompt":"a","n":0}"#, "n"),
        (r#"{"prompt":"a","best_of":3}"#, "best_of"),
        (r#"{"prompt":"a","echo":true}"#, "echo"),
        (r#"{"prompt":"a","suffix":"b"}"#, "suffix"),
        (r#"{"prompt":"a","logit_bias":{"5":1}}"#, "logit_bias"),
        (r#"{"prompt":"a","logprobs":99}"#, "logprobs"),
        (r#"{"prompt":"a","logprobs":-1}"#, "logprobs"),
        (r#"{"prompt":"a","logprobs":true}"#, "logprobs"),
        (r#"{"prompt":"a","top_logprobs":1}"#, "top_logprobs"),
        (r#"{"prompt":"a","stop":""}"#, "stop"),
        (r#"{"prompt":"a","stop":[1]}"#, "stop"),
        (
            r#"{"prompt":"a","stop":["1","2","3","4","5","6","7","8","9","10","11","12","13","14","15","16","17"]}"#,
            "stop",
        ),
        (r#"{"prompt":"a","seed":36893488147419103232}"#, "seed"),
        (r#"{"prompt":"a","seed":"x"}"#, "seed"),
        (r#"{"prompt":"a","stream":"yes"}"#, "stream"),
        (r#"{"prompt":"a","stream_options":7}"#, "stream_options"),
        (r#"{"prompt":"a","model":7}"#, "model"),
        (r#"{"prompt":"a","cache_salt":7}"#, "cache_salt"),
        (r#"{"prompt":"a","prefill_policy":7}"#, "prefill_policy"),
        (r#"{"prompt":"a","prefill_policy":"sparsest"}"#, "prefill_policy"),
        (r#"{"prompt":"a","prefill_policy":"exact\n"}"#, "prefill_policy"),
        (r#"{"prompt":"a","response_format":{"type":"json_object"}}"#, "response_format.type"),
        (r#"{}"#, "prompt"),
        (r#"{"prompt":null}"#, "prompt"),
        (r#"{"prompt":""}"#, "prompt"),
        (r#"{"prompt":[]}"#, "prompt"),
        (r#"{"prompt":[""]}"#, "prompt"),
        (r#"{"prompt":[[]]}"#, "prompt"),
        (r#"{"prompt":["a","b"]}"#, "prompt"),
        (r#"{"prompt":[[1],[2]]}"#, "prompt"),
        (r#"{"prompt":[1,"a"]}"#, "prompt"),
        (r#"{"prompt":[-1]}"#, "prompt"),
        (r#"{"prompt":[1.5]}"#, "prompt"),
        (r#"{"prompt":[4294967296]}"#, "prompt"),
        (r#"{"prompt":[100000]}"#, "prompt"),
        (r#"{"prompt":7}"#, "prompt"),
    ];
    refused("/v1/completions", &table).await;
}

#[tokio::test]
async fn bad_chats_name_their_field() {
    let table = [
        (r#"{}"#, "messages"),
        (r#"{"messages":[]}"#, "messages"),
        (r#"{"messages":"hi"}"#, "messages"),
        (r#"{"messages":[{"content":"a"}]}"#, "messages"),
        (r#"{"messages":[{"role":"user"}]}"#, "messages[0].content"),
        (r#"{"messages":[{"role":"user","content":7}]}"#, "messages"),
        (r#"{"messages":[{"role":"robot","content":"a"}]}"#, "messages[0].role"),
        (
            r#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{}}]}]}"#,
            "messages[0].content[0].type",
        ),
        (r#"{"messages":[{"role":"user","content":[{"type":"text"}]}]}"#, "messages[0].content[0].text"),
        (
            r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","tool_calls":[{}]}]}"#,
            "messages[1].tool_calls",
        ),
        (r#"{"messages":[{"role":"user","content":"a"}],"tools":[{"type":"function"}]}"#, "tools"),
        (r#"{"messages":[{"role":"user","content":"a"}],"top_logprobs":2}"#, "top_logprobs"),
        (r#"{"messages":[{"role":"user","content":"a"}],"logprobs":true,"top_logprobs":99}"#, "top_logprobs"),
        (r#"{"messages":[{"role":"user","content":"a"}],"logprobs":3}"#, "logprobs"),
        (r#"{"messages":[{"role":"user","content":"a"}],"n":2}"#, "n"),
        (r#"{"messages":[{"role":"user","content":"a"}],"temperature":-1}"#, "temperature"),
        (r#"{"messages":[{"role":"user","content":"a"}],"prefill_policy":"sparsest"}"#, "prefill_policy"),
    ];
    refused("/v1/chat/completions", &table).await;
}

#[tokio::test]
async fn bodies_that_are_no_json_name_the_place() {
    let server = Server::new(Options::default()).await;
    let invalid_utf8 = b"{\"prompt\":\"\xff\"}".to_vec();
    let deep = format!("{{\"x\":{}", "[".repeat(100_000)).into_bytes();
    let bodies: [&[u8]; 9] = [
        b"",
        b"{",
        br#"{"prompt":"a","temperature":NaN}"#,
        br#"{"prompt":"a","temperature":1e999}"#,
        br#"{"prompt":"a"} x"#,
        b"[1]",
        b"null",
        &invalid_utf8,
        &deep,
    ];
    for body in bodies {
        let (status, code, param, message) = error(server.post("/v1/completions", body.to_vec()).await).await;
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
        assert_eq!((status, code.as_str(), param), (400, "invalid_json", Value::Null), "{shown}: {message}");
        assert!(message.contains("line 1 column") || message.contains("JSON object"), "{shown}: {message}");
    }
}

#[tokio::test]
async fn unknown_things_are_not_found() {
    let server = Server::new(Options::default()).await;
    let (status, code, param, message) =
        error(server.completion(&json!({ "model": "gpt-4", "prompt": "a" })).await).await;
    assert_eq!((status, code.as_str(), param), (404, "model_not_found", json!("model")));
    assert!(message.contains("`gpt-4`") && message.contains("`tiny`"), "{message}");
    assert_eq!(error(server.get("/v1/models/org/other").await).await.1, "model_not_found");
    assert_eq!(error(server.get("/v2/models").await).await.0, 404);
    assert_eq!(error(server.get("/v1/completions").await).await.0, 405);
}

#[tokio::test]
async fn an_unknown_policy_is_told_which_there_are() {
    let server = Server::new(Options::default()).await;
    let (status, code, _, message) =
        error(server.completion(&json!({ "prompt": "a", "prefill_policy": "sparsest" })).await).await;
    assert_eq!((status, code.as_str()), (400, "invalid_value"));
    for name in crate::Policies::names() {
        assert!(message.contains(name), "{name}: {message}");
    }
}

#[tokio::test]
async fn prompts_beyond_the_context_say_so() {
    let server = Server::new(Options::default()).await;
    let (status, code, param, message) =
        error(server.completion(&json!({ "prompt": prompt_ids(2_000) })).await).await;
    assert_eq!((status, code.as_str(), param), (400, "context_length_exceeded", json!("prompt")));
    assert!(message.contains("1999") && message.contains("--max-context-tokens"), "{message}");
    let long = json!({ "messages": [{ "role": "user", "content": "q".repeat(3_000) }], "stream": true });
    let (status, code, param, _) = error(server.chat(&long).await).await;
    assert_eq!((status, code.as_str(), param), (400, "context_length_exceeded", json!("messages")));
}

#[tokio::test]
async fn bodies_over_the_limit_are_refused() {
    let mut config = Config::default();
    config.http.body_max_bytes = 10_000;
    let server = Server::new(Options { config, ..Options::default() }).await;
    let body = json!({ "prompt": "a".repeat(10_000) });
    let (status, code, _, message) = error(server.completion(&body).await).await;
    assert_eq!((status, code.as_str()), (413, "request_too_large"));
    assert!(message.contains("10000 bytes") && message.contains("router.http.body_max_bytes"), "{message}");
    let pieces = stream::iter((0..15).map(|_| Ok::<_, std::io::Error>(vec![b' '; 1_000])));
    let chunked = reqwest::Body::wrap_stream(pieces);
    assert_eq!(error(server.post("/v1/completions", chunked).await).await.0, 413);
}

#[tokio::test]
async fn slow_clients_do_not_hold_connections() {
    let mut config = Config::default();
    (config.http.body_idle_ms, config.http.header_timeout_ms) = (50, 50);
    let server = Server::new(Options { config, ..Options::default() }).await;
    let answer =
        server.raw(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 99\r\n\r\n{\"pro").await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    let quiet = tokio::time::timeout(Duration::from_secs(60), server.raw(b"POST /v1/comp"));
    assert!(!quiet.await.expect("the connection is closed").contains("200 OK"));
}

#[tokio::test]
async fn overload_asks_to_come_again() {
    let config = Config { requests_max: 1, queue_max: 0, retry_after_ms: 1_500, ..Config::default() };
    let server = Server::new(Options { config, ..Options::default() }).await;
    server.fixture.decoders[0].script(Script::HangAfter(1));
    let mut running = server.completion(&json!({ "prompt": "a", "stream": true })).await.bytes_stream();
    running.next().await.unwrap().unwrap();
    let answer = server.chat(&hello_chat()).await;
    assert_eq!(
        (
            answer.headers()["retry-after"].to_str().unwrap(),
            answer.headers()["retry-after-ms"].to_str().unwrap()
        ),
        ("2", "1500")
    );
    let (status, code, _, message) = error(answer).await;
    assert_eq!((status, code.as_str()), (429, "overloaded"));
    assert!(message.contains("hint:"), "{message}");
}

#[tokio::test]
async fn each_failure_has_its_status() {
    let table = [
        (Code::Unavailable, 503, "unavailable"),
        (Code::Internal, 500, ""),
        (Code::ResourceExhausted, 429, "overloaded"),
        (Code::DeadlineExceeded, 504, "deadline_exceeded"),
        (Code::InvalidArgument, 400, "invalid_value"),
    ];
    for (code, status, name) in table {
        let server = Server::new(Options::default()).await;
        (0..4).for_each(|_| server.fixture.decoders[0].script(Script::Refuse(code)));
        let answer = error(server.completion(&json!({ "prompt": "a" })).await).await;
        assert_eq!((answer.0, answer.1.as_str()), (status, name), "{code:?}: {}", answer.3);
    }
    let server = Server::new(Options::default()).await;
    for (_, describer) in &server.fixture.describers {
        describer.other_deployment.store(true, std::sync::atomic::Ordering::SeqCst);
    }
    let answer = error(server.completion(&json!({ "prompt": "a" })).await).await;
    assert_eq!((answer.0, answer.1.as_str()), (503, "failed_precondition"), "{}", answer.3);
}

#[tokio::test]
async fn a_shutdown_is_told() {
    let server = Server::new(Options::default()).await;
    let router = super::super::app(server.fixture.router.clone());
    server.fixture.tasks.cancel();
    let request = axum::http::Request::post("/v1/completions")
        .body(axum::body::Body::from(r#"{"prompt":"a"}"#))
        .unwrap();
    let answer = call(router, request).await;
    assert_eq!(answer.status(), 503);
    Fixture::eventually("the end of the listener", || server.fixture.tasks.running().is_empty()).await;
}

async fn call(app: axum::Router, request: axum::http::Request<axum::body::Body>) -> axum::response::Response {
    use hyper::service::Service as _;
    hyper_util::service::TowerToHyperService::new(app).call(request).await.expect("handlers are infallible")
}
