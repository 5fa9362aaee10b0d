//! Construction, cancellation, shutdown, metrics.

use longshore_fabric::Code;

use super::*;

#[tokio::test]
async fn shards_that_cannot_work_are_not_built() {
    let build = |change: fn(&mut Config, &mut ShardIdentity)| {
        let (_, epoch) = watch::channel(EPOCH);
        let mut config = config(1);
        let mut identity = ShardIdentity {
            shard_id: ShardId("kv-0".to_owned()),
            deployment: deployment(),
            epoch,
            geometry: geometry(),
            tile_shape: shape(),
            layers: LAYERS,
        };
        change(&mut config, &mut identity);
        KvStore::new(config, identity, &ComputePool::serial(), &Tasks::new(), &Metrics::new())
            .err()
            .map(|error| error.to_string())
    };
    assert_eq!(build(|_, _| {}), None);
    for (change, field) in [
        ((|config, _| config.capacity_bytes -= 1) as fn(&mut Config, &mut ShardIdentity), "`budget_bytes`"),
        (|_, identity| identity.layers = 0, "`layers`"),
        (|_, identity| identity.tile_shape.kv_heads = 0, "`kv_heads`"),
        (|_, identity| identity.geometry = Geometry::default(), "`block_tokens`"),
    ] {
        let error = build(change).expect("the shard is not built");
        assert!(error.contains(field), "{error}");
    }
}

#[tokio::test]
async fn streams_end_with_a_reason_when_the_process_stops() {
    let shard = shard(2);
    let (_tiles, receiver) = mpsc::channel(1);
    let put = shard.shard.put_blocks(&shard.ctx, identity(""), wire_shape(), receiver).await.unwrap();
    let (_queries, receiver) = mpsc::channel(1);
    let attend = shard.shard.attend(&shard.ctx, receiver).await.unwrap();
    let late = shard.tasks.drain(PATIENCE).await;
    assert_eq!(late, Vec::<String>::new());
    let put = collect(put).await.pop().expect("a reason").unwrap_err();
    let attend = collect(attend).await.pop().expect("a reason").unwrap_err();
    assert_eq!((put.code, attend.code), (Code::Unavailable, Code::Unavailable));
    assert!(put.retryable() && put.message.contains("hint:"), "{put}");
}

#[tokio::test]
async fn a_caller_that_leaves_frees_what_it_held() {
    let shard = shard(2);
    let ctx = CallContext::new("leaves");
    let (tiles, receiver) = mpsc::channel(1);
    let acks = shard.shard.put_blocks(&ctx, identity(""), wire_shape(), receiver).await.unwrap();
    tiles.send(message(1, 0)).await.unwrap();
    shard.settled("begun", |stats| stats.open_blocks == 1).await;
    ctx.cancel.cancel();
    let reason = collect(acks).await.pop().expect("a reason").unwrap_err();
    assert_eq!(reason.code, Code::Cancelled);
    shard.settled("cancelled", |stats| stats.used_bytes == 0).await;

    let hurried = CallContext::new("hurried").with_timeout(Duration::from_millis(20));
    let (_queries, receiver) = mpsc::channel(1);
    let answers = shard.shard.attend(&hurried, receiver).await.unwrap();
    let reason = collect(answers).await.pop().expect("a reason").unwrap_err();
    assert_eq!(reason.code, Code::DeadlineExceeded);
}

#[tokio::test]
async fn a_reader_that_stops_reading_holds_up_nobody_else() {
    let shard = with_config(Config { attend_concurrency: 1, attend_message_bytes: 1 << 10, ..config(16) });
    let names: Vec<u8> = (1..=12).collect();
    shard.store(&names).await;
    let blocks: Vec<_> = names.iter().map(|name| (u64::from(*name) - 1, *name)).collect();
    let view = shard.view(&blocks).await;
    others_go_on_beside_an_unread_stream(&shard, view).await;
}

/// Asks for attention over 12 blocks on a stream that nobody reads, and then on others, which must be answered.
pub(super) async fn others_go_on_beside_an_unread_stream(shard: &Fixture, view: u64) {
    let (queries, receiver) = mpsc::channel(16);
    let _unread = shard.shard.attend(&shard.ctx, receiver).await.unwrap();
    for id in 0..16 {
        queries.send(query(id, 0, vec![item(view, 192, 3), item(view, 192, 3)])).await.unwrap();
    }
    for id in 0..20 {
        partials_of(&shard.attend(vec![query(id, 0, vec![item(view, 192, 1)])]).await, id);
    }
}

#[tokio::test]
async fn the_scrape_tells_the_state_of_the_moment() {
    let shard = shard(2);
    shard.store(&[1]).await;
    shard.view(&[(0, 1)]).await;
    let scraped = shard.metrics.encode();
    for line in [
        format!("longshore_kvstore_used_bytes {}", block_bytes()),
        format!("longshore_kvstore_capacity_bytes {}", 2 * block_bytes()),
        "longshore_kvstore_pinned_blocks 1".to_owned(),
        "longshore_kvstore_views 1".to_owned(),
        "longshore_kvstore_stored_blocks_total 1".to_owned(),
        format!("longshore_kvstore_stored_bytes_total {}", block_bytes()),
    ] {
        assert!(scraped.lines().any(|have| have == line), "{line} is not in\n{scraped}");
    }
}
