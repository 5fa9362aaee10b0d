//! A router follows what shards tell of their blocks: those that another router placed, and those that went.

use std::time::{Duration, Instant};

use futures::StreamExt;
use longshore_fabric::{CallContext, Inference, Shard};
use longshore_proto::types::{Finished, GenerateEvent, GenerateStart, PromptChunk, Sampling, ShardStats};
use longshore_router::{IndexMetrics, Router};
use longshore_tests::house::{House, Plan};
use tokio::sync::mpsc;

/// How long things may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long blocks that were just stored make way for no other.
const RETENTION_MS: u64 = 20;

/// Prompt tokens that were found, and the last event of a greedy answer of two tokens.
async fn ask(router: &Router, prompt: &[u32]) -> (u64, Finished) {
    let sampling =
        Sampling { temperature: 0.0, max_tokens: Some(2), ignore_eos: true, ..Sampling::default() };
    let start = GenerateStart { sampling, ..GenerateStart::default() };
    let (send, chunks) = mpsc::channel(1);
    send.send(PromptChunk::Tokens(prompt.to_vec())).await.expect("a channel of one takes one");
    drop(send);
    let mut events = router.generate(&CallContext::new("test"), start, chunks).await.expect("a stream");
    while let Some(event) = events.next().await {
        if let GenerateEvent::Finished(finished) = event.expect("the answer goes on") {
            return (finished.cached_tokens, finished);
        }
    }
    panic!("the answer ended without its last event");
}

fn prompt(name: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|at| (at * 7 + name * 31 + at / 16) % 200).collect()
}

async fn stats(house: &House) -> Vec<ShardStats> {
    let mut all = Vec::new();
    for shard in &house.shards {
        all.push(shard.stats(&CallContext::new("test")).await.expect("a shard tells its state"));
    }
    all
}

/// Blocks that the shards hold, and how many went so far.
async fn held(house: &House) -> (i64, u64) {
    let all = stats(house).await;
    let blocks: u64 = all.iter().map(|stats| stats.blocks).sum();
    (i64::try_from(blocks).expect("some blocks"), all.iter().map(|stats| stats.evicted_total).sum())
}

/// Waits until the index has as many blocks as the shards, and saw as many go: full shards have the same number whatever they hold.
async fn in_step(house: &House, index: &IndexMetrics, what: &str) {
    let (began, known) = (Instant::now(), || (index.blocks.get(), index.gone.get()));
    while known() != held(house).await {
        assert!(began.elapsed() < PATIENCE, "{what}: {:?} of {:?} blocks", known(), held(house).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until all that the shards hold may make way: views are closed behind an answer.
async fn forgotten(house: &House) {
    let began = Instant::now();
    let is_used = |stats: &ShardStats| stats.views + stats.open_blocks + stats.pinned_blocks > 0;
    while stats(house).await.iter().any(is_used) {
        assert!(began.elapsed() < PATIENCE, "{:?}", stats(house).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Nor is what was just stored promised to anybody any more.
    tokio::time::sleep(Duration::from_millis(RETENTION_MS * 2)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_learns_of_what_another_one_placed_and_of_what_went() {
    // 32 blocks for each shard.
    let kvstore = longshore_kvstore::Config {
        capacity_bytes: 32 * 4_096,
        retention_ms: RETENTION_MS,
        tenant_percent: 100,
        ..Default::default()
    };
    let house = House::build(Plan { kvstore, ..Plan::default() }).await;
    let (other, metrics) = house.another_router();
    let index = metrics.index.clone();
    ask(&other, &prompt(0, 40)).await;
    let began = Instant::now();
    while index.current.get() < 2 {
        assert!(began.elapsed() < PATIENCE, "both shards are followed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    // Placed through the first router, found through the other one.
    ask(&house.router, &prompt(1, 320)).await;
    in_step(&house, &index, "after another router placed blocks").await;
    let behind = index.behind.get();
    let (cached, found) = ask(&other, &prompt(1, 320)).await;
    assert_eq!((cached, index.behind.get()), (304, behind), "{found:?}");
    assert_eq!(index.spared_keys.get(), 0, "everything was there to be asked for");

    forgotten(&house).await;
    // Nobody holds this one: its first stripe is asked for and not its nineteen blocks.
    let (cached, _) = ask(&other, &prompt(2, 320)).await;
    assert_eq!((cached, index.spared_keys.get()), (0, 17), "two of 19 blocks are asked for");

    // More than the shards hold: the index forgets what they evicted, and says no more than they do.
    for name in 3..9 {
        forgotten(&house).await;
        ask(&house.router, &prompt(name, 320)).await;
    }
    in_step(&house, &index, "after evictions").await;
    assert!(index.gone.get() > 0, "nothing was evicted");
    assert!(index.blocks.get() <= 64 && index.out_of_step.get() == 0 && index.full.get() == 0);
    let resets = index.resets.get();
    let (cached, again) = ask(&other, &prompt(8, 320)).await;
    assert_eq!((cached, index.resets.get()), (304, resets), "{again:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_index_says_is_confirmed_before_it_counts() {
    let mut house = House::build(Plan { shards: 1, ..Plan::default() }).await;
    let index = house.router_metrics.index.clone();
    ask(&house.router, &prompt(1, 320)).await;
    in_step(&house, &index, "at first").await;
    assert!(index.blocks.get() >= 19);
    // The stream of the old shard lives as long as that does; a request meets the new one, which is empty.
    house.restart_shard(0);
    let (cached, _) = ask(&house.router, &prompt(1, 320)).await;
    assert_eq!((cached, index.ahead.get()), (0, 1));
}
