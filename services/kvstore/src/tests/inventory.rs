//! What a shard tells of its blocks, to watchers that come, fall behind and come back.

use std::collections::BTreeSet;

use longshore_blocks::BlockPlace;
use longshore_fabric::Code;
use longshore_proto::types::{InventoryChange, InventoryNews, WatchInventory};

use super::*;

/// What a watcher knows: the model that every message is applied to.
#[derive(Default)]
pub(super) struct Watcher {
    held: BTreeSet<BlockKey>,
    after: Option<(u64, u64)>,
    resets: usize,
}

impl Watcher {
    fn apply(&mut self, news: &InventoryNews) {
        if news.reset {
            self.held.clear();
            self.resets += 1;
        }
        for (_, key, change) in &news.events {
            let fresh = match change {
                InventoryChange::Stored => self.held.insert(*key),
                _ => self.held.remove(key),
            };
            assert!(fresh, "{change:?} of {key} is told twice");
        }
        self.after = Some((news.incarnation, news.told));
    }

    /// Reads until it knows `names`.
    pub(super) async fn reads(&mut self, shard: &Fixture, salt: &str, names: &[u8]) {
        let watch = WatchInventory { identity: identity(salt), after: self.after };
        let mut news = shard.shard.watch_inventory(&shard.ctx, watch).await.expect("the watch is valid");
        let wanted: BTreeSet<BlockKey> = names.iter().map(|name| key(*name)).collect();
        loop {
            let next = tokio::time::timeout(PATIENCE, news.next()).await.expect("news come");
            self.apply(&next.expect("the stream goes on").expect("the stream goes on"));
            if self.held == wanted {
                return;
            }
        }
    }
}

#[tokio::test]
async fn a_watcher_that_comes_back_is_told_what_it_missed() {
    let shard = shard(3);
    let mut watcher = Watcher::default();
    shard.store(&[1]).await;
    watcher.reads(&shard, "", &[1]).await;
    assert_eq!(watcher.resets, 1, "it knew nothing");
    shard.store(&[2, 3]).await;
    watcher.reads(&shard, "", &[1, 2, 3]).await;
    shard.store(&[4]).await;
    watcher.reads(&shard, "", &[2, 3, 4]).await;
    assert!(shard.shard.corrupt_for_test(key(3), 0));
    get_all(&shard, 3).await;
    watcher.reads(&shard, "", &[2, 4]).await;
    assert_eq!(watcher.resets, 1, "from then on it was told changes only");
    watcher.after = watcher.after.map(|(incarnation, _)| (incarnation + 1, 0));
    watcher.reads(&shard, "", &[2, 4]).await;
    assert_eq!(watcher.resets, 2, "another incarnation's numbers mean nothing");
}

async fn get_all(shard: &Fixture, name: u8) {
    let get = longshore_proto::types::GetBlocks::whole(identity(""), vec![key(name)]);
    collect(shard.shard.get_blocks(&shard.ctx, get).await.expect("the call is valid")).await;
}

#[tokio::test]
async fn nobody_is_told_of_anothers_blocks() {
    let shard = shard(4);
    shard.store(&[1]).await;
    let mut watcher = Watcher::default();
    watcher.reads(&shard, "other", &[]).await;
    shard.put("other", block(2)).await;
    watcher.reads(&shard, "other", &[2]).await;
    let stale = Identity { shard_map_epoch: EPOCH + 1, ..identity("") };
    let refused =
        shard.shard.watch_inventory(&shard.ctx, WatchInventory { identity: stale, after: None }).await;
    assert_eq!(refused.err().map(|error| error.code), Some(Code::FailedPrecondition));
}

#[tokio::test(start_paused = true)]
async fn the_digest_comes_without_news_and_tells_what_is_held() {
    let shard = shard(4);
    shard.store(&[1, 2]).await;
    let watch = WatchInventory { identity: identity(""), after: None };
    let mut news = shard.shard.watch_inventory(&shard.ctx, watch).await.expect("the watch is valid");
    let first = news.next().await.expect("a snapshot").expect("a snapshot");
    assert_eq!((first.events.len(), first.reset), (2, true));
    let quiet = news.next().await.expect("a digest").expect("a digest");
    let word = |name: u8| u64::from_le_bytes([name; 8]);
    assert_eq!((quiet.events.len(), quiet.blocks, quiet.digest), (0, 2, word(1) ^ word(2)));
}

#[tokio::test]
async fn a_peek_promises_nothing() {
    let shard = shard(4);
    shard.store(&[1]).await;
    let peek = Lookup { identity: identity(""), keys: vec![key(1), key(2)], peek: true };
    assert_eq!(shard.shard.lookup(&shard.ctx, peek).await.expect("the lookup is valid"), [true, false]);
    let stats = shard.stats().await;
    assert_eq!((stats.hits_total, stats.misses_total), (0, 0));
}

#[tokio::test]
async fn places_come_with_tiles_and_go_with_blocks() {
    let shard = shard(1);
    let place = BlockPlace { stripe_seed: [7; 32], index: 5 };
    let placed = |name: u8| -> Vec<TileMessage> {
        block(name).into_iter().map(|tile| TileMessage { place: Some(place), ..tile }).collect()
    };
    shard.put("", placed(1)).await;
    assert_eq!(shard.shard.place_for_test(identity("").namespace, key(1)), Some(place));
    shard.put("", block(2)).await;
    assert_eq!(shard.shard.place_for_test(identity("").namespace, key(1)), None, "it made room");
    assert_eq!(shard.shard.place_for_test(identity("").namespace, key(2)), None, "nobody said");
    let acks = shard.put("", placed(2)).await;
    assert_eq!(outcomes(&acks), [(2, PutOutcome::Duplicate)]);
    assert_eq!(
        shard.shard.place_for_test(identity("").namespace, key(2)),
        Some(place),
        "learnt from a duplicate"
    );
}
