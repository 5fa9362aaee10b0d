//! Distribution changes nothing: the same greedy tokens from one process, from shards and workers over gRPC, cold and cached.

use longshore_tests::server::{Server, complete, long_prompt};
use serde_json::{Value, json};

const TOKENS: u32 = 64;

fn cached(usage: &Value) -> u64 {
    usage.pointer("/prompt_tokens_details/cached_tokens").and_then(Value::as_u64).unwrap_or(0)
}

/// Cold, then cached, then cached with the prompt cut shorter so that only its beginning is shared.
async fn answers(server: &Server) -> (String, String) {
    let prompt = json!(long_prompt());
    let (cold, usage) = complete(server, &prompt, TOKENS).await;
    let tokens = usage["prompt_tokens"].as_u64().expect("usage counts");
    assert!(tokens >= 3000, "the prompt has only {tokens} tokens");
    assert_eq!(cached(&usage), 0, "the first request finds nothing cached");
    let (warm, usage) = complete(server, &prompt, TOKENS).await;
    assert!(cached(&usage) >= (tokens - 1) / 64 * 64, "{usage}: every full block is cached");
    (cold, warm)
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_do_not_depend_on_shards_workers_or_cache() {
    let one = Server::up(&[]);
    let (expected, warm) = answers(&one).await;
    assert_eq!(expected, warm, "one process, cached prefix");
    drop(one);
    let clusters: [&[&str]; 3] = [
        &["--shards", "4", "--set", "prefill.chunk_tokens=192"],
        &["--processes", "--shards", "1", "--prefill", "1", "--decode", "1"],
        &["--processes", "--shards", "4", "--prefill", "1", "--decode", "2"],
    ];
    for args in clusters {
        let server = Server::up(args);
        let (cold, warm) = answers(&server).await;
        assert_eq!(cold, expected, "{args:?}, cold");
        assert_eq!(warm, expected, "{args:?}, cached");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn small_stripes_spread_over_every_shard_and_still_change_nothing() {
    let small = ["--set", "model.stripe_blocks=4"];
    let one = Server::up(&small);
    let (expected, _) = answers(&one).await;
    drop(one);
    let args: Vec<&str> =
        ["--processes", "--shards", "4", "--decode", "2"].into_iter().chain(small).collect();
    let server = Server::up(&args);
    let (cold, warm) = answers(&server).await;
    assert_eq!(cold, expected, "cold");
    assert_eq!(warm, expected, "cached");
    // A longer prompt with the same beginning: the rest is computed while attending over all four shards.
    let longer = json!(long_prompt() + "\nIn short, the most important points are:");
    let (_, usage) = complete(&server, &longer, 8).await;
    assert!(cached(&usage) > 2900, "{usage}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_requests_at_once_get_what_they_get_alone() {
    let server = Server::up(&["--shards", "2"]);
    let prompts =
        [json!("The capital of France is"), json!("Once upon a time there was a lighthouse keeper who")];
    let mut alone = Vec::new();
    for prompt in &prompts {
        alone.push(complete(&server, prompt, 48).await.0);
    }
    assert!(alone[0].contains("Paris"), "{:?}", alone[0]);
    let (first, second) =
        tokio::join!(complete(&server, &prompts[0], 48), complete(&server, &prompts[1], 48));
    assert_eq!([first.0, second.0].as_slice(), alone.as_slice());
}
