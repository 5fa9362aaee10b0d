//! Checked conversions of attention queries and their answers.

use std::ops::Range;

use bytes::Bytes;

use super::{AttendAnswer, AttendItem, AttendPartial, AttendQuery, SparseVisits};
use crate::{WireError, types::check, v1};

/// Most runs of blocks of one item.
pub const RUNS_MAX: usize = 65_536;

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
            nccl: None,
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
        let sparse = wire.sparse.map(|visits| check::required(Some(visits), "sparse")).transpose()?;
        let (view_id, first_position, scale) = (wire.view_id, wire.first_position, wire.scale);
        Ok(Self { view_id, first_position, queries, scale, sparse })
    }
}

impl From<AttendItem> for v1::AttendItem {
    fn from(item: AttendItem) -> Self {
        Self {
            view_id: item.view_id,
            first_position: item.first_position,
            queries: Some(item.queries.into()),
            scale: item.scale,
            sparse: item.sparse.map(Into::into),
        }
    }
}

impl TryFrom<v1::SparseVisits> for SparseVisits {
    type Error = WireError;

    fn try_from(wire: v1::SparseVisits) -> Result<Self, WireError> {
        match wire.skip_below {
            Some(margin) if !(margin.is_finite() && margin > 0.0) => {
                let problem = format!("is {margin}, must be finite and positive");
                return Err(WireError::invalid("skip_below", problem));
            }
            _ => {}
        }
        Ok(Self { kv_head: wire.kv_head, runs: runs(&wire.runs)?, skip_below: wire.skip_below })
    }
}

/// Runs of blocks; they can neither descend nor overlap, only touch or be empty.
fn runs(wire: &[u32]) -> Result<Vec<Range<u64>>, WireError> {
    let invalid = |problem: String| Err(WireError::invalid("runs", problem));
    let (pairs, rest) = wire.as_chunks::<2>();
    if !rest.is_empty() {
        return invalid(format!("has {} numbers, must have two for each run", wire.len()));
    }
    check::at_most(pairs.len(), RUNS_MAX, "runs", "runs")?;
    if pairs.is_empty() {
        return invalid("names no block".to_owned());
    }
    let mut runs = Vec::with_capacity(pairs.len());
    let mut end = 0;
    for (index, &[gap, blocks]) in pairs.iter().enumerate() {
        if blocks == 0 {
            return invalid(format!("visits no block in run {index}"));
        }
        if gap == 0 && index > 0 {
            return invalid(format!(
                "leaves out no block before run {index}, which belongs to the run before"
            ));
        }
        let start = end + u64::from(gap);
        end = start + u64::from(blocks);
        runs.push(start..end);
    }
    Ok(runs)
}

impl From<SparseVisits> for v1::SparseVisits {
    /// Runs that a message cannot tell, which do not ascend or are longer than 2^32, become what every receiver refuses.
    fn from(visits: SparseVisits) -> Self {
        let mut end = 0;
        let mut runs = Vec::with_capacity(2 * visits.runs.len());
        for run in visits.runs {
            let length =
                |from: u64, to: u64| to.checked_sub(from).and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
            runs.extend([length(end, run.start), length(run.start, run.end)]);
            end = run.end;
        }
        Self { kv_head: visits.kv_head, runs, skip_below: visits.skip_below }
    }
}

impl TryFrom<v1::AttendResponse> for AttendAnswer {
    type Error = WireError;

    fn try_from(wire: v1::AttendResponse) -> Result<Self, WireError> {
        let query_id = wire.query_id;
        if wire.nccl.is_some() {
            return Err(WireError::invalid("nccl", "is set, the query named no epoch of the lane `nccl`"));
        }
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

impl v1::AttendResponse {
    /// Bytes of all partials, as they lie one after the other in a body that is exchanged.
    pub fn body_bytes(&self) -> usize {
        self.partials
            .iter()
            .filter_map(|partial| partial.partial.as_ref())
            .map(|tensor| tensor.data.len())
            .sum()
    }

    /// The elements of all partials, in order: their body.
    pub fn body(&self) -> Vec<Bytes> {
        let tensors = self.partials.iter().filter_map(|partial| partial.partial.as_ref());
        tensors.map(|tensor| tensor.data.clone()).collect()
    }

    /// Leaves the elements out, which travel apart from the message.
    pub fn leave_out_body(&mut self) {
        let tensors = self.partials.iter_mut().filter_map(|partial| partial.partial.as_mut());
        tensors.for_each(|tensor| tensor.data = Bytes::new());
    }

    /// Gives every partial its part of the body that came, as long as its shape says; the parts share its memory. Their checksums are
    /// verified later, as those of all partials are. Refuses partials that have elements, and shapes that are not all of the body.
    pub fn put_body(&mut self, mut body: Bytes) -> Result<(), WireError> {
        for (index, partial) in self.partials.iter_mut().enumerate() {
            let Some(tensor) = &mut partial.partial else { continue };
            let within = |fault: WireError| fault.within(&format!("partials[{index}].partial"));
            if !tensor.data.is_empty() {
                return Err(within(WireError::invalid("data", "is set beside a body that is exchanged")));
            }
            let bytes = tensor.bytes_of_shape().map_err(within)?;
            let Some(bytes) = usize::try_from(bytes).ok().filter(|&bytes| bytes <= body.len()) else {
                let problem = format!(
                    "is {:?}, more than the {} bytes of the body that are left",
                    tensor.shape,
                    body.len()
                );
                return Err(within(WireError::invalid("shape", problem)));
            };
            tensor.data = body.split_to(bytes);
        }
        match body.is_empty() {
            true => Ok(()),
            false => Err(WireError::invalid(
                "nccl.bytes",
                format!("is {} more than the partials have", body.len()),
            )),
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
