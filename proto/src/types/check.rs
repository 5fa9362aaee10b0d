//! Checks that several messages share. Each names the field at fault.

use bytes::Bytes;
use longshore_blocks::BlockKey;

use crate::WireError;

/// Most keys of one message.
pub const KEYS_MAX: usize = 65_536;
/// Most token ids of one chunk.
pub const CHUNK_TOKENS_MAX: usize = 65_536;
/// Longest request id in bytes.
pub const REQUEST_ID_BYTES_MAX: usize = 128;

/// Longest prefill policy in bytes.
const POLICY_BYTES_MAX: usize = 256;

/// Bytes of one block key.
pub(crate) const KEY_BYTES: usize = 16;

/// Converts the message in `field`, which must be there.
pub(crate) fn required<M, T>(message: Option<M>, field: &str) -> Result<T, WireError>
where
    T: TryFrom<M, Error = WireError>,
{
    let message = message.ok_or_else(|| WireError::invalid(field, "is missing"))?;
    T::try_from(message).map_err(|fault| fault.within(field))
}

/// Converts every message of a repeated `field`; faults name the index.
pub(crate) fn each<M, T>(messages: Vec<M>, field: &str) -> Result<Vec<T>, WireError>
where
    T: TryFrom<M, Error = WireError>,
{
    let convert =
        |(index, message)| T::try_from(message).map_err(|fault| fault.within(&format!("{field}[{index}]")));
    messages.into_iter().enumerate().map(convert).collect()
}

/// A digest or key of exactly `N` bytes.
pub(crate) fn exact<const N: usize>(bytes: &[u8], field: &str) -> Result<[u8; N], WireError> {
    bytes
        .try_into()
        .map_err(|_| WireError::invalid(field, format!("has {} bytes, must have {N}", bytes.len())))
}

/// Concatenated block keys.
pub(crate) fn keys(bytes: &[u8], field: &str) -> Result<Vec<BlockKey>, WireError> {
    let (chunks, rest) = bytes.as_chunks::<KEY_BYTES>();
    if !rest.is_empty() {
        let problem = format!("has {} bytes, must be a multiple of {KEY_BYTES}", bytes.len());
        return Err(WireError::invalid(field, problem));
    }
    at_most(chunks.len(), KEYS_MAX, "keys", field)?;
    Ok(chunks.iter().copied().map(BlockKey).collect())
}

/// Wire form of block keys.
pub(crate) fn join_keys<'a>(keys: impl ExactSizeIterator<Item = &'a BlockKey>) -> Bytes {
    let mut bytes = Vec::with_capacity(keys.len() * KEY_BYTES);
    keys.for_each(|key| bytes.extend_from_slice(&key.0));
    bytes.into()
}

/// `count` things are at most `limit`.
pub(crate) fn at_most(count: usize, limit: usize, what: &str, field: &str) -> Result<(), WireError> {
    if count > limit {
        return Err(WireError::invalid(field, format!("has {count} {what}, limit {limit}")));
    }
    Ok(())
}

/// Checks a request id that did not come in a message: printable ASCII, at most 128 bytes; empty is allowed.
pub fn validate_request_id(id: &str) -> Result<(), WireError> {
    request_id(id)
}

/// A request id; empty is allowed.
pub(crate) fn request_id(id: &str) -> Result<(), WireError> {
    at_most(id.len(), REQUEST_ID_BYTES_MAX, "bytes", "request_id")?;
    if !id.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        return Err(WireError::invalid("request_id", "must be printable ASCII"));
    }
    Ok(())
}

/// Text of a prefill policy; empty is allowed. What it means is for those who know policies to say.
pub(crate) fn prefill_policy(text: &str) -> Result<(), WireError> {
    at_most(text.len(), POLICY_BYTES_MAX, "bytes", "prefill_policy")?;
    if !text.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        return Err(WireError::invalid("prefill_policy", "must be printable ASCII"));
    }
    Ok(())
}

/// At least 1.
pub(crate) fn positive(value: u64, field: &str) -> Result<u64, WireError> {
    if value == 0 {
        return Err(WireError::invalid(field, "is 0, must be at least 1"));
    }
    Ok(value)
}

/// A logarithm of a probability: anything but NaN and +infinity.
pub(crate) fn logprob(value: f32, field: &str) -> Result<f32, WireError> {
    if value.is_nan() || value == f32::INFINITY {
        return Err(WireError::invalid(field, format!("is {value}, must be the logarithm of a probability")));
    }
    Ok(value)
}
