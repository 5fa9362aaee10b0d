//! Shards that are slow and alive: what they are asked for is not asked for anew, and nobody is called late because of a hasty caller.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use longshore_blocks::quorum::CopyRule;
use longshore_engine::{
    EngineOptions, Error, Logits, Sequence, ShardLinks, StepInput,
    testing::{Faults, TestCluster, tokens},
};
use longshore_fabric::CallContext;

const BLOCK: usize = 16;

/// Two shards that have all blocks of one stripe.
async fn cluster(patience: Duration) -> (TestCluster, Arc<ShardLinks>, Vec<u32>) {
    let (options, rule) = (EngineOptions { patience, ..EngineOptions::default() }, CopyRule::new(2, 2));
    let cluster = TestCluster::with_copies(2, options, rule.expect("the rule can be"));
    let prompt = tokens(12, 3 * BLOCK);
    cluster.store(b"", &prompt).await;
    let links = cluster.links();
    (cluster, links, prompt)
}

fn slow(cluster: &TestCluster, delay: impl Fn(&Faults) -> &AtomicU64, ms: u64) {
    cluster.shards.iter().for_each(|shard| delay(&shard.faults).store(ms, Ordering::SeqCst));
}

fn opened(cluster: &TestCluster) -> Vec<u64> {
    cluster.shards.iter().map(|shard| shard.opened()).collect()
}

async fn open(
    cluster: &TestCluster,
    links: &Arc<ShardLinks>,
    ctx: &CallContext,
    prompt: &[u32],
) -> Result<Sequence, Error> {
    let (identity, links) = (cluster.identity(b""), Arc::clone(links));
    Sequence::open(&cluster.engine, ctx, identity, links, prompt, 60_000).await
}

/// What is under way ends.
async fn settle() {
    tokio::time::sleep(Duration::from_secs(30)).await;
}

#[tokio::test(start_paused = true)]
async fn each_copy_is_asked_once_and_the_first_one_is_taken() {
    let (cluster, links, prompt) = cluster(Duration::from_millis(500)).await;
    slow(&cluster, |faults| &faults.open_delay_ms, 5_000);
    let began = tokio::time::Instant::now();
    let sequence = open(&cluster, &links, &CallContext::new("test"), &prompt).await;
    let sequence = sequence.expect("they are waited for");
    assert_eq!(began.elapsed().as_secs(), 5, "the open that began first is the one that is taken");
    settle().await;
    assert_eq!((opened(&cluster), cluster.open_views()), (vec![1, 1], 1));
    drop(sequence);
    settle().await;
    assert_eq!(cluster.open_views(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_stripe_is_begun_at_each_copy_once() {
    let (cluster, links, prompt) = cluster(Duration::from_millis(500)).await;
    let mut sequence = Sequence::new(&cluster.engine, cluster.identity(b""), links);
    let input = StepInput { sequence: &mut sequence, tokens: &prompt, logits: Logits::None };
    cluster.engine.step(&CallContext::new("test"), &mut [input], &mut ()).expect("all of it is here");
    slow(&cluster, |faults| &faults.open_delay_ms, 5_000);
    sequence.append_remote(&CallContext::new("test"), 1, 60_000).await.expect("they are waited for");
    assert_eq!((sequence.remote_blocks(), sequence.broken()), (1, None));
    settle().await;
    assert_eq!((opened(&cluster), cluster.open_views()), (vec![1, 1], 1));
    drop(sequence);
    settle().await;
    assert_eq!(cluster.open_views(), 0);
}

#[tokio::test(start_paused = true)]
async fn who_has_little_time_gets_what_was_asked_for_first() {
    let (cluster, links, prompt) = cluster(Duration::from_secs(10)).await;
    slow(&cluster, |faults| &faults.open_delay_ms, 8_000);
    let ctx = CallContext::new("test").with_timeout(Duration::from_secs(9));
    let sequence = open(&cluster, &links, &ctx, &prompt).await.expect("the first one is in time");
    drop(sequence);
    settle().await;
    assert_eq!((opened(&cluster), cluster.open_views()), (vec![1, 1], 0));
}

#[tokio::test(start_paused = true)]
async fn slow_copies_do_not_send_a_sequence_to_and_fro() {
    // Slow at both; and quick to take over what they are slow to append to.
    for (open_ms, append_ms) in [(5_000, 5_000), (1_000, 6_000)] {
        let (cluster, links, prompt) = cluster(Duration::from_millis(500)).await;
        let mut sequence = Sequence::new(&cluster.engine, cluster.identity(b""), links);
        let input = StepInput { sequence: &mut sequence, tokens: &prompt, logits: Logits::None };
        cluster.engine.step(&CallContext::new("test"), &mut [input], &mut ()).expect("all of it is here");
        let ctx = CallContext::new("test").with_timeout(Duration::from_secs(600));
        sequence.append_remote(&ctx, 1, 60_000).await.expect("the stripe is begun");
        slow(&cluster, |faults| &faults.open_delay_ms, open_ms);
        slow(&cluster, |faults| &faults.append_delay_ms, append_ms);
        sequence.append_remote(&ctx, 1, 60_000).await.expect("one of them is waited for");
        assert_eq!((sequence.remote_blocks(), sequence.broken()), (2, None));
        settle().await;
        assert_eq!(cluster.open_views(), 1, "{open_ms}, {append_ms}");
        assert!(opened(&cluster).iter().sum::<u64>() <= 10, "{:?}", opened(&cluster));
        drop(sequence);
        settle().await;
        assert_eq!(cluster.open_views(), 0, "{open_ms}, {append_ms}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_shard_is_late_for_others_only_when_it_was_waited_for_as_is_usual() {
    let (cluster, links, prompt) = cluster(Duration::from_millis(500)).await;
    let usual = CallContext::new("test");
    open(&cluster, &links, &usual, &prompt).await.expect("all is well");
    let first = opened(&cluster).iter().position(|&views| views == 1).expect("one was asked");
    let delay = &cluster.shards[first].faults.open_delay_ms;

    // A third of its time is less than the shard needs.
    delay.store(25, Ordering::SeqCst);
    let hasty = CallContext::new("test").with_timeout(Duration::from_millis(60));
    open(&cluster, &links, &hasty, &prompt).await.expect("the other one is sooner");
    assert_eq!(opened(&cluster)[1 - first], 1);
    open(&cluster, &links, &usual, &prompt).await.expect("all is well");
    assert_eq!(opened(&cluster)[1 - first], 1, "the first one is asked first as before");

    delay.store(5_000, Ordering::SeqCst);
    open(&cluster, &links, &usual, &prompt).await.expect("the other one is sooner");
    delay.store(0, Ordering::SeqCst);
    let before = opened(&cluster);
    open(&cluster, &links, &usual, &prompt).await.expect("the other one is asked first");
    let after = opened(&cluster);
    assert_eq!((after[first], after[1 - first]), (before[first], before[1 - first] + 1));
}
