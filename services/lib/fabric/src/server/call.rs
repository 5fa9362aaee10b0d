//! One incoming call: its context from the metadata, and its place in the count that a drain waits for.

use std::{str::FromStr, time::Duration};

use longshore_proto::types::validate_request_id;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, metadata::MetadataMap};

use crate::{CallContext, Error, Lane, lane::Hop};

/// Metadata keys that travel with every call.
pub(crate) const REQUEST_ID: &str = "x-request-id";
pub(crate) const TRACEPARENT: &str = "traceparent";
const TIMEOUT: &str = "grpc-timeout";

/// What all services of one listener share.
#[derive(Debug, Clone, Default)]
pub(super) struct Desk {
    /// Calls under way.
    pub(super) calls: TaskTracker,
    /// Fires when the drain starts.
    pub(super) draining: CancellationToken,
}

impl Desk {
    /// Opens the call that `request` asks for.
    pub(super) fn enter<T>(&self, request: &Request<T>) -> Result<Hop, Error> {
        self.enter_with(request.metadata())
    }

    /// Opens the call that came with `metadata`.
    pub(super) fn enter_with(&self, metadata: &MetadataMap) -> Result<Hop, Error> {
        let context = context(metadata)?;
        Ok(Hop::new(&context).over(Lane::Grpc).holding(self.calls.token()))
    }
}

fn context(metadata: &MetadataMap) -> Result<CallContext, Error> {
    let mut context = CallContext::new(text(metadata, REQUEST_ID)?.unwrap_or_default());
    validate_request_id(&context.request_id).map_err(|fault| Error::invalid(REQUEST_ID, fault))?;
    if let Some(timeout) = text(metadata, TIMEOUT)? {
        context = context.with_timeout(parse_timeout(timeout)?);
    }
    // A trace context that is malformed starts a new trace, as its specification asks.
    let traceparent = text(metadata, TRACEPARENT).ok().flatten();
    context.traceparent = traceparent.filter(|value| is_traceparent(value)).map(str::to_owned);
    Ok(context)
}

fn text<'a>(metadata: &'a MetadataMap, key: &str) -> Result<Option<&'a str>, Error> {
    let value = metadata.get(key).map(|value| value.to_str());
    value.transpose().map_err(|_| Error::invalid(key, "must be printable ASCII"))
}

/// `TimeoutValue TimeoutUnit` of the gRPC protocol: at most 8 digits and one of `H M S m u n`.
fn parse_timeout(text: &str) -> Result<Duration, Error> {
    let refuse = || {
        Error::invalid(TIMEOUT, format!("is `{text}`, must be up to 8 digits and one of H, M, S, m, u, n"))
    };
    let (digits, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(refuse)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(refuse());
    }
    let value = u64::from_str(digits).map_err(|_| refuse())?;
    match unit {
        "H" => Ok(Duration::from_secs(value * 3600)),
        "M" => Ok(Duration::from_secs(value * 60)),
        "S" => Ok(Duration::from_secs(value)),
        "m" => Ok(Duration::from_millis(value)),
        "u" => Ok(Duration::from_micros(value)),
        "n" => Ok(Duration::from_nanos(value)),
        _ => Err(refuse()),
    }
}

/// W3C trace context, version 00: `00-<32 hex>-<16 hex>-<2 hex>`, ids not all zero.
fn is_traceparent(value: &str) -> bool {
    let parts: Vec<&str> = value.split('-').collect();
    let hex = |part: &str, digits: usize| {
        part.len() == digits && part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let id = |part: &str, digits: usize| hex(part, digits) && part.bytes().any(|byte| byte != b'0');
    matches!(parts[..], ["00", trace, parent, flags] if id(trace, 32) && id(parent, 16) && hex(flags, 2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Code;

    fn metadata(entries: &[(&'static str, &str)]) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        for (key, value) in entries {
            metadata.insert(*key, value.parse().unwrap());
        }
        metadata
    }

    #[test]
    fn timeouts_parse_as_the_protocol_says() {
        let check = |text, expected| assert_eq!(parse_timeout(text).ok(), expected, "{text}");
        check("1H", Some(Duration::from_secs(3600)));
        check("2M", Some(Duration::from_secs(120)));
        check("3S", Some(Duration::from_secs(3)));
        check("99999999m", Some(Duration::from_millis(99_999_999)));
        check("5u", Some(Duration::from_micros(5)));
        check("6n", Some(Duration::from_nanos(6)));
        for bad in ["", "5", "H", "123456789S", "-1S", "+1S", "1.5S", "1s", "é", "1é", " 1S"] {
            check(bad, None);
        }
    }

    #[test]
    fn contexts_carry_all_that_was_sent() {
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let sent = metadata(&[("grpc-timeout", "10S"), ("x-request-id", "job 7"), ("traceparent", parent)]);
        let context = context(&sent).unwrap();
        assert_eq!(context.request_id, "job 7");
        assert_eq!(context.traceparent.as_deref(), Some(parent));
        assert!(
            context
                .time_left()
                .is_some_and(|left| left <= Duration::from_secs(10) && left > Duration::from_secs(5))
        );
    }

    #[test]
    fn nothing_sent_is_no_deadline_and_no_name() {
        let context = context(&MetadataMap::new()).unwrap();
        assert_eq!((context.request_id.as_str(), context.deadline, context.traceparent), ("", None, None));
    }

    #[test]
    fn bad_metadata_names_its_key() {
        let long = "x".repeat(129);
        for (key, value) in [("x-request-id", long.as_str()), ("grpc-timeout", "soon")] {
            let error = context(&metadata(&[(key, value)])).unwrap_err();
            assert_eq!((error.code, error.field.as_deref()), (Code::InvalidArgument, Some(key)));
        }
        let mut foreign = MetadataMap::new();
        foreign.insert("x-request-id", tonic::metadata::MetadataValue::try_from(&b"caf\xe9"[..]).unwrap());
        assert_eq!(context(&foreign).unwrap_err().field.as_deref(), Some("x-request-id"));
    }

    #[test]
    fn malformed_trace_contexts_start_a_new_trace() {
        for bad in ["", "00", "00-0-0-0", "00-00000000000000000000000000000000-b7ad6b7169203331-01", "zz"] {
            assert_eq!(context(&metadata(&[("traceparent", bad)])).unwrap().traceparent, None, "{bad}");
        }
    }
}
