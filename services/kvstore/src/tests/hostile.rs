//! Requests that make no sense: each gets a typed answer that names the field, and harms nobody else.

use longshore_fabric::Code;
use longshore_proto::types::GetBlocks;

use super::*;

/// gRPC numbers of the codes that queries fail with.
const INVALID_ARGUMENT: u32 = 3;
const NOT_FOUND: u32 = 5;
const FAILED_PRECONDITION: u32 = 9;

#[tokio::test]
async fn callers_of_another_deployment_or_epoch_are_refused_everywhere() {
    let shard = shard(2);
    shard.store(&[1]).await;
    let view = shard.view(&[(0, 1)]).await;
    let other = Identity { deployment: Deployment::from_bytes([4; 32]), ..identity("") };
    let stale = Identity { shard_map_epoch: EPOCH - 1, ..identity("") };
    for (wrong, field) in [(other, "identity.deployment"), (stale, "identity.shard_map_epoch")] {
        let keys = vec![key(1)];
        let lookup =
            shard.shard.lookup(&shard.ctx, Lookup { identity: wrong, keys: keys.clone(), peek: false }).await;
        let (_sender, tiles) = mpsc::channel(1);
        let put = shard.shard.put_blocks(&shard.ctx, wrong, wire_shape(), tiles).await;
        let get = GetBlocks::whole(wrong, keys);
        let get = shard.shard.get_blocks(&shard.ctx, get).await;
        let open = OpenView { identity: wrong, blocks: vec![(0, key(1))], append_to: None, lease_ms: 1_000 };
        let open = shard.shard.open_view(&shard.ctx, open).await;
        for error in [lookup.err(), put.err(), get.err(), open.err()] {
            let error = error.expect("the caller is refused");
            assert_eq!((error.code, error.field.as_deref()), (Code::FailedPrecondition, Some(field)));
            assert!(error.message.contains("hint:"), "{error}");
        }
        let query = AttendQuery { identity: wrong, ..query(1, 0, vec![item(view, 16, 1)]) };
        let (code, message) = shard.refused(query).await;
        assert_eq!(code, FAILED_PRECONDITION);
        assert!(message.contains(field), "{message}");
    }
    shard.epoch.send(EPOCH - 1).unwrap();
    let lookup = Lookup { identity: stale, keys: vec![key(1)], peek: false };
    assert_eq!(shard.shard.lookup(&shard.ctx, lookup).await, Ok(vec![true]), "the shard follows the epoch");
}

#[tokio::test]
async fn tiles_of_another_shape_are_refused_by_field() {
    let shard = shard(2);
    let own = wire_shape();
    for (wrong, field) in [
        (WireTileShape { block_tokens: 32, ..own }, "shape.block_tokens"),
        (WireTileShape { kv_heads: 1, ..own }, "shape.kv_heads"),
        (WireTileShape { head_dim: 16, ..own }, "shape.head_dim"),
        (WireTileShape { dtype: Dtype::F32, ..own }, "shape.dtype"),
        (WireTileShape { layout: 2, ..own }, "shape.layout"),
        (WireTileShape { layers: LAYERS + 1, ..own }, "shape.layers"),
    ] {
        let (_sender, tiles) = mpsc::channel(1);
        let refused = shard.shard.put_blocks(&shard.ctx, identity(""), wrong, tiles).await;
        let error = refused.err().expect("the shape is refused");
        assert_eq!((error.code, error.field.as_deref()), (Code::InvalidArgument, Some(field)));
    }
}

#[tokio::test]
async fn requests_out_of_range_are_refused_by_field() {
    let shard = shard(2);
    shard.store(&[1]).await;
    let many = vec![key(1); 65_537];
    let lookup = shard
        .shard
        .lookup(&shard.ctx, Lookup { identity: identity(""), keys: many.clone(), peek: false })
        .await;
    assert_eq!(lookup.unwrap_err().field.as_deref(), Some("keys"));
    let most = Lookup { identity: identity(""), keys: many[1..].to_vec(), peek: false };
    assert_eq!(shard.shard.lookup(&shard.ctx, most).await, Ok(vec![true; 65_536]));

    let get = GetBlocks::whole(identity(""), vec![key(1)]);
    for (wrong, field) in [
        (GetBlocks { keys: many, ..get.clone() }, "keys"),
        (GetBlocks { first_layer: LAYERS, ..get.clone() }, "first_layer"),
        (GetBlocks { first_layer: u32::MAX, ..get.clone() }, "first_layer"),
        (GetBlocks { layers: Some(LAYERS + 1), ..get.clone() }, "layers"),
        (GetBlocks { first_layer: 1, layers: Some(u32::MAX), ..get.clone() }, "layers"),
        (GetBlocks { layers: Some(0), ..get }, "layers"),
    ] {
        let error = shard.shard.get_blocks(&shard.ctx, wrong).await.err().expect("the range is refused");
        assert_eq!((error.code, error.field.as_deref()), (Code::InvalidArgument, Some(field)));
    }

    let open =
        OpenView { identity: identity(""), blocks: vec![(0, key(1))], append_to: None, lease_ms: 1_000 };
    for (wrong, field) in [
        (OpenView { lease_ms: 999, ..open.clone() }, "lease_ms"),
        (OpenView { lease_ms: 600_001, ..open.clone() }, "lease_ms"),
        (OpenView { blocks: vec![(u64::MAX, key(1))], ..open.clone() }, "block_indices"),
        (OpenView { blocks: vec![(1, key(1)), (1, key(1))], ..open.clone() }, "block_indices"),
        (OpenView { blocks: vec![(0, key(1)); 65_537], ..open }, "blocks"),
    ] {
        let error = shard.shard.open_view(&shard.ctx, wrong).await.unwrap_err();
        assert_eq!((error.code, error.field.as_deref()), (Code::InvalidArgument, Some(field)));
    }
    assert_eq!(shard.stats().await.views, 0);
}

#[tokio::test]
async fn hostile_queries_fail_alone_and_name_the_field() {
    let shard = shard(2);
    shard.store(&[1]).await;
    let view = shard.view(&[(0, 1)]).await;
    let good = item(view, 16, 2);
    let of_shape = |shape: &[u64]| Tensor { shape: shape.to_vec(), ..good.queries.clone() };
    let with_value = |value: f32| {
        let mut values = good.queries.to_f32().unwrap();
        values[5] = value;
        Tensor::from_f32(&good.queries.shape, &values)
    };
    let (heads, dim) = (HEADS as u64, HEAD_DIM as u64);
    let huge = vec![0.0; (4 << 20) / 4 + HEADS * HEAD_DIM];
    let rows = (huge.len() / (HEADS * HEAD_DIM)) as u64;
    let queries = |tensor: Tensor| AttendItem { queries: tensor, ..good.clone() };
    for (what, wrong, field) in [
        ("NaN", queries(with_value(f32::NAN)), "`items[0].queries`"),
        ("infinity", queries(with_value(f32::INFINITY)), "`items[0].queries`"),
        ("huge", queries(Tensor::from_f32(&[rows, heads, dim], &huge)), "`items`"),
        ("lying rows", queries(of_shape(&[3, heads, dim])), "`items[0].queries.shape`"),
        ("overflow", queries(of_shape(&[u64::MAX, heads, dim])), "`items[0].queries.shape`"),
        ("wide", queries(of_shape(&[2, u64::MAX - 1, dim])), "`items[0].queries.shape`"),
        ("no rows", queries(Tensor::from_f32(&[0, heads, dim], &[])), "`items[0].queries.shape`"),
        ("no heads", queries(Tensor::from_f32(&[2, 0, dim], &[])), "`items[0].queries.shape`"),
        ("odd heads", queries(Tensor::from_f32(&[2, 3, dim], &[0.0; 48])), "`items[0].queries.shape`"),
        ("head size", queries(Tensor::from_f32(&[2, 2 * heads, 4], &[0.0; 64])), "`items[0].queries.shape`"),
        ("flat", queries(of_shape(&[64])), "`items[0].queries.shape`"),
        ("f16", queries(Tensor { dtype: Dtype::F16, ..good.queries.clone() }), "`items[0].queries.dtype`"),
        ("scale NaN", AttendItem { scale: f32::NAN, ..good.clone() }, "`items[0].scale`"),
        ("scale 0", AttendItem { scale: 0.0, ..good.clone() }, "`items[0].scale`"),
        ("position", AttendItem { first_position: u64::MAX, ..good.clone() }, "`items[0].first_position`"),
    ] {
        let (code, message) = shard.refused(query(1, 0, vec![wrong])).await;
        assert_eq!(code, INVALID_ARGUMENT, "{what}: {message}");
        assert!(message.contains(field), "{what}: {message}");
    }
    let (code, message) = shard.refused(query(1, LAYERS, vec![good.clone()])).await;
    assert!(code == INVALID_ARGUMENT && message.contains("`layer`"), "{message}");
    let crowd = vec![item(view, 16, 1); 4_097];
    let (code, message) = shard.refused(query(1, 0, crowd)).await;
    assert!(code == INVALID_ARGUMENT && message.contains("`items`"), "{message}");

    // In one stream with good queries, only the bad one fails.
    let bad = query(2, LAYERS, vec![good.clone()]);
    let answers = shard.attend(vec![query(1, 0, vec![good.clone()]), bad, query(3, 0, vec![good])]).await;
    assert_eq!(partials_of(&answers, 1), partials_of(&answers, 3));
    assert_eq!(answers.len(), 3);
}

#[tokio::test]
async fn unknown_views_and_those_of_others_look_the_same() {
    let shard = shard(2);
    shard.store(&[1]).await;
    let view = shard.view(&[(0, 1)]).await;
    let foreign = AttendQuery { identity: identity("other"), ..query(1, 0, vec![item(view, 16, 1)]) };
    let (code, message) = shard.refused(foreign).await;
    let (unknown_code, unknown) = shard.refused(query(1, 0, vec![item(77, 16, 1)])).await;
    assert_eq!((code, unknown_code), (NOT_FOUND, NOT_FOUND));
    assert_eq!(message.replace(&view.to_string(), "77"), unknown);
    let (code, _) = shard.refused(query(1, 0, vec![item(view, 16, 1), item(0, 16, 1)])).await;
    assert_eq!(code, NOT_FOUND, "one bad item fails its query");
}

#[tokio::test]
async fn values_that_are_no_numbers_are_not_stored_and_never_become_an_answer() {
    let shard = shard(2);
    let nan = (0..LAYERS).map(|layer| {
        let data = Bytes::from(vec![0x7e; shape().bytes()]);
        TileMessage { key: key(1), layer, crc32c: crc32c(&data), data: data.into(), place: None }
    });
    let acks = shard.put("", nan.collect()).await;
    assert_eq!(outcomes(&acks), [(1, PutOutcome::Corrupt)]);
    assert!(acks[0].message.contains("finite"), "{}", acks[0].message);

    // Finite rows whose products overflow.
    shard.store(&[2]).await;
    let view = shard.view(&[(0, 2)]).await;
    let large = Tensor::from_f32(&[1, HEADS as u64, HEAD_DIM as u64], &[f32::MAX; HEADS * HEAD_DIM]);
    let (code, message) =
        shard.refused(query(1, 0, vec![AttendItem { queries: large, ..item(view, 16, 1) }])).await;
    assert_eq!(code, 15, "DATA_LOSS: {message}");
}
