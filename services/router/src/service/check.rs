//! Ranges of a generation's parameters, whatever door they came through.

use longshore_proto::types::{GenerateStart, Sampling};

use crate::Error;

/// Most stop strings of a request.
pub(crate) const STOPS_MAX: usize = 16;
/// Most bytes of one stop string, of a salt, of a prefill policy.
const STRING_MAX_BYTES: usize = 256;
/// Most alternatives with log-probabilities.
pub(crate) const LOGPROBS_MAX: u32 = 20;
/// Most bytes of a request id.
const REQUEST_ID_MAX_BYTES: usize = 128;

/// Refuses values that can never work, naming the field.
pub(crate) fn check(start: &GenerateStart) -> Result<(), Error> {
    check_sampling(&start.sampling)?;
    if start.stop.len() > STOPS_MAX {
        return Err(Error::invalid(
            "stop",
            format!("has {} strings, at most {STOPS_MAX} are allowed", start.stop.len()),
        ));
    }
    if let Some(stop) = start.stop.iter().find(|stop| stop.is_empty() || stop.len() > STRING_MAX_BYTES) {
        let problem = format!("has a string of {} bytes, must be from 1 to {STRING_MAX_BYTES}", stop.len());
        return Err(Error::invalid("stop", problem));
    }
    if start.cache_salt.len() > STRING_MAX_BYTES {
        let problem = format!("has {} bytes, at most {STRING_MAX_BYTES} are allowed", start.cache_salt.len());
        return Err(Error::invalid("cache_salt", problem));
    }
    let policy = &start.prefill_policy;
    if policy.len() > STRING_MAX_BYTES || !policy.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        let problem = format!("must be printable ASCII of at most {STRING_MAX_BYTES} bytes");
        return Err(Error::invalid("prefill_policy", problem));
    }
    if !start.request_id.is_empty() && !usable_request_id(&start.request_id) {
        let problem = format!("must be printable ASCII of at most {REQUEST_ID_MAX_BYTES} bytes");
        return Err(Error::invalid("request_id", problem));
    }
    Ok(())
}

/// Whether a client's name for a request may appear in logs and headers.
pub(crate) fn usable_request_id(id: &str) -> bool {
    (1..=REQUEST_ID_MAX_BYTES).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
}

fn check_sampling(sampling: &Sampling) -> Result<(), Error> {
    range("temperature", sampling.temperature, 0.0, 100.0)?;
    range("top_p", sampling.top_p, f32::MIN_POSITIVE, 1.0)?;
    range("min_p", sampling.min_p, 0.0, 1.0)?;
    range("repetition_penalty", sampling.repetition_penalty, f32::MIN_POSITIVE, 10.0)?;
    range("presence_penalty", sampling.presence_penalty, -2.0, 2.0)?;
    range("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)?;
    if sampling.max_tokens == Some(0) {
        return Err(Error::invalid("max_tokens", "is 0, must be at least 1"));
    }
    if let Some(logprobs) = sampling.logprobs.filter(|&count| count > LOGPROBS_MAX) {
        return Err(Error::invalid("logprobs", format!("is {logprobs}, must be from 0 to {LOGPROBS_MAX}")));
    }
    Ok(())
}

/// NaN lies in no range.
fn range(field: &str, value: f32, low: f32, high: f32) -> Result<(), Error> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    let bound =
        if low == f32::MIN_POSITIVE { "above 0 and at most".to_owned() } else { format!("from {low} to") };
    Err(Error::invalid(field, format!("is {value}, must be {bound} {high}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_field() {
        let with = |change: fn(&mut GenerateStart)| {
            let mut start = GenerateStart::default();
            change(&mut start);
            check(&start).map_err(|error| error.to_string())
        };
        assert_eq!(with(|_| ()), Ok(()));
        type Case = (&'static str, fn(&mut GenerateStart));
        let table: [Case; 16] = [
            ("temperature", |s| s.sampling.temperature = -1.0),
            ("temperature", |s| s.sampling.temperature = f32::NAN),
            ("temperature", |s| s.sampling.temperature = f32::INFINITY),
            ("top_p", |s| s.sampling.top_p = 0.0),
            ("min_p", |s| s.sampling.min_p = 1.1),
            ("repetition_penalty", |s| s.sampling.repetition_penalty = 0.0),
            ("presence_penalty", |s| s.sampling.presence_penalty = 2.1),
            ("frequency_penalty", |s| s.sampling.frequency_penalty = f32::NEG_INFINITY),
            ("max_tokens", |s| s.sampling.max_tokens = Some(0)),
            ("logprobs", |s| s.sampling.logprobs = Some(21)),
            ("stop", |s| s.stop = vec![String::new()]),
            ("stop", |s| s.stop = vec!["x".to_owned(); 17]),
            ("cache_salt", |s| s.cache_salt = vec![0; 257]),
            ("prefill_policy", |s| s.prefill_policy = "p".repeat(257)),
            ("prefill_policy", |s| s.prefill_policy = "naïve".to_owned()),
            ("request_id", |s| s.request_id = "new\nline".to_owned()),
        ];
        for (field, change) in table {
            let error = with(change).unwrap_err();
            assert!(error.starts_with(&format!("`{field}` ")), "{field}: {error}");
        }
    }
}
