//! Tenants that take what they can get: typed answers, bounded memory, and others go on.

use longshore_fabric::Code;

use super::*;

#[tokio::test]
async fn views_of_others_blocks_are_missing_like_blocks_that_are_nowhere() {
    let shard = shard(4);
    shard.store(&[1]).await;
    let nowhere = shard.open("other", &[(0, 9)], None).await.unwrap();
    let others = shard.open("other", &[(0, 1)], None).await.unwrap();
    assert_eq!(nowhere, OpenedView::Missing(vec![key(9)]));
    assert_eq!(others, OpenedView::Missing(vec![key(1)]));
    let stats = shard.stats().await;
    assert_eq!((stats.views, stats.pinned_blocks), (0, 0), "nothing is kept for it");
    // Neither may it read, append to or close over what the owner has.
    let view = shard.view(&[(0, 1)]).await;
    let get = GetBlocks::whole(identity("other"), vec![key(1)]);
    let read = collect(shard.shard.get_blocks(&shard.ctx, get).await.unwrap()).await;
    assert_eq!(read, [Ok(None)]);
    assert_eq!(shard.put("other", block(1)).await[0].outcome, PutOutcome::Stored, "not even by a duplicate");
    let answers = shard.attend(vec![query(1, 0, vec![item(view, 16, 1)])]).await;
    assert_eq!(partials_of(&answers, 1).0.len(), 1, "the owner's view goes on");
}

#[tokio::test]
async fn views_that_are_never_closed_end_at_the_limit_and_others_go_on() {
    let shard = with_config(Config { views_max: 8, ..config(4) });
    shard.store(&[1]).await;
    let own = shard.view(&[(0, 1)]).await;
    shard.put("greedy", block(2)).await;
    for _ in 0..7 {
        let opened = shard.open("greedy", &[(0, 2)], None).await.unwrap();
        assert!(matches!(opened, OpenedView::Open { .. }));
    }
    for _ in 0..100 {
        let refused = shard.open("greedy", &[(0, 2)], None).await.unwrap_err();
        assert_eq!(refused.code, Code::ResourceExhausted, "{refused}");
        assert!(refused.retry_after.is_some() && refused.message.contains("views"), "{refused}");
    }
    assert_eq!(shard.stats().await.views, 8);
    let answers = shard.attend(vec![query(1, 0, vec![item(own, 16, 1)])]).await;
    assert_eq!(partials_of(&answers, 1).0.len(), 1);
    shard.store(&[3]).await;
    assert_eq!(shard.get(&[3]).await, [Some(block(3))]);
}

#[tokio::test(start_paused = true)]
async fn leases_that_are_never_released_run_out() {
    let shard = with_config(Config { retention_ms: 1_000, ..config(2) });
    shard.store(&[1, 2]).await;
    shard.view(&[(0, 1), (1, 2)]).await;
    // Everything is pinned: others are told so, and nothing is evicted under the view.
    assert_eq!(shard.put("late", block(3)).await[0].outcome, PutOutcome::NoSpace);
    assert_eq!(shard.stats().await.pinned_blocks, 2);
    tokio::time::sleep(Duration::from_secs(62)).await;
    let stats = shard.stats().await;
    assert_eq!((stats.views, stats.pinned_blocks), (0, 0));
    assert_eq!(shard.put("late", block(3)).await[0].outcome, PutOutcome::Stored);
}

#[tokio::test]
async fn blocks_that_are_begun_and_never_finished_keep_to_the_budget_and_go_with_their_writer() {
    let shard = shard(4);
    let (tiles, receiver) = mpsc::channel(1);
    let mut acks =
        shard.shard.put_blocks(&shard.ctx, identity("greedy"), wire_shape(), receiver).await.unwrap();
    let feed = async {
        // Their first layers only.
        for name in 1..=200 {
            tiles.send(message(name, 0)).await.unwrap();
        }
    };
    let refusals = async {
        for _ in 0..196 {
            let ack = acks.next().await.expect("a refusal").expect("the stream goes on");
            assert_eq!(ack.outcome, PutOutcome::NoSpace, "{ack:?}");
        }
    };
    tokio::time::timeout(PATIENCE, async { tokio::join!(feed, refusals) }).await.expect("each is refused");
    let stats = shard.stats().await;
    assert_eq!((stats.open_blocks, stats.used_bytes), (4, 4 * block_bytes()));
    assert_eq!(shard.put("", block(1)).await[0].outcome, PutOutcome::NoSpace, "others are told");
    drop((tiles, acks));
    shard.settled("all of it is free again", |stats| stats.used_bytes == 0).await;
    shard.store(&[1, 2, 3, 4]).await;
}

#[tokio::test]
async fn a_writer_that_never_reads_its_acknowledgements_stops_alone() {
    let shard = shard(8);
    let (tiles, receiver) = mpsc::channel(1);
    let unread = shard.shard.put_blocks(&shard.ctx, identity("deaf"), wire_shape(), receiver).await.unwrap();
    let flood = async {
        // Duplicates and refusals: each is answered, and nobody listens.
        for name in (1..=250).cycle() {
            if tiles.send(TileMessage { crc32c: 0, ..message(name, 0) }).await.is_err() {
                break;
            }
        }
    };
    let others = async {
        for name in 1..=40 {
            shard.store(&[name]).await;
            assert_eq!(shard.get(&[name]).await, [Some(block(name))]);
        }
    };
    tokio::select! {
        () = flood => panic!("its stream ended"),
        () = others => {}
    }
    assert!(shard.stats().await.used_bytes <= 8 * block_bytes());
    drop((tiles, unread));
    shard.settled("nothing is left of it", |stats| stats.open_blocks == 0).await;
}

#[tokio::test]
async fn tiles_of_absurd_sizes_are_refused_and_take_no_memory() {
    let shard = shard(2);
    for size in [0, 1, shape().bytes() - 1, shape().bytes() + 1, 32 << 20] {
        let data = Bytes::from(vec![0; size]);
        let tile =
            TileMessage { key: key(1), layer: 0, crc32c: crc32c(&data), data: data.into(), place: None };
        let acks = shard.put("", vec![tile]).await;
        assert_eq!(outcomes(&acks), [(1, PutOutcome::Corrupt)], "{size}");
        assert!(acks[0].message.contains("body"), "{size}: {}", acks[0].message);
        assert_eq!(shard.stats().await.used_bytes, 0, "{size}");
    }
    shard.store(&[1]).await;
}
