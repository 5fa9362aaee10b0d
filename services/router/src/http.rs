//! OpenAI-compatible HTTP: routes, request names, and what is the same for every answer. Knows nothing of workers.

mod answer;
mod body;
mod chat;
mod completions;
mod error;
mod events;
mod fields;
mod request;
mod serve;
mod stall;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use axum::{
    Extension,
    extract::{Path, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use longshore_fabric::CallContext;
use serde_json::{Value, json};

use crate::{Router, service::check::usable_request_id};
use answer::Endpoint;
use body::Bodies;
use error::ApiError;

pub use serve::serve;

/// Header that names a request, in and out.
const REQUEST_ID: &str = "x-request-id";

/// What every handler needs.
#[derive(Debug, Clone)]
pub(crate) struct App {
    router: Router,
    bodies: Arc<Bodies>,
    started_secs: u64,
}

/// Name of a request, for its answer's header and for logs.
#[derive(Debug, Clone)]
struct RequestId(String);

/// The routes of the OpenAI HTTP listener.
pub fn app(router: Router) -> axum::Router {
    let bodies = Arc::new(Bodies::new(&router.config().http));
    let app = App { router, bodies, started_secs: unix_secs() };
    axum::Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/health", get(health))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(middleware::from_fn_with_state(app.clone(), name_request))
        .with_state(app)
}

/// Seconds since the epoch, as OpenAI's `created` counts them.
fn unix_secs() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

/// Takes over the client's name for the request when it is fit for logs and headers, else makes one.
async fn name_request(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let given = request.headers().get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let id = given.filter(|id| usable_request_id(id)).map_or_else(|| app.router.request_id(), str::to_owned);
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = next.run(request).await;
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

async fn completions(
    State(app): State<App>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    answer::answer(&app, Endpoint::Completions, context(id, request.headers()), request).await
}

async fn chat(
    State(app): State<App>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    answer::answer(&app, Endpoint::Chat, context(id, request.headers()), request).await
}

async fn models(State(app): State<App>) -> Response {
    json_response(StatusCode::OK, &json!({ "object": "list", "data": [model_card(&app)] }))
}

async fn model(State(app): State<App>, Path(id): Path<String>) -> Result<Response, ApiError> {
    if id != app.router.model().name {
        return Err(ApiError::unknown_model(&id, &app.router.model().name));
    }
    Ok(json_response(StatusCode::OK, &model_card(&app)))
}

/// A model as OpenAI describes it, with the context length as vLLM adds it.
fn model_card(app: &App) -> Value {
    let model = app.router.model();
    json!({
        "id": model.name, "object": "model", "created": app.started_secs, "owned_by": "longshore",
        "root": model.name, "parent": null, "max_model_len": model.max_context_tokens,
    })
}

/// Whether this router can answer right now. For load balancers; liveness has its own listener.
async fn health(State(app): State<App>) -> Response {
    let (status, state) = match (app.router.draining(), app.router.missing_role()) {
        (true, _) => (StatusCode::SERVICE_UNAVAILABLE, json!({ "status": "draining" })),
        (false, Some(role)) => {
            (StatusCode::SERVICE_UNAVAILABLE, json!({ "status": "waiting", "missing": role.as_str() }))
        }
        (false, None) => (StatusCode::OK, json!({ "status": "ok" })),
    };
    json_response(status, &state)
}

async fn no_route(request: Request) -> ApiError {
    ApiError::no_route(request.uri().path())
}

async fn no_method(request: Request) -> ApiError {
    ApiError::no_method(request.method().as_str(), request.uri().path())
}

/// The context of a call that came over HTTP. Its token fires when the handler's future is dropped, through the answer
/// stream that it owns.
fn context(id: RequestId, headers: &HeaderMap) -> CallContext {
    let traceparent = headers.get("traceparent").and_then(|value| value.to_str().ok());
    let traceparent = traceparent.filter(|text| is_traceparent(text)).map(str::to_owned);
    CallContext { traceparent, ..CallContext::new(id.0) }
}

/// `version-trace-parent-flags` of W3C Trace Context, lower-case hex.
fn is_traceparent(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    let hex = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    let lengths: Vec<usize> = parts.iter().map(|part| part.len()).collect();
    lengths == [2, 32, 16, 2] && parts.iter().all(|part| hex(part)) && parts[0] != "ff"
}

fn json_response(status: StatusCode, value: &Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}
