//! A table of bad messages, each with the field that its fault must name.

use std::fmt::Debug;

use super::{identity, key, wire_identity, wire_tensor, wire_tile};
use crate::{WireError, types, v1};

fn check<M, T>(message: M, field: &str)
where
    T: TryFrom<M, Error = WireError> + Debug,
    M: Debug,
{
    let shown = format!("{message:?}").chars().take(200).collect::<String>();
    match T::try_from(message) {
        Ok(value) => panic!("{shown} became {value:?}, must be refused for `{field}`"),
        Err(fault) => assert_eq!(fault.field(), field, "{shown}: {fault}"),
    }
}

#[test]
fn tensors() {
    let good = || wire_tensor(&[2, 3], 6);
    types::Tensor::try_from(good()).unwrap();
    types::Tensor::try_from(wire_tensor(&[0, u64::MAX, u64::MAX], 0)).unwrap();
    types::Tensor::try_from(wire_tensor(&[], 1)).unwrap();
    check::<_, types::Tensor>(v1::Tensor { dtype: 0, ..good() }, "dtype");
    check::<_, types::Tensor>(v1::Tensor { shared: Some(v1::SharedBytes::default()), ..good() }, "shared");
    check::<_, types::Tensor>(v1::Tensor { dtype: 99, ..good() }, "dtype");
    check::<_, types::Tensor>(v1::Tensor { dtype: -1, ..good() }, "dtype");
    check::<_, types::Tensor>(v1::Tensor { shape: vec![1; 5], ..good() }, "shape");
    check::<_, types::Tensor>(v1::Tensor { shape: vec![2, 2], ..good() }, "shape");
    check::<_, types::Tensor>(v1::Tensor { shape: vec![u64::MAX, u64::MAX], ..good() }, "shape");
    check::<_, types::Tensor>(v1::Tensor { shape: vec![1 << 62, 4], ..good() }, "shape");
    check::<_, types::Tensor>(v1::Tensor { dtype: v1::Dtype::F16.into(), ..good() }, "shape");
    let corrupt = types::Tensor::try_from(v1::Tensor { crc32c: good().crc32c ^ 1, ..good() }).unwrap_err();
    assert_eq!(corrupt, WireError::Checksum { field: "data".to_owned() });
}

#[test]
fn identities_and_shapes() {
    let good = || v1::Identity::from(identity());
    check::<_, types::Identity>(v1::Identity { deployment: vec![0; 31].into(), ..good() }, "deployment");
    check::<_, types::Identity>(v1::Identity { namespace: vec![0; 33].into(), ..good() }, "namespace");
    check::<_, types::WireTileShape>(v1::TileShape::default(), "dtype");
}

#[test]
fn tiles() {
    types::TileMessage::try_from(wire_tile()).unwrap();
    check::<_, types::TileMessage>(v1::Tile { key: vec![0; 15].into(), ..wire_tile() }, "key");
    check::<_, Option<types::TileMessage>>(v1::GetBlocksResponse::default(), "tile");
    let shared = Some(v1::SharedBytes::default());
    check::<_, types::TileMessage>(v1::Tile { shared, ..wire_tile() }, "shared");
    let nccl = Some(v1::NcclBytes::default());
    check::<_, types::TileMessage>(v1::Tile { nccl, ..wire_tile() }, "nccl");
    let bad = types::TileMessage::try_from(v1::Tile { crc32c: 0, ..wire_tile() }).unwrap();
    assert!(!bad.data.matches(bad.crc32c), "whoever uses a tile notices");
}

#[test]
fn lookups_and_reads() {
    let good = || v1::LookupRequest { identity: wire_identity(), keys: vec![0; 32].into(), peek: false };
    check::<_, types::Lookup>(v1::LookupRequest { identity: None, ..good() }, "identity");
    let identity = Some(v1::Identity { namespace: vec![].into(), ..identity().into() });
    check::<_, types::Lookup>(v1::LookupRequest { identity, ..good() }, "identity.namespace");
    check::<_, types::Lookup>(v1::LookupRequest { keys: vec![0; 17].into(), ..good() }, "keys");
    let most = types::KEYS_MAX * 16;
    types::Lookup::try_from(v1::LookupRequest { keys: vec![0; most].into(), ..good() }).unwrap();
    check::<_, types::Lookup>(v1::LookupRequest { keys: vec![0; most + 16].into(), ..good() }, "keys");
    let get = |keys: usize| v1::GetBlocksRequest {
        identity: wire_identity(),
        keys: vec![0; keys].into(),
        ..Default::default()
    };
    check::<_, types::GetBlocks>(get(1), "keys");
    for order in [-1, 3] {
        check::<_, types::GetBlocks>(v1::GetBlocksRequest { order, ..get(16) }, "order");
    }
    assert_eq!(
        v1::LookupResponse { present: vec![0; 2].into() }.into_present(8).unwrap_err().field(),
        "present"
    );
    assert_eq!(
        v1::LookupResponse { present: vec![0; 1].into() }.into_present(9).unwrap_err().field(),
        "present"
    );
    check::<_, types::PutAck>(
        v1::PutBlocksResponse { key: vec![0; 16].into(), ..Default::default() },
        "outcome",
    );
    let ack = |key: usize, outcome| v1::PutBlocksResponse {
        key: vec![0; key].into(),
        outcome,
        message: String::new(),
    };
    check::<_, types::PutAck>(ack(16, 77), "outcome");
    check::<_, types::PutAck>(ack(3, 1), "key");
}

#[test]
fn views() {
    let good = || v1::OpenViewRequest {
        identity: wire_identity(),
        keys: [key(1).0, key(2).0].concat().into(),
        block_indices: vec![4, 9],
        append_to_view_id: 0,
        lease_ms: 1_000,
    };
    types::OpenView::try_from(good()).unwrap();
    types::OpenView::try_from(v1::OpenViewRequest { lease_ms: 600_000, ..good() }).unwrap();
    check::<_, types::OpenView>(v1::OpenViewRequest { identity: None, ..good() }, "identity");
    check::<_, types::OpenView>(v1::OpenViewRequest { keys: vec![0; 33].into(), ..good() }, "keys");
    check::<_, types::OpenView>(v1::OpenViewRequest { block_indices: vec![4], ..good() }, "block_indices");
    check::<_, types::OpenView>(v1::OpenViewRequest { block_indices: vec![4, 4], ..good() }, "block_indices");
    check::<_, types::OpenView>(v1::OpenViewRequest { block_indices: vec![9, 4], ..good() }, "block_indices");
    check::<_, types::OpenView>(v1::OpenViewRequest { lease_ms: 999, ..good() }, "lease_ms");
    check::<_, types::OpenView>(v1::OpenViewRequest { lease_ms: 600_001, ..good() }, "lease_ms");
    check::<_, types::OpenedView>(v1::OpenViewResponse::default(), "view_id");
    let both = v1::OpenViewResponse { view_id: 1, missing_keys: vec![0; 16].into() };
    check::<_, types::OpenedView>(both, "view_id");
    let odd = v1::OpenViewResponse { view_id: 0, missing_keys: vec![0; 5].into() };
    check::<_, types::OpenedView>(odd, "missing_keys");
}

#[test]
fn attention() {
    let item = || v1::AttendItem {
        view_id: 1,
        first_position: 0,
        queries: Some(wire_tensor(&[1, 2, 4], 8)),
        scale: 0.5,
        sparse: None,
    };
    let query = |second: v1::AttendItem| v1::AttendRequest {
        query_id: 1,
        identity: wire_identity(),
        items: vec![item(), second],
        ..Default::default()
    };
    types::AttendQuery::try_from(query(item())).unwrap();
    check::<_, types::AttendQuery>(v1::AttendRequest { identity: None, ..query(item()) }, "identity");
    check::<_, types::AttendQuery>(query(v1::AttendItem { queries: None, ..item() }), "items[1].queries");
    let flat = Some(wire_tensor(&[8], 8));
    check::<_, types::AttendQuery>(
        query(v1::AttendItem { queries: flat, ..item() }),
        "items[1].queries.shape",
    );
    let half = Some(v1::Tensor { dtype: v1::Dtype::F16.into(), ..wire_tensor(&[1, 4, 4], 8) });
    check::<_, types::AttendQuery>(
        query(v1::AttendItem { queries: half, ..item() }),
        "items[1].queries.dtype",
    );
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        check::<_, types::AttendQuery>(query(v1::AttendItem { scale, ..item() }), "items[1].scale");
    }
    let far = v1::AttendItem { first_position: u64::MAX, ..item() };
    check::<_, types::AttendQuery>(query(far), "items[1].first_position");
    let partial = v1::AttendPartial { item: 0, stripe: 0, partial: Some(wire_tensor(&[4], 4)) };
    let answer = v1::AttendResponse { query_id: 1, partials: vec![partial], ..Default::default() };
    check::<_, types::AttendAnswer>(answer, "partials[0].partial.shape");
    let nccl = Some(v1::NcclBytes { number: 0, bytes: 1 });
    check::<_, types::AttendAnswer>(v1::AttendResponse { nccl, ..Default::default() }, "nccl");
}

/// What is exchanged apart from its message is put together again, or refused.
#[test]
fn bodies_of_partials() {
    type Edit = fn(&mut v1::Tensor);
    let partial = |shape: &[u64], values| {
        Some(v1::AttendPartial { item: 0, stripe: 0, partial: Some(wire_tensor(shape, values)) })
    };
    let partials =
        || partial(&[1, 2, 4], 8).into_iter().chain(partial(&[0, 2, 4], 0)).chain(partial(&[2, 1, 6], 12));
    let whole = v1::AttendResponse { partials: partials().collect(), last: true, ..Default::default() };
    assert_eq!(whole.body_bytes(), 80);
    let mut bare = whole.clone();
    let body: bytes::Bytes = bare.body().concat().into();
    bare.leave_out_body();
    assert_eq!((body.len(), bare.body_bytes()), (80, 0));
    let put = |body: bytes::Bytes, edit: &dyn Fn(&mut v1::AttendResponse)| {
        let mut answer = bare.clone();
        edit(&mut answer);
        answer.put_body(body).map(|()| answer).map_err(|fault| fault.field().to_owned())
    };
    assert_eq!(put(body.clone(), &|_| {}), Ok(whole));
    assert_eq!(put(body.slice(..79), &|_| {}), Err("partials[2].partial.shape".to_owned()));
    assert_eq!(put(vec![0; 81].into(), &|_| {}), Err("nccl.bytes".to_owned()));
    let tensor = |answer: &mut v1::AttendResponse, edit: Edit| {
        edit(answer.partials[2].partial.as_mut().unwrap());
    };
    let edits: [(Edit, &str); 5] = [
        (|tensor| tensor.data = vec![1].into(), "data"),
        (|tensor| tensor.dtype = 0, "dtype"),
        (|tensor| tensor.shape = vec![1; 5], "shape"),
        (|tensor| tensor.shape = vec![u64::MAX, 2], "shape"),
        (|tensor| tensor.shape = vec![1 << 40], "shape"),
    ];
    for (edit, field) in edits {
        let refused = put(body.clone(), &|answer: &mut v1::AttendResponse| tensor(answer, edit));
        assert_eq!(refused, Err(format!("partials[2].partial.{field}")));
    }
    // One bit of it is another: found when the partials are read.
    let mut damaged = body.to_vec();
    damaged[79] ^= 1;
    let damaged = put(damaged.into(), &|_| {}).unwrap();
    check::<_, types::AttendAnswer>(damaged, "partials[2].partial.data");
}

#[test]
#[allow(clippy::single_range_in_vec_init, reason = "lists of one run")]
fn sparse_visits() {
    let of = |runs: &[u32], skip_below| v1::SparseVisits { kv_head: 1, runs: runs.to_vec(), skip_below };
    let query = |visits| v1::AttendRequest {
        identity: wire_identity(),
        items: vec![v1::AttendItem {
            queries: Some(wire_tensor(&[1, 2, 4], 8)),
            scale: 0.5,
            sparse: Some(visits),
            ..Default::default()
        }],
        ..Default::default()
    };
    let read = types::AttendQuery::try_from(query(of(&[0, 2, 1, 1, u32::MAX, u32::MAX], Some(9.0)))).unwrap();
    let far = 4 + u64::from(u32::MAX);
    let runs = [0..2, 3..4, far..far + u64::from(u32::MAX)];
    assert_eq!(read.items[0].sparse.as_ref().unwrap().runs, runs);
    let crowd = [1; 2 * (types::RUNS_MAX + 1)];
    for runs in [&[][..], &[1], &[0, 1, 2], &[0, 0], &[3, 1, 2, 0], &[0, 1, 0, 1], &crowd] {
        check::<_, types::AttendQuery>(query(of(runs, None)), "items[0].sparse.runs");
    }
    for margin in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        check::<_, types::AttendQuery>(query(of(&[0, 1], Some(margin))), "items[0].sparse.skip_below");
    }
    // What a message cannot tell becomes what is refused.
    let backwards = std::ops::Range { start: 5, end: 3 };
    for runs in [vec![3..5, 4..6], vec![5..6, 1..2], vec![2..2], vec![0..1 << 33], vec![backwards]] {
        let wire = v1::SparseVisits::from(types::SparseVisits { kv_head: 0, runs, skip_below: None });
        check::<_, types::SparseVisits>(wire, "runs");
    }
}

#[test]
fn summaries_fit_their_keys() {
    let good = || v1::GetSummariesResponse::from(super::summaries());
    types::SummariesMessage::try_from(good()).unwrap();
    let other = Some(wire_tensor(&[3, 2, 5], 30));
    let flat = Some(wire_tensor(&[6], 6));
    let mut rotten = wire_tensor(&[3, 2, 4], 24);
    rotten.crc32c ^= 1;
    for (wrong, field) in [
        (v1::GetSummariesResponse { keys: None, ..good() }, "keys"),
        (v1::GetSummariesResponse { keys: flat.clone(), ..good() }, "keys.shape"),
        (v1::GetSummariesResponse { first: u64::MAX, ..good() }, "first"),
        (v1::GetSummariesResponse { values: other.clone(), ..good() }, "values.shape"),
        (v1::GetSummariesResponse { spreads: other, ..good() }, "spreads.shape"),
        (v1::GetSummariesResponse { cosines: flat, ..good() }, "cosines.shape"),
        (v1::GetSummariesResponse { values: Some(rotten), ..good() }, "values.data"),
    ] {
        check::<_, types::SummariesMessage>(wrong, field);
    }
    check::<_, types::GetSummaries>(v1::GetSummariesRequest::default(), "identity");
}

/// Texts that no policy may have, on any message.
fn bad_policies() -> [String; 5] {
    ["p".repeat(257), "new\nline".to_owned(), "nul\0".to_owned(), "naïve".to_owned(), "\u{7f}".to_owned()]
}

#[test]
fn generation() {
    let good = v1::GenerateStart::default;
    types::GenerateStart::try_from(good()).unwrap();
    let sampling = Some(v1::SamplingParams { temperature: Some(f32::NAN), ..Default::default() });
    check::<_, types::GenerateStart>(v1::GenerateStart { sampling, ..good() }, "sampling.temperature");
    let stop = |stop: Vec<String>| v1::GenerateStart { stop, ..good() };
    types::GenerateStart::try_from(stop(vec!["x".repeat(256); 16])).unwrap();
    check::<_, types::GenerateStart>(stop(vec!["x".to_owned(); 17]), "stop");
    check::<_, types::GenerateStart>(stop(vec!["x".to_owned(), String::new()]), "stop[1]");
    check::<_, types::GenerateStart>(stop(vec!["x".repeat(257)]), "stop[0]");
    check::<_, types::GenerateStart>(
        v1::GenerateStart { cache_salt: vec![0; 257].into(), ..good() },
        "cache_salt",
    );
    for id in ["x".repeat(129), "new\nline".to_owned(), "naïve".to_owned(), "\u{7f}".to_owned()] {
        check::<_, types::GenerateStart>(v1::GenerateStart { request_id: id, ..good() }, "request_id");
    }
    for prefill_policy in bad_policies() {
        check::<_, types::GenerateStart>(v1::GenerateStart { prefill_policy, ..good() }, "prefill_policy");
    }
    let longest = v1::GenerateStart { prefill_policy: "p".repeat(256), ..good() };
    assert_eq!(types::GenerateStart::try_from(longest).unwrap().prefill_policy.len(), 256);
    check::<_, Vec<u32>>(v1::TokenChunk { token_ids: vec![0; 65_537] }, "token_ids");
    use v1::generate_request::Chunk;
    check::<_, types::PromptChunk>(
        Chunk::Tokens(v1::TokenChunk { token_ids: vec![0; 65_537] }),
        "tokens.token_ids",
    );
    let message = v1::ChatMessage { role: "wizard".to_owned(), content: String::new() };
    check::<_, types::PromptChunk>(Chunk::Message(message), "message.role");
}

#[test]
fn answers() {
    use v1::generate_response::Event;
    let event = |event| v1::GenerateResponse { event: Some(event) };
    check::<_, types::GenerateEvent>(v1::GenerateResponse::default(), "event");
    check::<_, types::GenerateEvent>(
        event(Event::Finished(v1::GenerateFinished::default())),
        "finished.reason",
    );
    let slow = v1::GenerateFinished { reason: 1, time_to_first_token_ms: f64::NAN, ..Default::default() };
    check::<_, types::GenerateEvent>(event(Event::Finished(slow)), "finished.time_to_first_token_ms");
    let tokens = |logprobs| v1::GeneratedTokens { text: String::new(), token_ids: vec![1], logprobs };
    let none = v1::TokenChoice::default();
    check::<_, types::GenerateEvent>(
        event(Event::Tokens(tokens(vec![none.clone(), none.clone()]))),
        "tokens.logprobs",
    );
    check::<_, types::GenerateEvent>(
        event(Event::Tokens(tokens(vec![none.clone()]))),
        "tokens.logprobs[0].chosen",
    );
    let odd = v1::TokenChoice { top_text: vec![String::new()], ..none };
    check::<_, types::GenerateEvent>(event(Event::Tokens(tokens(vec![odd]))), "tokens.logprobs[0].top_text");
    check::<_, types::TokenLogprob>(v1::TokenLogprob { token_id: 1, logprob: f32::NAN }, "logprob");
}

#[test]
fn work() {
    let prefill = || v1::PrefillStart { identity: wire_identity(), prompt_tokens: 5, ..Default::default() };
    types::PrefillStart::try_from(prefill()).unwrap();
    check::<_, types::PrefillStart>(v1::PrefillStart { identity: None, ..prefill() }, "identity");
    check::<_, types::PrefillStart>(v1::PrefillStart { prompt_tokens: 0, ..prefill() }, "prompt_tokens");
    check::<_, types::PrefillStart>(
        v1::PrefillStart { request_id: "\t".to_owned(), ..prefill() },
        "request_id",
    );
    for prefill_policy in bad_policies() {
        check::<_, types::PrefillStart>(v1::PrefillStart { prefill_policy, ..prefill() }, "prefill_policy");
    }
    // Callers from before there was a choice send none and mean exact KV.
    let unset = types::PrefillStart::try_from(prefill()).unwrap();
    assert_eq!((unset.prefill_policy.as_str(), unset.dense_from, unset.generated_tokens), ("exact", 0, 0));
    check::<_, types::PrefillEvent>(v1::PrefillResponse::default(), "event");
    let decided = types::Sampling { seed: Some(1), max_tokens: Some(1), ..Default::default() };
    let sampling = || v1::SamplingParams::from(decided.clone());
    let decode = |sampling| v1::DecodeStart {
        identity: wire_identity(),
        prompt_tokens: 5,
        sampling,
        ..Default::default()
    };
    let unset = types::DecodeStart::try_from(decode(Some(sampling()))).unwrap();
    assert_eq!(unset.prefill_policy, "exact");
    for prefill_policy in bad_policies() {
        let bad = v1::DecodeStart { prefill_policy, ..decode(Some(sampling())) };
        check::<_, types::DecodeStart>(bad, "prefill_policy");
    }
    check::<_, types::DecodeStart>(decode(None), "sampling");
    let without = v1::SamplingParams { seed: None, ..sampling() };
    check::<_, types::DecodeStart>(decode(Some(without)), "sampling.seed");
    let without = v1::SamplingParams { top_p: None, ..sampling() };
    check::<_, types::DecodeStart>(decode(Some(without)), "sampling.top_p");
    let wrong = v1::SamplingParams { min_p: Some(2.0), ..sampling() };
    check::<_, types::DecodeStart>(decode(Some(wrong)), "sampling.min_p");
    let stops = v1::DecodeStart { stop_token_ids: vec![0; 1025], ..decode(Some(sampling())) };
    check::<_, types::DecodeStart>(stops, "stop_token_ids");
    check::<_, types::DecodeEvent>(v1::DecodeResponse::default(), "event");
}

#[test]
fn cluster() {
    let member = || v1::Member { id: "a".to_owned(), role: v1::Role::Router.into(), ..Default::default() };
    check::<_, types::Member>(v1::Member { id: String::new(), ..member() }, "id");
    check::<_, types::Member>(v1::Member { role: 0, ..member() }, "role");
    check::<_, types::Member>(v1::Member { role: 9, ..member() }, "role");
    let describe = || v1::DescribeResponse { self_: Some(member()), ..Default::default() };
    check::<_, types::Describe>(v1::DescribeResponse { self_: None, ..describe() }, "self");
    let members = vec![member(), v1::Member::default()];
    check::<_, types::Describe>(v1::DescribeResponse { members, ..describe() }, "members[1].id");
    let model = v1::ModelDescription { name: "m".to_owned(), ..Default::default() };
    check::<_, types::Describe>(
        v1::DescribeResponse { models: vec![model], ..describe() },
        "models[0].tile_shape",
    );
}

#[test]
fn pages_of_blocks() {
    let list = || v1::ListBlocksRequest::default();
    let default = types::ListBlocks::try_from(list()).unwrap();
    assert_eq!(default, types::ListBlocks::default(), "no limit is the usual one");
    let bad = [
        (v1::ListBlocksRequest { namespace_prefix: "0".repeat(65), ..list() }, "namespace_prefix"),
        (v1::ListBlocksRequest { namespace_prefix: "0x".to_owned(), ..list() }, "namespace_prefix"),
        (v1::ListBlocksRequest { key_prefix: "A".to_owned(), ..list() }, "key_prefix"),
        (v1::ListBlocksRequest { key_prefix: "0".repeat(33), ..list() }, "key_prefix"),
        (v1::ListBlocksRequest { after: vec![0; 47].into(), ..list() }, "after"),
        (v1::ListBlocksRequest { limit: 4_097, ..list() }, "limit"),
    ];
    bad.into_iter().for_each(|(message, field)| check::<_, types::ListBlocks>(message, field));
    let entry = || v1::BlockEntry {
        namespace: vec![1; 32].into(),
        key: vec![2; 16].into(),
        state: v1::BlockState::Sealed.into(),
        ..Default::default()
    };
    types::BlockEntry::try_from(entry()).unwrap();
    let bad = [
        (v1::BlockEntry { namespace: vec![1; 31].into(), ..entry() }, "namespace"),
        (v1::BlockEntry { key: vec![].into(), ..entry() }, "key"),
        (v1::BlockEntry { state: 0, ..entry() }, "state"),
        (v1::BlockEntry { state: 9, ..entry() }, "state"),
        (v1::BlockEntry { check: 9, ..entry() }, "check"),
        (v1::BlockEntry { stripe_seed: vec![1].into(), ..entry() }, "stripe_seed"),
    ];
    bad.into_iter().for_each(|(message, field)| check::<_, types::BlockEntry>(message, field));
    let page =
        v1::ListBlocksResponse { blocks: vec![entry(), v1::BlockEntry::default()], ..Default::default() };
    check::<_, types::BlockPage>(page, "blocks[1].state");
    let page = v1::ListBlocksResponse { next: vec![0; 3].into(), ..Default::default() };
    check::<_, types::BlockPage>(page, "next");
}
