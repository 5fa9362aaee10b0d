//! What operators ask of a shard.

use std::collections::BTreeMap;

use futures::future::poll_immediate;
use longshore_blocks::pool::ViewId;
use longshore_fabric::Code;
use longshore_proto::types::{BlockEntry, ListBlocks};

use super::{
    disk::{folder, tiers},
    *,
};

async fn list(shard: &Fixture, list: ListBlocks) -> Vec<BlockEntry> {
    shard.shard.list_blocks(&shard.ctx, list).await.expect("the list is valid").blocks
}

#[tokio::test]
async fn blocks_are_checked_on_the_tier_where_they_lie_and_stay_there() {
    let folder = folder();
    let shard = with_config(tiers(folder.path(), 2, 8));
    shard.store(&[1, 2, 3, 4, 5]).await;
    let before = shard.disk().await;
    let checked = list(&shard, ListBlocks { check: true, ..ListBlocks::default() }).await;
    assert_eq!(checked.iter().map(|entry| entry.key).collect::<Vec<_>>(), [1, 2, 3, 4, 5].map(key));
    for entry in &checked {
        let expected: Vec<u32> = (0..LAYERS).map(|layer| message(entry.key.0[0], layer).crc32c).collect();
        assert_eq!((entry.sound, &entry.checksums), (Some(true), &expected), "{entry:?}");
        assert_eq!(entry.bytes, block_bytes());
    }
    let mut by_tier: BTreeMap<&str, u64> = BTreeMap::new();
    checked.iter().for_each(|entry| *by_tier.entry(&entry.tier).or_default() += 1);
    assert!(by_tier["disk"] >= 3, "{by_tier:?}");
    let after = shard.disk().await;
    assert_eq!((after.promoted_total, after.hits_total), (before.promoted_total, before.hits_total));
    let unchecked = list(&shard, ListBlocks::default()).await;
    assert!(unchecked.iter().all(|entry| entry.sound.is_none() && entry.checksums.is_empty()));
}

#[tokio::test]
async fn a_check_drops_what_is_damaged_and_lists_it_once() {
    let shard = shard(4);
    shard.store(&[1, 2]).await;
    assert!(shard.shard.corrupt_for_test(key(2), 1));
    let check = ListBlocks { check: true, ..ListBlocks::default() };
    let found: Vec<_> = list(&shard, check.clone()).await.iter().map(|entry| entry.sound).collect();
    assert_eq!(found, [Some(true), Some(false)]);
    assert_eq!(list(&shard, check).await.len(), 1, "it is gone");
    assert_eq!(shard.stats().await.departures.condemned_total, 1);
}

#[tokio::test]
async fn pages_tell_where_the_next_one_begins() {
    let shard = shard(8);
    shard.store(&[1, 2, 3]).await;
    shard.put("other", block(2)).await;
    let page = |after, limit| {
        let list = ListBlocks { after, limit, ..ListBlocks::default() };
        shard.shard.list_blocks(&shard.ctx, list)
    };
    let first = page(None, 3).await.expect("the list is valid");
    assert_eq!((first.blocks.len(), first.next.is_some()), (3, true));
    let rest = page(first.next, 3).await.expect("the list is valid");
    assert_eq!((rest.blocks.len(), rest.next), (1, None));
    let view = shard.view(&[(0, 1)]).await;
    let pinned = list(&shard, ListBlocks { key_prefix: "01".to_owned(), ..ListBlocks::default() }).await;
    assert_eq!(pinned.iter().map(|entry| entry.views).collect::<Vec<_>>(), [1], "view {view}");
    let namespace_prefix = format!("{:02x}", tenant("other").as_bytes()[0]);
    let others = list(&shard, ListBlocks { namespace_prefix, ..ListBlocks::default() }).await;
    assert!(others.iter().any(|entry| entry.namespace == tenant("other")));
}

#[tokio::test]
async fn nobody_counts_on_the_copies_of_a_shard_that_is_drained() {
    let shard = shard(4);
    shard.store(&[1]).await;
    let begun = shard.shard.drain(&shard.ctx, false).await.expect("a shard can be drained");
    assert!(begun.draining && !begun.drained && begun.takes_blocks, "{begun:?}");
    let peek = Lookup { identity: identity(""), keys: vec![key(1)], peek: true };
    let refused = shard.shard.lookup(&shard.ctx, peek.clone()).await.expect_err("other shards decide by it");
    assert_eq!(refused.code, Code::FailedPrecondition);
    assert_eq!(shard.lookup("", &[1]).await, [true], "readers find it");
    shard.store(&[2]).await;
    let ended = shard.shard.drain(&shard.ctx, true).await.expect("a drain can be ended");
    assert!(!ended.draining);
    assert_eq!(shard.shard.lookup(&shard.ctx, peek).await.expect("the lookup is valid"), [true]);
}

#[tokio::test]
async fn tiles_are_counted_by_lane_and_departures_by_reason() {
    let shard = shard(2);
    shard.store(&[1, 2, 3]).await;
    shard.put("", block(3)).await;
    shard.get(&[3]).await;
    let stats = shard.stats().await;
    let local = stats.lanes.iter().find(|lane| lane.name == "local").expect("every lane is told");
    assert_eq!(local.received_bytes_total, 4 * block_bytes(), "duplicates too");
    assert_eq!((local.sent_bytes_total, local.puts_total, local.gets_total), (block_bytes(), 2, 1));
    assert_eq!((stats.departures.evicted_memory_total, stats.departures.duplicate_total), (1, 1));
    assert_eq!(stats.copies.unplaced_blocks, 2, "nobody said where they belong");
    let scraped = shard.metrics.encode();
    let line = format!("longshore_kvstore_lane_received_bytes_total{{lane=\"local\"}} {}", 4 * block_bytes());
    assert!(scraped.lines().any(|have| have == line), "{line} is not in\n{scraped}");
}

/// One that computes at a time: whoever comes after it waits, and is counted by what it waits for.
#[tokio::test]
async fn who_waits_for_a_turn_is_counted_by_kind_and_so_are_closed_views_that_are_read() {
    let folder = folder();
    let shard = with_config(Config { attend_concurrency: 1, ..tiers(folder.path(), 4, 8) });
    shard.store(&[1]).await;
    let scraped = |line: &str| shard.metrics.encode().lines().any(|have| have == line);
    for kind in ["attend", "put", "read", "disk_attend", "disk_get"] {
        assert!(scraped(&format!("longshore_kvstore_waiting_turns{{kind=\"{kind}\"}} 0")), "{kind}");
    }
    let tenant = tenant("");
    let busy = shard.shard.store.turns().turn(tenant).await;
    let mut waiting: Vec<_> = (0..2).map(|_| Box::pin(shard.shard.store.turns().turn(tenant))).collect();
    for turn in &mut waiting {
        assert!(poll_immediate(turn).await.is_none(), "there is one turn");
    }
    assert!(scraped("longshore_kvstore_waiting_turns{kind=\"attend\"} 2"), "{}", shard.metrics.encode());
    assert!(scraped("longshore_kvstore_waiting_turns{kind=\"read\"} 0"));
    assert_eq!(shard.stats().await.waiting_turns, 2);
    waiting.pop();
    assert!(scraped("longshore_kvstore_waiting_turns{kind=\"attend\"} 1"), "who gave up does not wait");
    drop((busy, waiting));

    let view = shard.view(&[(0, 1)]).await;
    let lend = |pool: &mut crate::store::Pool, now| pool.borrow_view(tenant, ViewId(view), now);
    shard.shard.store.with_pool(lend).expect("it is open");
    shard.shard.close_view(&shard.ctx, view).await.expect("it is open");
    assert_eq!(shard.stats().await.closed_views, 1);
    assert!(scraped("longshore_kvstore_closed_views 1") && scraped("longshore_kvstore_views 0"));
    shard.shard.store.with_pool(|pool, _| pool.return_view(ViewId(view)));
    assert!(scraped("longshore_kvstore_closed_views 0"));
}
