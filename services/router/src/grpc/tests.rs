//! The router over real gRPC, in front of fakes.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::StreamExt as _;
use longshore_fabric::{
    CallContext, Code, Connector as _, Describer, GrpcConnector, GrpcOptions, Inference,
    server::{ServerOptions, Services, serve},
};
use longshore_proto::types::{GenerateStart, PromptChunk, Sampling};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::serve_on;
use crate::fixture::{Fixture, Options, Script, collect, generated, prompt_ids};

/// A fixture behind a gRPC listener.
struct Server {
    fixture: Fixture,
    client: Arc<dyn Inference>,
    describer: Arc<dyn Describer>,
    _stop: DropGuard,
}

async fn server() -> Server {
    let fixture = Fixture::new(Options::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let services = serve_on(Services::new(ServerOptions::default()), &fixture.router);
    let stop = CancellationToken::new();
    let shutdown = stop.clone();
    fixture.tasks.spawn("grpc", async move { serve(listener, services, shutdown).await.unwrap() });
    let connector = GrpcConnector::new(GrpcOptions::default());
    let client = connector.inference(&address).unwrap();
    let describer = connector.describer(&address).unwrap();
    Server { fixture, client, describer, _stop: stop.drop_guard() }
}

fn start(max_tokens: u32) -> GenerateStart {
    let sampling = Sampling { max_tokens: Some(max_tokens), ..Sampling::default() };
    GenerateStart { sampling, ..GenerateStart::default() }
}

async fn prompt(chunks: Vec<PromptChunk>) -> mpsc::Receiver<PromptChunk> {
    let (sender, receiver) = mpsc::channel(chunks.len().max(1));
    for chunk in chunks {
        sender.send(chunk).await.unwrap();
    }
    receiver
}

#[tokio::test]
async fn answers_as_the_local_lane_does() {
    let server = server().await;
    let ctx = CallContext::new("over-grpc");
    let chunks = prompt(vec![PromptChunk::Tokens(prompt_ids(150)), PromptChunk::Tokens(vec![9; 50])]).await;
    let answer = collect(server.client.generate(&ctx, start(30), chunks).await.unwrap()).await.unwrap();
    let tokens = [prompt_ids(150), vec![9; 50]].concat();
    assert_eq!(answer.ids, generated(&tokens, 30));
    assert_eq!(server.fixture.decoders[0].calls()[0].request_id, "over-grpc");
    let models = server.client.list_models(&ctx).await.unwrap();
    assert_eq!(models, server.describer.describe(&ctx).await.unwrap().models);
}

#[tokio::test]
async fn a_prompt_without_end_is_refused() {
    let server = server().await;
    let (sender, receiver) = mpsc::channel(1);
    // Only the refusal ends it: how much is under way until it comes is up to the windows and to who runs first.
    let feed = async move { while sender.send(PromptChunk::Tokens(vec![7; 10_000])).await.is_ok() {} };
    let ctx = CallContext::new("");
    let ask = async {
        match server.client.generate(&ctx, start(1), receiver).await {
            Ok(events) => collect(events).await.unwrap_err(),
            Err(error) => error,
        }
    };
    let both = async { tokio::join!(feed, ask) };
    let ended = tokio::time::timeout(Duration::from_secs(60), both).await;
    let ((), error) = ended.expect("the prompt is read without end");
    assert_eq!((error.code, error.field.as_deref()), (Code::OutOfRange, Some("prompt")), "{error}");
    assert!(error.message.contains("--max-context-tokens"), "{error}");
}

#[tokio::test]
async fn errors_name_their_field() {
    let server = server().await;
    let ctx = CallContext::new("");
    let bad = GenerateStart { model: "other".to_owned(), ..GenerateStart::default() };
    let text = vec![PromptChunk::Text("hello".to_owned())];
    let error = match server.client.generate(&ctx, bad, prompt(text).await).await {
        Ok(events) => collect(events).await.unwrap_err(),
        Err(error) => error,
    };
    assert_eq!((error.code, error.field.as_deref()), (Code::NotFound, Some("model")));
    let bad = GenerateStart { prefill_policy: "sparsest".to_owned(), ..GenerateStart::default() };
    let text = vec![PromptChunk::Text("hello".to_owned())];
    let error = match server.client.generate(&ctx, bad, prompt(text).await).await {
        Ok(events) => collect(events).await.unwrap_err(),
        Err(error) => error,
    };
    assert_eq!((error.code, error.field.as_deref()), (Code::InvalidArgument, Some("prefill_policy")));
    assert!(crate::Policies::names().all(|name| error.message.contains(name)), "{error}");
    let mixed = vec![PromptChunk::Text("a".to_owned()), PromptChunk::Tokens(vec![1])];
    let events = server.client.generate(&ctx, start(1), prompt(mixed).await).await;
    let error = match events {
        Ok(events) => collect(events).await.unwrap_err(),
        Err(error) => error,
    };
    assert_eq!((error.code, error.field.as_deref()), (Code::InvalidArgument, Some("prompt")));
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_the_workers() {
    let server = server().await;
    server.fixture.decoders[0].script(Script::HangAfter(2));
    let ctx = CallContext::new("");
    let chunks = prompt(vec![PromptChunk::Tokens(prompt_ids(10))]).await;
    let mut events = server.client.generate(&ctx, start(9), chunks).await.unwrap();
    for _ in 0..3 {
        events.next().await.unwrap().unwrap();
    }
    drop(events);
    let decoder = &server.fixture.decoders[0];
    Fixture::eventually("the end of the decode", || decoder.dropped.load(Ordering::SeqCst) == 1).await;
    Fixture::eventually("room for others", || server.fixture.metrics.in_flight.get() == 0).await;
}
