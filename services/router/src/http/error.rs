//! Errors as OpenAI's clients expect them: a status and `{"error": {message, type, param, code}}`.

use std::time::Duration;

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use longshore_fabric::{Code, Error as CallError};
use serde_json::{Value, json};

use super::json_response;
use crate::Error;

/// Status for a client that went away; nginx's, nobody reads it.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// One refused or failed HTTP request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    status: StatusCode,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
    retry_after: Option<Duration>,
}

impl ApiError {
    fn new(status: StatusCode, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self { status, code, param: None, message: message.into(), retry_after: None }
    }

    /// A field that can never work.
    pub(crate) fn invalid(param: impl Into<String>, problem: impl std::fmt::Display) -> Self {
        let param = param.into();
        let message = format!("`{param}` {problem}");
        Self { param: Some(param), ..Self::new(StatusCode::BAD_REQUEST, Some("invalid_value"), message) }
    }

    /// A field that is not offered.
    pub(crate) fn unsupported(param: &str, problem: &str) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::invalid(param, problem) }
    }

    /// A body that is no JSON.
    pub(crate) fn syntax(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, Some("invalid_json"), message)
    }

    /// A body beyond the limit.
    pub(crate) fn body_too_large(limit_bytes: u64) -> Self {
        let message = format!(
            "the request body is larger than {limit_bytes} bytes; hint: stream the prompt over gRPC, or raise \
             `router.http.body_max_bytes`"
        );
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, Some("request_too_large"), message)
    }

    /// Other bodies take all the room.
    pub(crate) fn no_room_for_body(retry_after: Duration) -> Self {
        let message = "too many request bodies are being read; hint: retry later, or raise `router.http.bodies_max_bytes`";
        Self {
            retry_after: Some(retry_after),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, Some("overloaded"), message)
        }
    }

    /// A body that does not arrive.
    pub(crate) fn body_stalled(waited: Duration) -> Self {
        let message = format!("the request body did not go on for {} ms", waited.as_millis());
        Self::new(StatusCode::REQUEST_TIMEOUT, Some("request_timeout"), message)
    }

    /// A body that broke off.
    pub(crate) fn body_broken(problem: &str) -> Self {
        let message = format!("the request body could not be read: {problem}");
        Self::new(StatusCode::BAD_REQUEST, Some("invalid_body"), message)
    }

    /// A model that is not served.
    pub(crate) fn unknown_model(name: &str, served: &str) -> Self {
        Self::from(CallError::from(Error::UnknownModel {
            name: name.escape_debug().to_string(),
            served: served.to_owned(),
        }))
    }

    /// A path that is not served.
    pub(crate) fn no_route(path: &str) -> Self {
        let message = format!("there is no `{}`; hint: try `/v1/chat/completions`", path.escape_debug());
        Self::new(StatusCode::NOT_FOUND, Some("not_found"), message)
    }

    /// A method that the path does not offer.
    pub(crate) fn no_method(method: &str, path: &str) -> Self {
        let message = format!("`{}` does not offer `{method}`", path.escape_debug());
        Self::new(StatusCode::METHOD_NOT_ALLOWED, Some("method_not_allowed"), message)
    }

    /// The same with another field, for errors that name a field of another protocol.
    pub(crate) fn rename_param(mut self, from: &str, to: &str) -> Self {
        if self.param.as_deref() == Some(from) {
            self.param = Some(to.to_owned());
        }
        self
    }

    /// The body, which a stream that already began sends as an event.
    pub(crate) fn body(&self) -> Value {
        json!({ "error": {
            "message": self.message, "type": self.kind(), "param": self.param, "code": self.code,
        }})
    }

    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            429 => "rate_limit_error",
            400..=498 => "invalid_request_error",
            _ => "server_error",
        }
    }
}

impl From<CallError> for ApiError {
    fn from(error: CallError) -> Self {
        let (status, code) = match error.code {
            Code::InvalidArgument | Code::Unimplemented => (StatusCode::BAD_REQUEST, Some("invalid_value")),
            Code::OutOfRange => (StatusCode::BAD_REQUEST, Some("context_length_exceeded")),
            Code::NotFound => (StatusCode::NOT_FOUND, Some("model_not_found")),
            Code::ResourceExhausted => (StatusCode::TOO_MANY_REQUESTS, Some("overloaded")),
            Code::FailedPrecondition => (StatusCode::SERVICE_UNAVAILABLE, Some("failed_precondition")),
            Code::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, Some("unavailable")),
            Code::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, Some("deadline_exceeded")),
            Code::Cancelled => {
                let status = StatusCode::from_u16(CLIENT_CLOSED_REQUEST).unwrap_or(StatusCode::BAD_REQUEST);
                (status, Some("cancelled"))
            }
            Code::DataLoss => (StatusCode::INTERNAL_SERVER_ERROR, Some("data_loss")),
            Code::Internal => (StatusCode::INTERNAL_SERVER_ERROR, None),
        };
        Self { status, code, param: error.field, message: error.message, retry_after: error.retry_after }
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        Self::from(CallError::from(error))
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = json_response(self.status, &self.body());
        if let Some(after) = self.retry_after {
            let headers = response.headers_mut();
            let seconds = after.as_secs_f64().ceil().max(1.0) as u64;
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
            headers.insert("retry-after-ms", HeaderValue::from(after.as_millis() as u64));
        }
        response
    }
}
