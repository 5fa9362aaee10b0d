//! Bytes from the network never panic: whatever decodes either converts or names a field.

use std::fmt::Debug;

use proptest::prelude::*;
use prost::Message;

use super::{identity, key, tensor, wire_tile};
use crate::{WireError, types, v1};

fn survive<M, T>(bytes: &[u8])
where
    M: Message + Default,
    T: TryFrom<M, Error = WireError> + Debug,
{
    if let Ok(message) = M::decode(bytes)
        && let Err(fault) = T::try_from(message)
    {
        assert!(!fault.field().is_empty(), "{fault} names no field");
    }
}

fn survive_all(bytes: &[u8]) {
    survive::<v1::Tensor, types::Tensor>(bytes);
    survive::<v1::Identity, types::Identity>(bytes);
    survive::<v1::TileShape, types::WireTileShape>(bytes);
    survive::<v1::SamplingParams, types::Sampling>(bytes);
    survive::<v1::LookupRequest, types::Lookup>(bytes);
    survive::<v1::Tile, types::TileMessage>(bytes);
    survive::<v1::PutBlocksResponse, types::PutAck>(bytes);
    survive::<v1::GetBlocksRequest, types::GetBlocks>(bytes);
    survive::<v1::GetBlocksResponse, Option<types::TileMessage>>(bytes);
    survive::<v1::OpenViewRequest, types::OpenView>(bytes);
    survive::<v1::OpenViewResponse, types::OpenedView>(bytes);
    survive::<v1::AttendRequest, types::AttendQuery>(bytes);
    survive::<v1::GetSummariesRequest, types::GetSummaries>(bytes);
    survive::<v1::GetSummariesResponse, types::SummariesMessage>(bytes);
    survive::<v1::AttendResponse, types::AttendAnswer>(bytes);
    survive::<v1::PrefillStart, types::PrefillStart>(bytes);
    survive::<v1::PrefillResponse, types::PrefillEvent>(bytes);
    survive::<v1::DecodeStart, types::DecodeStart>(bytes);
    survive::<v1::DecodeResponse, types::DecodeEvent>(bytes);
    survive::<v1::GenerateStart, types::GenerateStart>(bytes);
    survive::<v1::GenerateResponse, types::GenerateEvent>(bytes);
    survive::<v1::TokenChunk, Vec<u32>>(bytes);
    survive::<v1::ChatMessage, types::ChatMessage>(bytes);
    survive::<v1::ListModelsResponse, Vec<types::ModelDescription>>(bytes);
    survive::<v1::DescribeResponse, types::Describe>(bytes);
    if let Ok(mut answer) = v1::AttendResponse::decode(bytes) {
        let _ = answer.put_body(bytes.to_vec().into());
    }
    if let Ok(answer) = v1::LookupResponse::decode(bytes) {
        let _ = answer.into_present(bytes.len());
    }
}

/// Valid encodings to mutate: purely random bytes seldom get past the first field.
fn seeds() -> Vec<Vec<u8>> {
    let item = types::AttendItem {
        view_id: 1,
        first_position: 2,
        queries: tensor(2, 2, 4),
        scale: 0.5,
        sparse: None,
    };
    let visits = types::SparseVisits { kv_head: 1, runs: vec![0..2, 5..6], skip_below: Some(8.0) };
    let sparse = types::AttendItem { sparse: Some(visits), ..item.clone() };
    let query = types::AttendQuery { query_id: 9, identity: identity(), layer: 1, items: vec![item, sparse] };
    let partial = types::AttendPartial { item: 0, stripe: 1, partial: tensor(2, 2, 6) };
    let answer = types::AttendAnswer::Partials { query_id: 9, partials: vec![partial], last: true };
    let open = types::OpenView {
        identity: identity(),
        blocks: vec![(1, key(1)), (2, key(2))],
        append_to: Some(4),
        lease_ms: 5_000,
    };
    let start = types::GenerateStart {
        stop: vec!["end".to_owned()],
        prefill_policy: "balanced".to_owned(),
        ..Default::default()
    };
    let prefill = types::PrefillStart {
        request_id: "r".to_owned(),
        identity: identity(),
        prompt_tokens: 5_000,
        cached_blocks: 2,
        prefill_policy: "balanced".to_owned(),
        dense_from: 4_864,
        generated_tokens: 9,
    };
    vec![
        v1::AttendRequest::from(query).encode_to_vec(),
        v1::GetSummariesResponse::from(super::summaries()).encode_to_vec(),
        v1::AttendResponse::from(answer).encode_to_vec(),
        v1::OpenViewRequest::from(open).encode_to_vec(),
        v1::GenerateStart::from(start).encode_to_vec(),
        v1::PrefillStart::from(prefill).encode_to_vec(),
        wire_tile().encode_to_vec(),
    ]
}

proptest! {
    #[test]
    fn random_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
        survive_all(&bytes);
    }

    #[test]
    fn mutated_messages(which in 0..6usize, edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6), cut in any::<proptest::sample::Index>()) {
        let mut bytes = seeds().swap_remove(which);
        for (index, byte) in edits {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        survive_all(&bytes);
        bytes.truncate(cut.index(bytes.len()));
        survive_all(&bytes);
    }
}
