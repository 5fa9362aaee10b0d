//! Ours to the wire and back through real bytes gives the same value.

use std::fmt::Debug;

use bytes::Bytes;
use longshore_blocks::{BlockKey, BlockPlace, Deployment, Namespace, crc32c};
use proptest::{collection::vec, option, prelude::*};
use prost::Message;

use crate::{WireError, types::*, v1};

fn check<T, M>(value: T)
where
    T: Clone + PartialEq + Debug + Into<M> + TryFrom<M, Error = WireError>,
    M: Message + Default,
{
    let wire: M = value.clone().into();
    let bytes = wire.encode_to_vec();
    let back = T::try_from(M::decode(bytes.as_slice()).unwrap()).unwrap();
    assert_eq!(back, value);
}

fn keys() -> impl Strategy<Value = Vec<BlockKey>> {
    vec(any::<[u8; 16]>().prop_map(BlockKey), 0..20)
}

fn identity() -> impl Strategy<Value = Identity> {
    (any::<[u8; 32]>(), any::<[u8; 32]>(), any::<u64>()).prop_map(
        |(deployment, namespace, shard_map_epoch)| Identity {
            deployment: Deployment::from_bytes(deployment),
            namespace: Namespace::from_bytes(namespace),
            shard_map_epoch,
        },
    )
}

/// Any f32 tensor with three axes, zero extents included.
fn tensor() -> impl Strategy<Value = Tensor> {
    [0..4u64, 0..4u64, 0..9u64].prop_flat_map(|shape| {
        let elements = shape.iter().product::<u64>() as usize;
        vec(any::<f32>(), elements).prop_map(move |values| Tensor::from_f32(&shape, &values))
    })
}

fn logprob() -> impl Strategy<Value = f32> {
    prop_oneof![-100.0f32..=0.0, Just(f32::NEG_INFINITY)]
}

fn token_logprob() -> impl Strategy<Value = TokenLogprob> {
    (any::<u32>(), logprob()).prop_map(|(token_id, logprob)| TokenLogprob { token_id, logprob })
}

fn sampling() -> impl Strategy<Value = Sampling> {
    let floats =
        (0.0f32..=100.0, 0.001f32..=1.0, 0.0f32..=1.0, 0.001f32..=10.0, -2.0f32..=2.0, -2.0f32..=2.0);
    let rest =
        (any::<u32>(), option::of(any::<u64>()), option::of(1u32..), option::of(0u32..=20), any::<bool>());
    (floats, rest).prop_map(|(floats, (top_k, seed, max_tokens, logprobs, ignore_eos))| Sampling {
        temperature: floats.0,
        top_k,
        top_p: floats.1,
        min_p: floats.2,
        repetition_penalty: floats.3,
        presence_penalty: floats.4,
        frequency_penalty: floats.5,
        seed,
        max_tokens,
        logprobs,
        ignore_eos,
    })
}

fn model() -> impl Strategy<Value = ModelDescription> {
    (".{1,9}", any::<[u8; 32]>(), any::<[u32; 6]>(), any::<bool>()).prop_map(|(name, digest, n, half)| {
        ModelDescription {
            architecture: name.clone(),
            name,
            max_context_tokens: n[0].into(),
            vocabulary: n[1],
            tile_shape: WireTileShape {
                block_tokens: n[2],
                kv_heads: n[3],
                head_dim: n[4],
                dtype: if half { Dtype::F16 } else { Dtype::F32 },
                layout: 1,
                layers: n[5],
            },
            kv_bytes_per_token: 7,
            deployment: Deployment::from_bytes(digest),
        }
    })
}

proptest! {
    #[test]
    fn tensors_keep_their_bits(tensor in tensor()) {
        let values = tensor.to_f32().unwrap();
        prop_assert_eq!(&Tensor::from_f32(&tensor.shape, &values), &tensor);
        check::<_, v1::Tensor>(tensor);
    }

    #[test]
    fn blocks(identity in identity(), keys in keys(), first_layer in any::<u32>(), layers in option::of(1u32..)) {
        check::<_, v1::Identity>(identity);
        check::<_, v1::LookupRequest>(Lookup { identity, keys: keys.clone(), peek: first_layer % 2 == 0 });
        for order in [TileOrder::Blocks, TileOrder::Layers] {
            let keys = keys.clone();
            check::<_, v1::GetBlocksRequest>(GetBlocks { identity, keys, first_layer, layers, order });
        }
    }

    #[test]
    fn presence_keeps_order_and_count(present in vec(any::<bool>(), 0..100)) {
        let wire = v1::LookupResponse::from(present.clone());
        prop_assert_eq!(wire.into_present(present.len()).unwrap(), present);
    }

    #[test]
    fn tiles(key in any::<[u8; 16]>(), layer in any::<u32>(), data in vec(any::<u8>(), 0..64), message in ".*") {
        let data = Bytes::from(data);
        let place = (layer % 2 == 0).then_some(BlockPlace { stripe_seed: [key[0]; 32], index: u64::from(layer) });
        let tile = TileMessage { key: BlockKey(key), layer, crc32c: crc32c(&data), data: data.into(), place };
        check::<_, v1::Tile>(tile.clone());
        check::<_, v1::GetBlocksResponse>(Some(tile));
        check::<Option<TileMessage>, v1::GetBlocksResponse>(None);
        for outcome in [PutOutcome::Stored, PutOutcome::Duplicate, PutOutcome::Corrupt, PutOutcome::NoSpace] {
            check::<_, v1::PutBlocksResponse>(PutAck { key: BlockKey(key), outcome, message: message.clone() });
        }
    }

    #[test]
    fn views(identity in identity(), keys in keys(), append_to in option::of(1u64..), lease_ms in 1_000u32..=600_000, view_id in 1u64..) {
        let blocks = keys.iter().enumerate().map(|(index, key)| (index as u64 * 3, *key)).collect();
        check::<_, v1::OpenViewRequest>(OpenView { identity, blocks, append_to, lease_ms });
        check::<_, v1::OpenViewResponse>(OpenedView::Open { view_id });
        if !keys.is_empty() {
            check::<_, v1::OpenViewResponse>(OpenedView::Missing(keys));
        }
    }

    #[test]
    fn attention(identity in identity(), tensor in tensor(), query_id in any::<u64>(), scale in 0.001f32..9.0, code in 1u32.., last in any::<bool>(), message in ".*") {
        let item = AttendItem { view_id: query_id, first_position: 5, queries: Tensor { ..tensor.clone() }, scale, sparse: None };
        // Arbitrary bits include NaN, which compares unequal to itself; tensors compare by bytes.
        let sparse = SparseVisits { kv_head: 2, runs: vec![4..9, 11..12, 100..5_000], skip_below: Some(scale) };
        let sparse = AttendItem { sparse: Some(sparse), ..item.clone() };
        check::<_, v1::AttendRequest>(AttendQuery { query_id, identity, layer: 3, items: vec![item, sparse] });
        let partials = vec![AttendPartial { item: 1, stripe: 2, partial: tensor }];
        check::<_, v1::AttendResponse>(AttendAnswer::Partials { query_id, partials, last });
        check::<_, v1::AttendResponse>(AttendAnswer::Failed { query_id, code, message });
    }

    #[test]
    fn summaries(identity in identity(), view_id in any::<u64>(), first_layer in any::<u32>(), layers in option::of(1u32..), wanted in any::<[bool; 3]>()) {
        let [values, spreads, cosines] = wanted;
        check::<_, v1::GetSummariesRequest>(GetSummaries { identity, view_id, first_layer, layers, values, spreads, cosines });
        let whole = super::summaries();
        let spreads = spreads.then(|| whole.keys.clone());
        check::<_, v1::GetSummariesResponse>(SummariesMessage { spreads, cosines: whole.cosines.clone().filter(|_| cosines), ..whole });
    }

    #[test]
    fn generation(sampling in sampling(), stop in vec(".{1,20}", 0..16), cache_salt in vec(any::<u8>(), 0..=256), request_id in "[ -~]{0,128}", prefill_policy in "[ -~]{0,256}", progress in any::<bool>()) {
        check::<_, v1::SamplingParams>(sampling.clone());
        let start = GenerateStart { model: "m".to_owned(), sampling, stop, cache_salt, request_id, progress, skip_special_tokens: !progress, prefill_policy };
        check::<_, v1::GenerateStart>(start);
    }

    #[test]
    fn answers(chosen in token_logprob(), top in vec((token_logprob(), ".*"), 0..5), text in ".*", millis in 0.0f64..1e9, n in any::<[u32; 4]>()) {
        let choice = TokenChoice { chosen, text: text.clone(), top };
        let tokens = TextTokens { text: text.clone(), token_ids: vec![n[0]], logprobs: vec![choice] };
        check::<_, v1::GenerateResponse>(GenerateEvent::Tokens(tokens));
        let (prompt_tokens, cached_tokens) = (n[1].into(), n[2].into());
        check::<_, v1::GenerateResponse>(GenerateEvent::Accepted { request_id: text.clone(), prompt_tokens, cached_tokens, model: text.clone(), prefill_policy: text.clone() });
        check::<_, v1::GenerateResponse>(GenerateEvent::Progress { done_tokens: cached_tokens, total_tokens: prompt_tokens });
        for reason in [FinishReason::Stop, FinishReason::Length] {
            let placement = vec![ShardBytes { shard_id: text.clone(), kv_bytes: cached_tokens }];
            let finished = Finished { reason, prompt_tokens, cached_tokens, completion_tokens: 4, time_to_first_token_ms: millis, placement, resumed: n[3], visited_blocks: n[0].into(), causal_blocks: n[1].into() };
            check::<_, v1::GenerateResponse>(GenerateEvent::Finished(finished));
        }
    }

    #[test]
    fn work(prefill_policy in "[ -~]{1,256}", identity in identity(), sampling in sampling(), n in any::<[u32; 4]>(), top in vec(token_logprob(), 0..5), logprob in option::of(logprob())) {
        let request_id = "request 1".to_owned();
        let prompt_tokens = u64::from(n[0]) + 1;
        check::<_, v1::PrefillStart>(PrefillStart { request_id: request_id.clone(), identity, prompt_tokens, cached_blocks: n[1].into(), prefill_policy: prefill_policy.clone(), dense_from: n[2].into(), generated_tokens: n[3].into() });
        check::<_, v1::PrefillResponse>(PrefillEvent::Progress { done_tokens: n[2].into() });
        check::<_, v1::PrefillResponse>(PrefillEvent::Finished { computed_blocks: n[2].into(), stored_bytes: n[3].into() });
        let sampling = Sampling { seed: Some(1), max_tokens: Some(n[1].max(1)), ..sampling };
        check::<_, v1::DecodeStart>(DecodeStart { request_id, identity, prompt_tokens, generated_tokens: 1, sampling, stop_token_ids: n.to_vec(), prefill_policy });
        check::<_, v1::DecodeResponse>(DecodeEvent::Token { token_id: n[3], logprob, top });
        check::<_, v1::DecodeResponse>(DecodeEvent::Finished { stopped: n[0] > n[1], visited_blocks: n[2].into(), causal_blocks: n[3].into() });
    }

    #[test]
    fn cluster(models in vec(model(), 0..3), id in "[a-z]{1,9}", n in any::<[u32; 2]>()) {
        let member = |role| Member { id: id.clone(), role, address: "local:x".to_owned(), incarnation: n[0].into(), weight: n[1], healthy: true, host: id.clone(), zone: "z".to_owned() };
        let members = [Role::Router, Role::Prefill, Role::Decode, Role::KvStore].map(member).to_vec();
        check::<_, v1::ListModelsResponse>(models.clone());
        check::<_, v1::DescribeResponse>(Describe { this: member(Role::KvStore), members, epoch: 4, models, version: "0.1.0".to_owned() });
    }
}

#[test]
fn prompt_chunks() {
    let message = ChatMessage { role: "tool".to_owned(), content: "42".to_owned() };
    for chunk in
        [PromptChunk::Text("hé".to_owned()), PromptChunk::Tokens(vec![1, 2]), PromptChunk::Message(message)]
    {
        let wire = v1::generate_request::Chunk::from(chunk.clone());
        assert_eq!(PromptChunk::try_from(wire).unwrap(), chunk);
    }
    check::<_, v1::TokenChunk>(vec![5u32; 65_536]);
}

#[test]
fn inventories() {
    let identity = Identity {
        deployment: Deployment::from_bytes([1; 32]),
        namespace: Deployment::from_bytes([1; 32]).namespace("exact", b""),
        shard_map_epoch: 3,
    };
    for after in [None, Some((7, 0)), Some((7, 9))] {
        check::<_, v1::WatchInventoryRequest>(WatchInventory { identity, after });
    }
    let changes = [
        InventoryChange::Stored,
        InventoryChange::Evicted,
        InventoryChange::Condemned,
        InventoryChange::Moved,
    ];
    let events: Vec<_> =
        (4..).zip(changes).map(|(at, change)| (at, BlockKey([at as u8; 16]), change)).collect();
    let news = InventoryNews { incarnation: 7, reset: true, events, told: 9, blocks: 2, digest: 11 };
    let mut wire = v1::WatchInventoryResponse::from(news.clone());
    check::<_, v1::WatchInventoryResponse>(news);
    wire.events[0].sequence = 6;
    let error = InventoryNews::try_from(wire.clone()).unwrap_err();
    assert!(error.to_string().contains("`events` must ascend"), "{error}");
    wire.events[1].change = 99;
    let error = InventoryNews::try_from(wire).unwrap_err();
    assert!(error.to_string().contains("`events[1].change` is 99"), "{error}");
}

#[test]
fn stats() {
    let stats = ShardStats {
        shard_id: "s".to_owned(),
        used_bytes: 5,
        hits_total: 6,
        attend_total: 7,
        tiers: vec![
            TierStats { name: "dram".to_owned(), blocks: 1, hits_total: 2, ..Default::default() },
            TierStats { name: "disk".to_owned(), copies: 3, skipped_total: 4, ..Default::default() },
        ],
        scrub: ScrubStats {
            done_blocks: 1,
            round_blocks: 2,
            rounds_total: 3,
            checked_total: 4,
            bad_total: 5,
        },
        incarnation: 8,
        shard_map_epoch: 9,
        repair: RepairStats {
            unchecked_blocks: 1,
            backlog_blocks: 2,
            sent_total: 3,
            sent_bytes_total: 4,
            failed_total: 5,
            dropped_total: 6,
            passes_total: 7,
            peers_down: 8,
        },
        room_bytes: 20,
        summary_bytes: 21,
        uptime_ms: 10,
        writers: 11,
        condemned_blocks: 12,
        departures: DepartureStats {
            evicted_memory_total: 1,
            evicted_disk_total: 2,
            condemned_total: 3,
            moved_total: 4,
            incomplete_total: 5,
            no_space_total: 6,
            duplicate_total: 7,
        },
        lanes: vec![LaneStats {
            name: "shm".to_owned(),
            received_bytes_total: 1,
            sent_bytes_total: 2,
            puts_total: 3,
            gets_total: 4,
        }],
        copies: CopyStats { wanted: 2, write_acks: 1, short: 3, unplaced_blocks: 4, unsearched_blocks: 5 },
        tenants: TenantStats {
            tenants: 1,
            kept_bytes: 2,
            most_kept_bytes: 3,
            refused_total: 4,
            broken_promises_total: 5,
            stalled_streams_total: 6,
        },
        drain: DrainStats {
            draining: true,
            drained: false,
            takes_blocks: true,
            blocks: 10,
            moved_blocks: 1,
            waiting_blocks: 2,
            no_room_blocks: 3,
            too_few_hosts_blocks: 4,
        },
        scrub_findings: vec![ScrubFinding { key: BlockKey([7; 16]), tier: "disk".to_owned() }],
        ..Default::default()
    };
    assert_eq!(ShardStats::from(v1::StatsResponse::from(stats.clone())), stats);
}

#[test]
fn pages_of_blocks() {
    let list = ListBlocks {
        namespace_prefix: "0a".to_owned(),
        key_prefix: "1bc".to_owned(),
        after: Some((Namespace::from_bytes([1; 32]), BlockKey([2; 16]))),
        limit: 7,
        check: true,
    };
    check::<_, v1::ListBlocksRequest>(list.clone());
    check::<_, v1::ListBlocksRequest>(ListBlocks { after: None, ..list });
    let place = BlockPlace { stripe_seed: [3; 32], index: 9 };
    let entry = |state, place, sound| BlockEntry {
        namespace: Namespace::from_bytes([1; 32]),
        key: BlockKey([2; 16]),
        tier: "dram".to_owned(),
        state,
        bytes: 5,
        views: 6,
        lease_ms: 7,
        on_disk_too: true,
        place,
        generation: 8,
        sound,
        checksums: vec![9, 10],
    };
    let blocks = vec![
        entry(BlockState::Sealed, Some(place), Some(true)),
        entry(BlockState::Leaving, None, Some(false)),
        entry(BlockState::Rising, None, None),
    ];
    let next = Some((Namespace::from_bytes([4; 32]), BlockKey([5; 16])));
    check::<_, v1::ListBlocksResponse>(BlockPage { blocks: blocks.clone(), next });
    check::<_, v1::ListBlocksResponse>(BlockPage { blocks, next: None });
}
