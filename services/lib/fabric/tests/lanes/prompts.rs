//! Long prompts: a million tokens pass, and a refusal ends them early without holding them.

use std::{sync::atomic::Ordering, time::Duration};

use futures::StreamExt;
use longshore_fabric::{CallContext, Code, Error, server::ServerOptions};
use longshore_proto::types::{GenerateEvent, GenerateStart, PromptChunk};
use tokio::sync::mpsc;

use super::{
    fake::{FakeRouter, PROMPT_TOKENS_MAX},
    house::{House, LANES},
};

/// Feeds `chunks` and returns the last event or the error, and how many chunks were taken.
async fn generate(house: &House, chunks: Vec<PromptChunk>) -> (Result<GenerateEvent, Error>, usize) {
    let context = CallContext::new("long").with_timeout(Duration::from_secs(20));
    let start = GenerateStart { request_id: "long".to_owned(), ..GenerateStart::default() };
    let (sender, prompt) = mpsc::channel(2);
    let front = house.front();
    let call = async {
        let mut events = front.generate(&context, start, prompt).await?;
        events.next().await.expect("a stream has an event")
    };
    let feed = async move {
        let mut taken = 0;
        for chunk in chunks {
            if sender.send(chunk).await.is_err() {
                break;
            }
            taken += 1;
        }
        taken
    };
    tokio::join!(call, feed)
}

fn router(refuse_in_stream: bool) -> FakeRouter {
    FakeRouter { refuse_in_stream, ..FakeRouter::default() }
}

#[tokio::test]
async fn a_million_tokens_are_refused_early() {
    for lane in LANES {
        for in_stream in [false, true] {
            let house = House::with(lane, router(in_stream), ServerOptions::front()).await;
            let chunks = vec![PromptChunk::Tokens(vec![40_000; 1_000]); 1_000];
            let (answer, taken) = generate(&house, chunks).await;
            let error = answer.unwrap_err();
            assert_eq!((error.code, error.field.as_deref()), (Code::OutOfRange, Some("tokens")), "{lane:?}");
            let read = house.router.read.load(Ordering::SeqCst) as usize;
            assert!(read <= PROMPT_TOKENS_MAX + 1_000, "read {read}");
            // What was taken and not read lies in windows and queues, which are far smaller than the prompt.
            assert!(taken * 1_000 < PROMPT_TOKENS_MAX + 400_000, "{lane:?} took {taken} chunks");
        }
    }
}

#[tokio::test]
async fn large_chunks_are_cut_to_fit() {
    for lane in LANES {
        let house = House::with(lane, router(true), ServerOptions::front()).await;
        let (answer, _) = generate(&house, vec![PromptChunk::Tokens(vec![40_000; PROMPT_TOKENS_MAX])]).await;
        let GenerateEvent::Accepted { prompt_tokens, request_id, .. } = answer.unwrap() else {
            panic!("the first event accepts")
        };
        assert_eq!((prompt_tokens, request_id.as_str()), (PROMPT_TOKENS_MAX as u64, "long"), "{lane:?}");
        let (answer, _) = generate(&house, vec![PromptChunk::Text("é".repeat(5 << 20))]).await;
        assert_eq!(answer.unwrap_err().code, Code::OutOfRange, "{lane:?}");
    }
}
