//! Prefill policies end to end: chosen by deployment and by request, kept apart in the cache, refused by name.

use futures::StreamExt;
use longshore_attention::{HeadBudgets, HeadPlan, PrefillPolicy};
use longshore_fabric::{CallContext, Code, Connector, Error, GrpcConnector, GrpcOptions};
use longshore_proto::types::{GenerateEvent, GenerateStart, PromptChunk, Sampling};
use longshore_router::Policies;
use longshore_tests::{
    house::{House, Plan},
    server::{Server, long_prompt, post},
};
use serde_json::{Value, json};
use tokio::sync::mpsc;

fn start(policy: &str, salt: &str) -> GenerateStart {
    let sampling =
        Sampling { temperature: 0.0, max_tokens: Some(4), ignore_eos: true, ..Sampling::default() };
    GenerateStart {
        sampling,
        prefill_policy: policy.to_owned(),
        cache_salt: salt.into(),
        ..GenerateStart::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_policies_never_share_blocks() {
    let house = House::build(Plan::default()).await;
    let prompt: Vec<u32> = (0..200).map(|n| 3 + n * 7 % 250).collect();
    // 200 tokens are 12 full blocks of 16, and a tail.
    let cases = [("exact", ""), ("balanced", ""), ("exact", "tenant"), ("balanced", "tenant")];
    for cached in [0, 192, 192] {
        for (policy, salt) in cases {
            let answer = house.ask(start(policy, salt), &prompt).await.expect("an answer");
            assert_eq!(answer.finished.cached_tokens, cached, "{policy:?} with salt {salt:?}");
        }
    }
    assert_eq!(house.end().await, Vec::<String>::new(), "tasks that did not end");
}

/// The first event of an answer over gRPC, which tells the policy, or the refusal.
async fn accepted(server: &Server, policy: &str) -> Result<(String, u64), Error> {
    let client = GrpcConnector::new(GrpcOptions::default()).inference(&server.grpc)?;
    let (send, chunks) = mpsc::channel(1);
    send.send(PromptChunk::Text(text())).await.expect("a channel of one takes one");
    drop(send);
    let mut events = client.generate(&CallContext::new("test"), start(policy, ""), chunks).await?;
    let mut first = None;
    while let Some(event) = events.next().await {
        if let GenerateEvent::Accepted { prefill_policy, cached_tokens, .. } = event? {
            first = Some((prefill_policy, cached_tokens));
        }
    }
    Ok(first.expect("an answer begins with its head"))
}

fn text() -> String {
    long_prompt().chars().take(1_500).collect()
}

async fn complete(server: &Server, policy: Value) -> (u16, Value) {
    let body = json!({"prompt": text(), "max_tokens": 4, "temperature": 0, "ignore_eos": true, "prefill_policy": policy});
    post(&format!("{}/completions", server.openai), &body).await
}

/// Cached tokens of a completion that works.
async fn cached(server: &Server, policy: Value) -> u64 {
    let (status, answer) = complete(server, policy).await;
    assert_eq!(status, 200, "{answer}");
    let cached = answer.pointer("/usage/prompt_tokens_details/cached_tokens").and_then(Value::as_u64);
    cached.unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_default_is_of_the_deployment_and_the_choice_of_the_request() {
    let server = Server::up(&["--prefill-policy", "balanced", "--shards", "2"]);
    let text = include_str!("../../services/longshore/plans/smollm2-135m-instruct.json");
    let plan: HeadPlan = HeadBudgets::from_json(text, 30, 3).expect("the shipped plan").into();
    let balanced = PrefillPolicy::parse("balanced", Some(&plan)).expect("the policy is known").fingerprint();
    assert_eq!(accepted(&server, "").await.expect("an answer"), (balanced.clone(), 0));
    // What one door stored the other finds, under its name and as the default.
    let all = cached(&server, json!(null)).await;
    assert!(all >= 64, "{all} tokens were cached");
    assert_eq!(cached(&server, json!("balanced")).await, all);
    assert_eq!(cached(&server, json!(balanced)).await, all, "the canonical text is a name of it");
    assert_eq!(cached(&server, json!("exact")).await, 0, "approximate KV passed for exact");
    assert_eq!(cached(&server, json!("exact")).await, all);
    assert_eq!(accepted(&server, "exact").await.expect("an answer"), ("exact".to_owned(), all));
    let error = accepted(&server, "sparsest").await.expect_err("there is no such policy");
    assert_eq!((error.code, error.field.as_deref()), (Code::InvalidArgument, Some("prefill_policy")));
    lists_names(&error.message);
    let (status, answer) = complete(&server, json!("sparsest")).await;
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("prefill_policy")), "{answer}");
    lists_names(answer["error"]["message"].as_str().expect("an error has a message"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_a_policy_has_no_room_for_is_refused_with_the_remedy() {
    // Less than one block of this model.
    let small = ["--set", "prefill.local_kv_bytes=1048576", "--set", "prefill.put_buffer_bytes=1048576"];
    let server = Server::up(&small);
    let (status, answer) = complete(&server, json!("xattention")).await;
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("prompt")), "{answer}");
    let message = answer["error"]["message"].as_str().expect("an error has a message");
    assert!(message.contains("`prefill.local_kv_bytes`") && message.contains("`exact`"), "{message}");
    // These leave their oldest blocks to the shards.
    assert_eq!(complete(&server, json!("balanced")).await.0, 200);
    assert_eq!(complete(&server, json!("exact")).await.0, 200);
}

/// `balanced` with everything that makes a prompt of this length sparse.
const SPARSE: &str = "balanced:min_positions=256,sink=1,local=1,last_tiles=1";

/// Characters of a prompt that is longer than one stripe, which is 2,048 tokens.
const LONG_CHARACTERS: usize = 11_000;

/// Tokens of the answer to a long prompt, whose first part was asked about before when `cached`.
async fn answer(args: &[&str], cached: bool) -> (String, u64) {
    let server = Server::up(args);
    let prompt: String = long_prompt().chars().take(LONG_CHARACTERS).collect();
    let ask = |prompt: String, tokens: u32| {
        let body = json!({"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": true, "prefill_policy": SPARSE});
        let url = format!("{}/completions", server.openai);
        async move {
            let (status, answer) = post(&url, &body).await;
            assert_eq!(status, 200, "{answer}");
            let cached = answer.pointer("/usage/prompt_tokens_details/cached_tokens").and_then(Value::as_u64);
            (answer["choices"][0]["text"].as_str().unwrap_or_default().to_owned(), cached.unwrap_or(0))
        }
    };
    if cached {
        // Three quarters, so that a prefix of full blocks is there and a suffix is to be computed.
        ask(prompt.chars().take(LONG_CHARACTERS * 3 / 4).collect(), 1).await;
    }
    ask(prompt, 24).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sparse_suffix_over_a_cached_prefix_gives_the_tokens_of_a_cold_prompt() {
    let (expected, none) = answer(&["--set", "prefill.prefix=fetch"], false).await;
    assert_eq!(none, 0);
    let clusters: [&[&str]; 4] = [
        &["--set", "prefill.prefix=fetch"],
        &["--set", "prefill.prefix=ship"],
        &["--shards", "3", "--set", "prefill.prefix=ship", "--set", "model.stripe_blocks=4"],
        &["--processes", "--shards", "3", "--prefill", "1", "--decode", "1", "--set", "prefill.prefix=ship"],
    ];
    let small = ["--set", "model.stripe_blocks=4", "--set", "prefill.prefix=fetch"];
    let (of_small_stripes, _) = answer(&small, false).await;
    for args in clusters {
        let (found, cached) = answer(args, true).await;
        assert!(cached > 1_000, "{cached} tokens were cached, {args:?}");
        let expected = if args.contains(&"model.stripe_blocks=4") { &of_small_stripes } else { &expected };
        assert_eq!(found, *expected, "{args:?}");
    }
}

fn lists_names(message: &str) {
    for name in Policies::names() {
        assert!(message.contains(name), "{name} is not listed: {message}");
    }
}
