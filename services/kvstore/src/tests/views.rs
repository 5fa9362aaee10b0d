//! Opening, appending to, keeping and losing views.

use longshore_fabric::Code;

use super::*;

#[tokio::test]
async fn a_view_opens_whole_or_names_what_is_missing() {
    let shard = shard(4);
    shard.store(&[1, 2]).await;
    let opened = shard.open("", &[(0, 1), (1, 7), (2, 8)], None).await;
    assert_eq!(opened, Ok(OpenedView::Missing(vec![key(7), key(8)])));
    assert_eq!(shard.open("other", &[(0, 1)], None).await, Ok(OpenedView::Missing(vec![key(1)])));
    assert_eq!(shard.stats().await.views, 0);
    let view = shard.view(&[(0, 1), (1, 2)]).await;
    assert_ne!(view, 0);
    let stats = shard.stats().await;
    assert_eq!((stats.views, stats.pinned_blocks), (1, 2));
    for _ in 0..2 {
        shard.shard.close_view(&shard.ctx, view).await.unwrap();
    }
    let stats = shard.stats().await;
    assert_eq!((stats.views, stats.pinned_blocks), (0, 0));
}

#[tokio::test]
async fn appending_keeps_the_id_and_may_be_repeated() {
    let shard = shard(4);
    shard.store(&[1, 2, 3]).await;
    let view = shard.view(&[(0, 1)]).await;
    // Of nothing: it renews the lease.
    for blocks in [&[][..], &[(1, 2)], &[(1, 2)], &[], &[(1, 2), (2, 3)]] {
        let appended = shard.open("", blocks, Some(view)).await;
        assert_eq!(appended, Ok(OpenedView::Open { view_id: view }));
    }
    let missing = shard.open("", &[(3, 9)], Some(view)).await;
    assert_eq!(missing, Ok(OpenedView::Missing(vec![key(9)])));
    let stats = shard.stats().await;
    assert_eq!((stats.views, stats.pinned_blocks), (1, 3));
    let answers = shard.attend(vec![query(1, 0, vec![item(view, 64, 1)])]).await;
    let stripes: Vec<u64> = partials_of(&answers, 1).0.iter().map(|partial| partial.stripe).collect();
    assert_eq!(stripes, [0, 1]);
}

#[tokio::test]
async fn appending_needs_no_further_view() {
    let shard = with_config(Config { views_max: 1, ..config(4) });
    shard.store(&[1, 2]).await;
    let view = shard.view(&[(0, 1)]).await;
    assert_eq!(shard.open("", &[(0, 1)], None).await.unwrap_err().code, Code::ResourceExhausted);
    let appended = shard.open("", &[(1, 2)], Some(view)).await;
    assert_eq!(appended, Ok(OpenedView::Open { view_id: view }));
    let stats = shard.stats().await;
    assert_eq!((stats.views, stats.pinned_blocks), (1, 2));
}

#[tokio::test]
async fn only_the_tenant_of_a_view_may_append_to_it() {
    let shard = shard(4);
    shard.store(&[1]).await;
    assert_eq!(outcomes(&shard.put("other", block(2)).await), [(2, PutOutcome::Stored)]);
    let view = shard.view(&[(0, 1)]).await;
    let foreign = shard.open("other", &[(1, 2)], Some(view)).await.unwrap_err();
    let unknown = shard.open("other", &[(1, 2)], Some(view ^ 1)).await.unwrap_err();
    assert_eq!((foreign.code, unknown.code), (Code::NotFound, Code::NotFound));
    assert_eq!(foreign.message, unknown.message.replace(&(view ^ 1).to_string(), &view.to_string()));
    assert_eq!(shard.stats().await.views, 1, "nothing stays open");
}

#[tokio::test]
async fn a_block_that_rotted_is_missing_and_the_views_that_hold_it_fail() {
    let shard = shard(4);
    shard.store(&[1, 2]).await;
    let earlier = shard.view(&[(0, 1), (1, 2)]).await;
    assert!(shard.shard.corrupt_for_test(key(2), LAYERS - 1));
    let opened = shard.open("", &[(0, 1), (1, 2)], None).await;
    assert_eq!(opened, Ok(OpenedView::Missing(vec![key(2)])));
    assert_eq!(shard.lookup("", &[1, 2]).await, [true, false]);
    let (code, message) = shard.refused(query(1, 0, vec![item(earlier, 64, 1)])).await;
    assert_eq!(code, 15, "DATA_LOSS: {message}");
    assert_eq!(shard.stats().await.corrupt_total, 1);

    // Stored again, it serves again; the broken copy goes with the view that held it.
    shard.store(&[2]).await;
    shard.view(&[(0, 1), (1, 2)]).await;
    assert_eq!(shard.stats().await.used_bytes, 3 * block_bytes());
    shard.shard.close_view(&shard.ctx, earlier).await.unwrap();
    assert_eq!(shard.stats().await.used_bytes, 2 * block_bytes());
}

/// Moves the clock. It stands still only for the jump: a runtime that waits for compute with a paused clock would jump by
/// itself.
async fn pass(seconds: u64) {
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(seconds)).await;
    tokio::time::resume();
}

#[tokio::test]
async fn views_expire_by_their_last_use() {
    let shard = shard(4);
    shard.store(&[1]).await;
    let (view, idle) = (shard.view(&[(0, 1)]).await, shard.view(&[(0, 1)]).await);
    let ask = |view| shard.attend(vec![query(1, 0, vec![item(view, 64, 1)])]);
    pass(50).await;
    partials_of(&ask(view).await, 1);
    pass(20).await;
    shard.settled("the idle view ends", |stats| stats.views == 1).await;
    partials_of(&ask(view).await, 1);
    let (code, message) = shard.refused(query(1, 0, vec![item(idle, 64, 1)])).await;
    assert_eq!(code, 5, "NOT_FOUND: {message}");
    pass(61).await;
    shard.settled("the other ends", |stats| stats.views == 0 && stats.pinned_blocks == 0).await;
    assert_eq!(shard.lookup("", &[1]).await, [true], "its blocks stay");
}
