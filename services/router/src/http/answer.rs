//! One generation over HTTP: reads, understands, asks the router, and answers whole or as a stream.

use std::convert::Infallible;

use axum::{
    extract::Request,
    http::StatusCode,
    response::{
        IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
};
use futures::{Stream, StreamExt as _};
use longshore_blocks::EXACT_PREFILL;
use longshore_fabric::{BoxStream, CallContext, Inference};
use longshore_proto::types::GenerateEvent;
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::{
    App,
    body::ReadBody,
    chat::ChatForm,
    completions::CompletionsForm,
    error::ApiError,
    events::{Events, Form, Head},
    json_response,
    request::{self, ApiRequest},
    unix_secs,
};
use crate::Error;

/// Bodies above this size are parsed on a blocking thread.
const INLINE_MAX_BYTES: usize = 128 << 10;

/// Which of OpenAI's two forms a request and its answer have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

/// Answers a request. Dropping the future, or the response's body, cancels everything that was started for it.
pub(crate) async fn answer(
    app: &App,
    endpoint: Endpoint,
    ctx: CallContext,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let read = app.bodies.read(&parts.headers, body).await?;
    let (parsed, room) = parse(app, endpoint, read).await?;
    let (stream, include_usage) = (parsed.stream, parsed.include_usage);
    let logprobs = parsed.start.sampling.logprobs.is_some();
    let mut events = start(app, &ctx, parsed).await.map_err(|error| in_form(endpoint, error))?;
    // The first event tells whether the prompt fits and is admitted; only then is the status known.
    let first = events.next().await;
    drop(room);
    let policy = match first {
        Some(Ok(GenerateEvent::Accepted { prefill_policy, .. })) => prefill_policy,
        Some(Ok(_)) | None => {
            return Err(Error::Internal("the answer began without its head".to_owned()).into());
        }
        Some(Err(error)) => return Err(in_form(endpoint, error.into())),
    };
    let head = Head {
        id: ctx.request_id,
        created: unix_secs(),
        model: app.router.model().name.clone(),
        fingerprint: fingerprint(app, &policy),
        include_usage,
        logprobs,
        router: app.router.clone(),
    };
    match endpoint {
        Endpoint::Completions => respond(app, CompletionsForm::new(head), events, stream).await,
        Endpoint::Chat => respond(app, ChatForm::new(head), events, stream).await,
    }
}

/// Gives the body's room back with what was made of it.
async fn parse(
    app: &App,
    endpoint: Endpoint,
    read: ReadBody,
) -> Result<(ApiRequest, Option<OwnedSemaphorePermit>), ApiError> {
    let inline = read.bytes.len() <= INLINE_MAX_BYTES;
    // On a blocking thread this goes on when the client hangs up, so it owns the body's room.
    let work = move || {
        let ReadBody { bytes, room } = read;
        request::parse(&bytes, endpoint).map(|parsed| (parsed, room))
    };
    if inline {
        return work();
    }
    let joined = app.router.tasks().tracker().spawn_blocking(work).await;
    joined.map_err(|error| Error::Internal(format!("parsing failed: {error}")))?
}

/// Hands the prompt over; it is queued whole, because it is in memory already.
async fn start(
    app: &App,
    ctx: &CallContext,
    request: ApiRequest,
) -> Result<BoxStream<GenerateEvent>, ApiError> {
    let (sender, receiver) = mpsc::channel(request.prompt.len().max(1));
    for chunk in request.prompt {
        sender.try_send(chunk).map_err(|_| Error::Internal("the prompt queue is full".to_owned()))?;
    }
    drop(sender);
    Ok(app.router.generate(ctx, request.start, receiver).await?)
}

/// Errors of the router name `prompt`, which chat requests call `messages`.
fn in_form(endpoint: Endpoint, error: ApiError) -> ApiError {
    match endpoint {
        Endpoint::Completions => error,
        Endpoint::Chat => error.rename_param("prompt", "messages"),
    }
}

/// Names what answers: equal fingerprints and seeds give equal answers.
fn fingerprint(app: &App, policy: &str) -> String {
    let deployment = app.router.model().deployment;
    // Approximate KV gives other answers.
    let digest = match policy {
        EXACT_PREFILL => *deployment.as_bytes(),
        policy => *deployment.namespace(policy, b"").as_bytes(),
    };
    let hex: String = digest[..6].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("fp_{hex}")
}

async fn respond<F: Form>(
    app: &App,
    form: F,
    events: BoxStream<GenerateEvent>,
    stream: bool,
) -> Result<Response, ApiError> {
    if stream {
        let interval = std::time::Duration::from_millis(app.router.config().http.keep_alive_ms);
        let keep_alive = KeepAlive::new().interval(interval).text("waiting");
        return Ok(Sse::new(server_events(form, events)).keep_alive(keep_alive).into_response());
    }
    Ok(json_response(StatusCode::OK, &whole(form, events).await?))
}

fn server_events<F: Form>(
    form: F,
    events: BoxStream<GenerateEvent>,
) -> impl Stream<Item = Result<Event, Infallible>> {
    Events::new(form, events).map(|data| Ok(Event::default().data(data)))
}

async fn whole<F: Form>(mut form: F, mut events: BoxStream<GenerateEvent>) -> Result<Value, ApiError> {
    while let Some(event) = events.next().await {
        match event? {
            GenerateEvent::Tokens(tokens) => form.collect(tokens),
            GenerateEvent::Finished(finished) => return Ok(form.whole(&finished)),
            GenerateEvent::Accepted { .. } | GenerateEvent::Progress { .. } => {}
        }
    }
    Err(Error::Internal("the answer ended without a result".to_owned()).into())
}
