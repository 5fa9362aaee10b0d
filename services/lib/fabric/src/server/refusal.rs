//! Messages that gRPC refuses before a service sees them. Tonic calls what cannot be decoded an internal error; it is the
//! caller's, so it is said anew here, with the field and a remedy.

use http::Response;
use tonic::{Code as Tonic, Status, body::Body};

use crate::{
    Code, Error,
    status::{from_status, to_status},
};

/// How Prost begins the reason why it cannot decode; the path of the field follows, innermost message first.
const UNDECODABLE: &str = "failed to decode Protobuf message: ";
/// What Tonic says of a stream that ended inside a message.
const CUT_SHORT: &str = "Unexpected EOF decoding stream.";
/// How Tonic begins its refusal of a message above the limit; the two numbers follow.
const TOO_LONG: &str = "Error, decoded message length too large: found ";
/// The field when nothing says which one.
const WHOLE: &str = "message";

/// The error of a request stream that failed.
pub(super) fn from_request(status: &Status) -> Error {
    restate(status).unwrap_or_else(|| from_status(status))
}

/// Says anew what Tonic answered by itself; every other response passes untouched.
pub(super) fn reword(response: Response<Body>) -> Response<Body> {
    // Only a response without messages has its status among the headers.
    if !response.headers().contains_key(Status::GRPC_STATUS) {
        return response;
    }
    match Status::from_header_map(response.headers()).as_ref().and_then(restate) {
        Some(error) => to_status(&error).into_http(),
        None => response,
    }
}

/// The caller's fault that `status` means, if it is one that Tonic found. Our own errors have details, and may quote an
/// answer of a peer that we could not decode: that is no fault of the caller.
fn restate(status: &Status) -> Option<Error> {
    if !status.details().is_empty() {
        return None;
    }
    match (status.code(), status.message()) {
        (Tonic::Internal, CUT_SHORT) => {
            Some(Error::invalid(WHOLE, "is cut short: the stream ended inside it; hint: send all its bytes"))
        }
        (Tonic::Internal, message) => message.strip_prefix(UNDECODABLE).map(undecodable),
        (Tonic::OutOfRange, message) => message.strip_prefix(TOO_LONG).and_then(too_long),
        _ => None,
    }
}

fn undecodable(reason: &str) -> Error {
    let (field, reason) = locate(reason);
    if reason.starts_with("invalid string value") {
        return Error::invalid(field, "is not valid UTF-8; hint: do not split a character between messages");
    }
    let remedy = "hint: encode it with the protos of this version, which reflection serves";
    Error::invalid(field, format!("cannot be decoded ({reason}); {remedy}"))
}

/// Splits `TextChunk.text: GenerateRequest.chunk: why` into `chunk.text` and `why`.
fn locate(reason: &str) -> (String, &str) {
    let (mut path, mut rest) = (Vec::new(), reason);
    while let Some((field, after)) =
        rest.split_once(": ").and_then(|(step, after)| Some((field(step)?, after)))
    {
        path.push(field);
        rest = after;
    }
    path.reverse();
    (if path.is_empty() { WHOLE.to_owned() } else { path.join(".") }, rest)
}

/// The field of `Message.field`.
fn field(step: &str) -> Option<&str> {
    let (message, field) = step.split_once('.')?;
    let is_message = !message.is_empty() && message.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let is_field = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_');
    (is_message && !field.is_empty() && field.bytes().all(is_field)).then_some(field)
}

fn too_long(numbers: &str) -> Option<Error> {
    let (found, limit) = numbers.strip_suffix(" bytes")?.split_once(" bytes, the limit is: ")?;
    let remedy = "hint: send less in one message";
    let text = format!("`{WHOLE}` has {found} bytes, the limit is {limit} bytes; {remedy}");
    Some(Error::new(Code::OutOfRange, text).with_field(WHOLE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_dotted_fields() {
        let check = |reason, field, rest| assert_eq!(locate(reason), (String::from(field), rest), "{reason}");
        check("TextChunk.text: GenerateRequest.chunk: invalid varint", "chunk.text", "invalid varint");
        check("A.a_1: B.b: C.c: invalid tag value: 0", "c.b.a_1", "invalid tag value: 0");
        check(
            "invalid string value: data is not UTF-8 encoded",
            "message",
            "invalid string value: data is not UTF-8 encoded",
        );
        for odd in ["", ": ", ".: x", "A.: x", ".a: x", "A.B: x", "A b.c: x", "A.a"] {
            check(odd, "message", odd);
        }
    }

    #[test]
    fn limits_are_named() {
        let status = Status::out_of_range(format!("{TOO_LONG}9 bytes, the limit is: 4 bytes"));
        let error = from_request(&status);
        assert_eq!((error.code, error.field.as_deref()), (Code::OutOfRange, Some("message")));
        assert!(error.message.contains("has 9 bytes, the limit is 4 bytes; hint: "), "{error}");
        assert_eq!(restate(&Status::out_of_range(format!("{TOO_LONG}many"))), None);
    }

    #[test]
    fn other_statuses_stay_as_they_are() {
        for status in [
            Status::internal("the service panicked"),
            Status::unavailable(format!("{UNDECODABLE}A.a: x")),
            Status::internal("protocol error: received message with invalid compression flag"),
            to_status(&Error::new(Code::Internal, format!("{UNDECODABLE}A.a: an answer of a peer"))),
        ] {
            assert_eq!(from_request(&status), from_status(&status));
            let response = reword(status.clone().into_http());
            let after = Status::from_header_map(response.headers()).unwrap();
            assert_eq!((after.code(), after.message()), (status.code(), status.message()));
        }
    }

    #[test]
    fn a_reworded_response_carries_the_field() {
        let status = Status::internal(format!("{UNDECODABLE}TokenizeRequest.text: buffer underflow"));
        let response = reword(status.into_http());
        let error = from_status(&Status::from_header_map(response.headers()).unwrap());
        assert_eq!((error.code, error.field.as_deref()), (Code::InvalidArgument, Some("text")));
        assert!(error.message.starts_with("`text` cannot be decoded (buffer underflow); hint: "), "{error}");
    }
}
