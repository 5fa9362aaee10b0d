//! Checked conversions of attention queries and their answers.

use super::{AttendAnswer, AttendItem, AttendPartial, AttendQuery};
use crate::{WireError, types::check, v1};

/// Axes of queries and partials: rows, query heads, elements.
const AXES: usize = 3;

impl TryFrom<v1::AttendRequest> for AttendQuery {
    type Error = WireError;

    fn try_from(wire: v1::AttendRequest) -> Result<Self, WireError> {
        Ok(Self {
            query_id: wire.query_id,
            identity: check::required(wire.identity, "identity")?,
            layer: wire.layer,
            items: check::each(wire.items, "items")?,
        })
    }
}

impl From<AttendQuery> for v1::AttendRequest {
    fn from(query: AttendQuery) -> Self {
        Self {
            query_id: query.query_id,
            identity: Some(query.identity.into()),
            layer: query.layer,
            items: query.items.into_iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::AttendItem> for AttendItem {
    type Error = WireError;

    fn try_from(wire: v1::AttendItem) -> Result<Self, WireError> {
        let queries: super::Tensor = check::required(wire.queries, "queries")?;
        let queries = queries.expect_f32(AXES).map_err(|fault| fault.within("queries"))?;
        if wire.first_position.checked_add(queries.shape[0]).is_none() {
            return Err(WireError::invalid("first_position", "is too large for its rows"));
        }
        if !(wire.scale.is_finite() && wire.scale > 0.0) {
            return Err(WireError::invalid(
                "scale",
                format!("is {}, must be finite and positive", wire.scale),
            ));
        }
        Ok(Self { view_id: wire.view_id, first_position: wire.first_position, queries, scale: wire.scale })
    }
}

impl From<AttendItem> for v1::AttendItem {
    fn from(item: AttendItem) -> Self {
        Self {
            view_id: item.view_id,
            first_position: item.first_position,
            queries: Some(item.queries.into()),
            scale: item.scale,
        }
    }
}

impl TryFrom<v1::AttendResponse> for AttendAnswer {
    type Error = WireError;

    fn try_from(wire: v1::AttendResponse) -> Result<Self, WireError> {
        let query_id = wire.query_id;
        if wire.error_code != 0 {
            return Ok(Self::Failed { query_id, code: wire.error_code, message: wire.error_message });
        }
        Ok(Self::Partials { query_id, partials: check::each(wire.partials, "partials")?, last: wire.last })
    }
}

impl From<AttendAnswer> for v1::AttendResponse {
    fn from(answer: AttendAnswer) -> Self {
        match answer {
            AttendAnswer::Partials { query_id, partials, last } => {
                let partials = partials.into_iter().map(Into::into).collect();
                Self { query_id, partials, last, ..Self::default() }
            }
            AttendAnswer::Failed { query_id, code, message } => {
                Self { query_id, last: true, error_code: code, error_message: message, ..Self::default() }
            }
        }
    }
}

impl TryFrom<v1::AttendPartial> for AttendPartial {
    type Error = WireError;

    fn try_from(wire: v1::AttendPartial) -> Result<Self, WireError> {
        let partial: super::Tensor = check::required(wire.partial, "partial")?;
        let partial = partial.expect_f32(AXES).map_err(|fault| fault.within("partial"))?;
        Ok(Self { item: wire.item, stripe: wire.stripe, partial })
    }
}

impl From<AttendPartial> for v1::AttendPartial {
    fn from(partial: AttendPartial) -> Self {
        Self { item: partial.item, stripe: partial.stripe, partial: Some(partial.partial.into()) }
    }
}
