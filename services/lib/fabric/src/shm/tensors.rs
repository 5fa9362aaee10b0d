//! Queries and partials of attention in shared memory: large ones, as long as slots are free; never waiting.

use bytes::Bytes;
use longshore_proto::{WireError, types::ForeignBytes, v1};

use super::{Lender, Link};

impl Lender {
    /// Moves the rows of a query into slots.
    pub(crate) fn place_queries(&self, query: &mut v1::AttendRequest) {
        query
            .items
            .iter_mut()
            .filter_map(|item| item.queries.as_mut())
            .for_each(|tensor| self.place_tensor(tensor));
    }

    /// Moves partial results into slots.
    pub(crate) fn place_partials(&self, answer: &mut v1::AttendResponse) {
        let partials = answer.partials.iter_mut();
        partials.filter_map(|partial| partial.partial.as_mut()).for_each(|tensor| self.place_tensor(tensor));
    }

    fn place_tensor(&self, tensor: &mut v1::Tensor) {
        tensor.shared = self.place_now(&tensor.data);
        if tensor.shared.is_some() {
            tensor.data = Bytes::new();
        }
    }
}

impl Link {
    /// Copies the rows of a query out of the slots that it names, which are free then.
    pub(crate) fn take_queries(&self, query: &mut v1::AttendRequest) -> Result<(), WireError> {
        for (index, item) in query.items.iter_mut().enumerate() {
            let taken = item.queries.as_mut().map_or(Ok(()), |tensor| self.take_tensor(tensor));
            taken.map_err(|fault| fault.within(&format!("items[{index}].queries")))?;
        }
        Ok(())
    }

    /// The same for partial results.
    pub(crate) fn take_partials(&self, answer: &mut v1::AttendResponse) -> Result<(), WireError> {
        for (index, partial) in answer.partials.iter_mut().enumerate() {
            let taken = partial.partial.as_mut().map_or(Ok(()), |tensor| self.take_tensor(tensor));
            taken.map_err(|fault| fault.within(&format!("partials[{index}].partial")))?;
        }
        Ok(())
    }

    /// The checksum is verified later, over the private copy that this makes.
    fn take_tensor(&self, tensor: &mut v1::Tensor) -> Result<(), WireError> {
        let Some(shared) = tensor.shared.take() else { return Ok(()) };
        if !tensor.data.is_empty() {
            return Err(WireError::invalid("shared", "is set beside `data`"));
        }
        let slot = self.borrow(&shared)?;
        let mut copy = vec![0; slot.bytes()];
        slot.copy_to(0, &mut copy);
        tensor.data = copy.into();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use longshore_proto::types::{Dtype, Tensor};
    use tokio::net::UnixStream;

    use super::*;
    use crate::shm::{accept, connect, link::SLOT_BYTES};

    fn answer(values: usize) -> v1::AttendResponse {
        let values: Vec<f32> = (0..values).map(|value| value as f32).collect();
        let partial = Tensor::from_f32(&[values.len() as u64], &values);
        assert_eq!(partial.dtype, Dtype::F32);
        let partial = v1::AttendPartial { item: 0, stripe: 0, partial: Some(partial.into()) };
        v1::AttendResponse {
            query_id: 1,
            partials: vec![partial],
            last: true,
            ..v1::AttendResponse::default()
        }
    }

    #[tokio::test]
    async fn large_tensors_travel_in_slots_and_small_ones_do_not() {
        let (a, b) = UnixStream::pair().unwrap();
        let (a, b) = tokio::join!(connect(a, SLOT_BYTES), accept(b, SLOT_BYTES));
        let ((_, a), (_, b)) = (a.unwrap(), b.unwrap());
        let lender = Arc::new(a.lender());
        for round in 0..3 {
            let sent = answer(100_000);
            let mut wire = sent.clone();
            lender.place_partials(&mut wire);
            let tensor = wire.partials[0].partial.as_ref().unwrap();
            assert!(tensor.shared.is_some() && tensor.data.is_empty(), "round {round}");
            let mut beside = sent.clone();
            lender.place_partials(&mut beside);
            assert_eq!(beside, sent, "without a slot it stays in the message");
            b.take_partials(&mut wire).unwrap();
            assert_eq!(wire, sent);
            assert_eq!(a.slots_lent(), 0, "round {round}");
        }
        let mut small = answer(10);
        lender.place_partials(&mut small);
        assert_eq!(small, answer(10));
        small.partials[0].partial.as_mut().unwrap().shared =
            Some(v1::SharedBytes { slot: 9, generation: 0, bytes: 4 });
        assert_eq!(b.take_partials(&mut small).unwrap_err().field(), "partials[0].partial.shared");
    }
}
