//! The real program over gRPC: answers event by event, and what its processes say of themselves.

use std::time::{Duration, Instant};

use futures::StreamExt;
use longshore_fabric::{CallContext, Connector, Error, GrpcConnector, GrpcOptions};
use longshore_proto::types::{Describe, Finished, GenerateEvent, GenerateStart, PromptChunk, Sampling};
use tokio::sync::mpsc;

/// Greedy answer to a text with every event shown to `seen` as it comes: vocabulary ids and totals.
pub async fn generate(
    url: &str,
    prompt: &str,
    max_tokens: u32,
    seen: impl FnMut(&GenerateEvent),
) -> Result<(Vec<u32>, Finished), Error> {
    generate_by("", url, prompt, max_tokens, seen).await
}

/// The same under a prefill policy of one's own.
pub async fn generate_by(
    policy: &str,
    url: &str,
    prompt: &str,
    max_tokens: u32,
    mut seen: impl FnMut(&GenerateEvent),
) -> Result<(Vec<u32>, Finished), Error> {
    let client = GrpcConnector::new(GrpcOptions::default()).inference(url)?;
    let sampling =
        Sampling { temperature: 0.0, max_tokens: Some(max_tokens), ignore_eos: true, ..Sampling::default() };
    let prefill_policy = policy.to_owned();
    let start = GenerateStart { sampling, progress: true, prefill_policy, ..GenerateStart::default() };
    let (send, chunks) = mpsc::channel(1);
    send.send(PromptChunk::Text(prompt.to_owned())).await.expect("a channel of one takes one");
    drop(send);
    let mut events = client.generate(&CallContext::new(""), start, chunks).await?;
    let mut tokens = Vec::new();
    while let Some(event) = events.next().await {
        let event = event?;
        seen(&event);
        match event {
            GenerateEvent::Tokens(piece) => tokens.extend(piece.token_ids),
            GenerateEvent::Finished(finished) => return Ok((tokens, finished)),
            GenerateEvent::Accepted { .. } | GenerateEvent::Progress { .. } => {}
        }
    }
    panic!("the answer ended without its last event");
}

/// Waits until the process behind `url` says who it is, and is another start of it than `before`.
pub async fn await_start(url: &str, before: Option<u64>, within: Duration) -> Describe {
    let began = Instant::now();
    loop {
        // A new connection each time: an old one would wait for its own backoff.
        let client = GrpcConnector::new(GrpcOptions::default()).describer(url).expect("an address");
        let ctx = CallContext::new("test").with_timeout(Duration::from_secs(2));
        let last = match client.describe(&ctx).await {
            Ok(describe) if Some(describe.this.incarnation) != before => return describe,
            other => other,
        };
        assert!(began.elapsed() < within, "{url} did not start within {within:?}, last: {last:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
