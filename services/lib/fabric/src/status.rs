//! [`Error`] as a gRPC status and back: code, message, and the details `BadRequest`, `RetryInfo` and `ErrorInfo`.
//! For gRPC adapters only; service logic never sees a status.

use std::{collections::HashMap, error::Error as _};

use tonic::Status;
use tonic_types::{ErrorDetails, StatusExt};

use crate::{Code, Error};

/// Domain of every `ErrorInfo`.
pub const ERROR_DOMAIN: &str = "longshore.dev";

/// The status that carries `error` to a client.
pub fn to_status(error: &Error) -> Status {
    let mut details = ErrorDetails::new();
    details.set_error_info(reason(error.code), ERROR_DOMAIN, HashMap::new());
    if let Some(field) = &error.field {
        details.add_bad_request_violation(field, &error.message);
    }
    if let Some(after) = error.retry_after {
        details.set_retry_info(Some(after));
    }
    Status::with_error_details(to_tonic(error.code), &error.message, details)
}

/// The error that a status means. A status that our side made because the connection broke is `Unavailable`.
pub fn from_status(status: &Status) -> Error {
    if broken_connection(status) {
        return Error::new(Code::Unavailable, format!("the connection broke: {}", status.message()));
    }
    let details = status.get_error_details();
    let field = details.bad_request().and_then(|bad| bad.field_violations.first());
    Error {
        code: from_tonic(status.code()),
        message: status.message().to_owned(),
        field: field.map(|violation| violation.field.clone()),
        retry_after: details.retry_info().and_then(|info| info.retry_delay),
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        to_status(&error)
    }
}

/// Statuses with a source were made on this side; codes that a transport fault leaves vague mean a broken connection.
fn broken_connection(status: &Status) -> bool {
    use tonic::Code as Tonic;
    status.source().is_some() && matches!(status.code(), Tonic::Unknown | Tonic::Internal | Tonic::Cancelled)
}

/// The code of gRPC with this number, as failed items in streams carry it; `None` for 0 and unknown numbers.
pub fn code_from_number(number: u32) -> Option<Code> {
    let number = i32::try_from(number).ok().filter(|number| (1..=16).contains(number))?;
    Some(from_tonic(tonic::Code::from_i32(number)))
}

/// Number of the code in gRPC, never 0.
pub fn code_number(code: Code) -> u32 {
    to_tonic(code) as u32
}

fn to_tonic(code: Code) -> tonic::Code {
    match code {
        Code::Cancelled => tonic::Code::Cancelled,
        Code::InvalidArgument => tonic::Code::InvalidArgument,
        Code::DeadlineExceeded => tonic::Code::DeadlineExceeded,
        Code::NotFound => tonic::Code::NotFound,
        Code::ResourceExhausted => tonic::Code::ResourceExhausted,
        Code::FailedPrecondition => tonic::Code::FailedPrecondition,
        Code::OutOfRange => tonic::Code::OutOfRange,
        Code::Unimplemented => tonic::Code::Unimplemented,
        Code::Internal => tonic::Code::Internal,
        Code::Unavailable => tonic::Code::Unavailable,
        Code::DataLoss => tonic::Code::DataLoss,
    }
}

fn from_tonic(code: tonic::Code) -> Code {
    match code {
        tonic::Code::Cancelled => Code::Cancelled,
        tonic::Code::InvalidArgument => Code::InvalidArgument,
        tonic::Code::DeadlineExceeded => Code::DeadlineExceeded,
        tonic::Code::NotFound => Code::NotFound,
        tonic::Code::ResourceExhausted => Code::ResourceExhausted,
        tonic::Code::FailedPrecondition
        | tonic::Code::AlreadyExists
        | tonic::Code::PermissionDenied
        | tonic::Code::Unauthenticated => Code::FailedPrecondition,
        tonic::Code::OutOfRange => Code::OutOfRange,
        tonic::Code::Unimplemented => Code::Unimplemented,
        tonic::Code::Unavailable | tonic::Code::Aborted => Code::Unavailable,
        tonic::Code::DataLoss => Code::DataLoss,
        tonic::Code::Ok | tonic::Code::Unknown | tonic::Code::Internal => Code::Internal,
    }
}

fn reason(code: Code) -> &'static str {
    match code {
        Code::Cancelled => "CANCELLED",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
    }
}

#[cfg(test)]
mod tests;
