//! Checked conversions of summaries and of what asks for them.

use super::{GetSummaries, SummariesMessage, Tensor};
use crate::{WireError, types::check, v1};

/// Axes of means: blocks, KV heads, elements.
const AXES: usize = 3;

impl TryFrom<v1::GetSummariesRequest> for GetSummaries {
    type Error = WireError;

    fn try_from(wire: v1::GetSummariesRequest) -> Result<Self, WireError> {
        Ok(Self {
            identity: check::required(wire.identity, "identity")?,
            view_id: wire.view_id,
            first_layer: wire.first_layer,
            layers: (wire.layers != 0).then_some(wire.layers),
            values: wire.values,
            spreads: wire.spreads,
            cosines: wire.cosines,
        })
    }
}

impl From<GetSummaries> for v1::GetSummariesRequest {
    fn from(get: GetSummaries) -> Self {
        Self {
            identity: Some(get.identity.into()),
            view_id: get.view_id,
            first_layer: get.first_layer,
            layers: get.layers.unwrap_or(0),
            values: get.values,
            spreads: get.spreads,
            cosines: get.cosines,
        }
    }
}

impl TryFrom<v1::GetSummariesResponse> for SummariesMessage {
    type Error = WireError;

    fn try_from(wire: v1::GetSummariesResponse) -> Result<Self, WireError> {
        let keys: Tensor = check::required(wire.keys, "keys")?;
        let keys = keys.expect_f32(AXES).map_err(|fault| fault.within("keys"))?;
        if wire.first.checked_add(keys.shape[0]).is_none() {
            return Err(WireError::invalid("first", "is too large for its blocks"));
        }
        let like = |tensor, field, axes| optional(tensor, field, &keys.shape[..axes]);
        Ok(Self {
            layer: wire.layer,
            first: wire.first,
            values: like(wire.values, "values", AXES)?,
            spreads: like(wire.spreads, "spreads", AXES)?,
            cosines: like(wire.cosines, "cosines", AXES - 1)?,
            keys,
        })
    }
}

/// A tensor that may be missing, else of `shape`.
fn optional(wire: Option<v1::Tensor>, field: &str, shape: &[u64]) -> Result<Option<Tensor>, WireError> {
    let Some(wire) = wire else { return Ok(None) };
    let tensor: Tensor = check::required(Some(wire), field)?;
    let tensor = tensor.expect_f32(shape.len()).map_err(|fault| fault.within(field))?;
    if tensor.shape != shape {
        let problem = format!("is {:?}, must be {shape:?} as the keys tell", tensor.shape);
        return Err(WireError::invalid("shape", problem).within(field));
    }
    Ok(Some(tensor))
}

impl From<SummariesMessage> for v1::GetSummariesResponse {
    fn from(message: SummariesMessage) -> Self {
        Self {
            layer: message.layer,
            first: message.first,
            keys: Some(message.keys.into()),
            values: message.values.map(Into::into),
            spreads: message.spreads.map(Into::into),
            cosines: message.cosines.map(Into::into),
        }
    }
}
