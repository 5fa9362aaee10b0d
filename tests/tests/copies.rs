//! Two copies of every block: one shard that dies, hangs, comes back empty, joins or leaves loses no acknowledged block and no
//! token, and after the dust settles every block has its copies where they belong.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures::StreamExt;
use longshore_blocks::{BlockKey, EXACT_PREFILL, KeyChain, quorum::CopyRule};
use longshore_fabric::{CallContext, Inference, Shard};
use longshore_kvstore::RepairConfig;
use longshore_proto::types::{
    Finished, GenerateEvent, GenerateStart, Identity, Lookup, PromptChunk, Sampling, ShardStats,
};
use longshore_tests::{
    house::{House, Plan},
    mortal::{Fate, Mortal},
};
use tokio::sync::{mpsc, watch};

/// How long the dust may take to settle on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A house with two copies of each block, and what becomes of its shards.
struct Copies {
    house: House,
    fates: Arc<Mutex<Vec<watch::Sender<Fate>>>>,
}

impl Copies {
    async fn build(shards: usize) -> Self {
        let fates: Arc<Mutex<Vec<watch::Sender<Fate>>>> = Arc::default();
        let seen = Arc::clone(&fates);
        let wrap = move |index: usize, inner| -> Arc<dyn Shard> {
            let (send, fate) = watch::channel(Fate::Alive);
            let mut fates = seen.lock().expect("no test panics while it holds the fates");
            fates.insert(index, send);
            Arc::new(Mortal::new(inner, fate))
        };
        let repair = RepairConfig {
            ping_interval_ms: 20,
            down_after_ms: 300,
            scan_interval_ms: 500,
            retry_ms: 50,
            ..RepairConfig::default()
        };
        let kvstore = longshore_kvstore::Config { retention_ms: 200, repair, ..Default::default() };
        let rule = CopyRule::new(2, 2).expect("a rule");
        let plan = Plan { shards, wrap: Box::new(wrap), rule, kvstore, ..Plan::default() };
        Self { house: House::build(plan).await, fates }
    }

    fn fate(&self, shard: usize, fate: Fate) {
        let fates = self.fates.lock().expect("no test panics while it holds the fates");
        fates[shard].send_replace(fate);
    }

    /// Comes back empty.
    fn restart(&mut self, shard: usize) {
        // The wrap puts a new fate in the place of the old one.
        let old = self.fates.lock().expect("no test panics while it holds the fates").remove(shard);
        self.house.restart_shard(shard);
        drop(old);
    }

    /// Greedy answer; `after` is called when so many tokens came.
    async fn generate(
        &self,
        prompt: &[u32],
        max_tokens: u32,
        (count, after): (usize, &dyn Fn()),
    ) -> (Vec<u32>, Finished) {
        let sampling = Sampling {
            temperature: 0.0,
            max_tokens: Some(max_tokens),
            ignore_eos: true,
            ..Sampling::default()
        };
        let start = GenerateStart { sampling, ..GenerateStart::default() };
        let (send, chunks) = mpsc::channel(1);
        send.send(PromptChunk::Tokens(prompt.to_vec())).await.expect("a channel of one takes one");
        drop(send);
        let mut events =
            self.house.router.generate(&CallContext::new("test"), start, chunks).await.expect("a stream");
        let (mut tokens, mut called) = (Vec::new(), false);
        while let Some(event) = events.next().await {
            match event.expect("the answer goes on") {
                GenerateEvent::Tokens(piece) => tokens.extend(piece.token_ids),
                GenerateEvent::Finished(finished) => return (tokens, finished),
                _ => {}
            }
            if tokens.len() >= count && !called {
                called = true;
                after();
            }
        }
        panic!("the answer ended without its last event");
    }

    fn identity(&self) -> Identity {
        Identity {
            deployment: self.house.deployment,
            namespace: self.house.deployment.namespace(EXACT_PREFILL, b""),
            shard_map_epoch: self.house.map().epoch(),
        }
    }

    /// Which shards hold each of the keys, among `alive`.
    async fn holders(&self, keys: &[BlockKey], alive: &BTreeSet<usize>) -> Vec<BTreeSet<usize>> {
        let mut holders = vec![BTreeSet::new(); keys.len()];
        for &shard in alive {
            let lookup = Lookup { identity: self.identity(), keys: keys.to_vec(), peek: true };
            let held = self.house.shards[shard].lookup(&CallContext::new("test"), lookup).await;
            // A shard that does not see the newest epoch yet holds nothing yet.
            for (holders, held) in holders.iter_mut().zip(held.unwrap_or_default()) {
                if held {
                    holders.insert(shard);
                }
            }
        }
        holders
    }

    /// Waits until every shard sees the newest shard map.
    async fn informed(&self) {
        let began = Instant::now();
        while self.stats().await.iter().any(|stats| stats.shard_map_epoch != self.house.map().epoch()) {
            assert!(began.elapsed() < PATIENCE, "{:?}", self.stats().await);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Waits until the blocks of `tokens` lie exactly where they belong among the shards that live.
    async fn settled(&self, tokens: &[u32], alive: &BTreeSet<usize>) {
        let mut chain = KeyChain::new(self.identity().namespace, self.house.geometry);
        chain.push(tokens);
        let map = self.house.map();
        let name =
            |at: usize| map.shards()[at].id.0["kv-".len()..].parse::<usize>().expect("ids end in numbers");
        let expected: Vec<BTreeSet<usize>> = (0..chain.keys().len() as u64)
            .map(|block| {
                let owners = map.owners_among(&chain.stripe_seed(block), 2, |at| alive.contains(&name(at)));
                owners.into_iter().map(name).collect()
            })
            .collect();
        let began = Instant::now();
        loop {
            let holders = self.holders(chain.keys(), alive).await;
            if holders == expected {
                return;
            }
            assert!(
                began.elapsed() < PATIENCE,
                "{holders:?} instead of {expected:?}: {:?}",
                self.stats().await
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn stats(&self) -> Vec<ShardStats> {
        let ctx = CallContext::new("test");
        let mut all = Vec::new();
        for shard in &self.house.shards {
            all.push(shard.stats(&ctx).await.expect("statistics"));
        }
        all
    }

    /// Waits until nothing is open, pinned or to be sent on any of the shards.
    async fn quiet(&self, shards: &BTreeSet<usize>) {
        let began = Instant::now();
        loop {
            let stats = self.stats().await;
            let busy = |stats: &ShardStats| {
                stats.views + stats.open_blocks + stats.pinned_blocks + stats.repair.backlog_blocks > 0
            };
            if !shards.iter().any(|&shard| busy(&stats[shard])) {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{stats:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn prompt(length: usize) -> Vec<u32> {
    (0..length).map(|i| 3 + ((i * 7 + i / 5) % 200) as u32).collect()
}

fn nothing() {}

/// The prompt's blocks that are stored: at least one token is left for the decode worker.
fn stored(tokens: &[u32]) -> &[u32] {
    &tokens[..(tokens.len() - 1) / 16 * 16]
}

async fn expected(max_tokens: u32) -> Vec<u32> {
    let one = House::build(Plan { shards: 1, ..Plan::default() }).await;
    one.generate(&prompt(300), max_tokens).await.expect("an answer").tokens
}

#[tokio::test(flavor = "multi_thread")]
async fn every_acknowledged_block_has_two_copies_where_they_belong() {
    let copies = Copies::build(4).await;
    let (tokens, _) = copies.generate(&prompt(300), 40, (usize::MAX, &nothing)).await;
    assert_eq!(tokens, expected(40).await, "copies change no token");
    let all: BTreeSet<usize> = (0..4).collect();
    copies.settled(stored(&prompt(300)), &all).await;
    copies.quiet(&all).await;
    let (again, finished) = copies.generate(&prompt(300), 40, (usize::MAX, &nothing)).await;
    assert_eq!((again, finished.cached_tokens), (tokens, 288));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_dies_or_hangs_while_decoding_costs_no_token() {
    let expected = expected(60).await;
    for fate in [Fate::Dead, Fate::Hung] {
        for victim in 0..3 {
            let copies = Copies::build(3).await;
            let after = || copies.fate(victim, fate);
            let (tokens, finished) = copies.generate(&prompt(300), 60, (25, &after)).await;
            assert_eq!(tokens, expected, "{fate:?} {victim}");
            assert_eq!(finished.resumed, 0, "{fate:?} {victim}: its other copies answer, nobody starts anew");
            let left: BTreeSet<usize> = (0..3).filter(|shard| *shard != victim).collect();
            copies.settled(stored(&prompt(300)), &left).await;
            copies.quiet(&left).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_shard_takes_no_part_in_storing() {
    let copies = Copies::build(3).await;
    copies.fate(1, Fate::Dead);
    let (tokens, _) = copies.generate(&prompt(300), 40, (usize::MAX, &nothing)).await;
    assert_eq!(tokens, expected(40).await);
    let left = BTreeSet::from([0, 2]);
    copies.settled(stored(&prompt(300)), &left).await;
    copies.quiet(&left).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repair_restores_copies_and_gives_back_what_it_lent() {
    let mut copies = Copies::build(4).await;
    let (tokens, _) = copies.generate(&prompt(300), 40, (usize::MAX, &nothing)).await;
    let prefix = stored(&prompt(300)).to_vec();
    let all: BTreeSet<usize> = (0..4).collect();
    copies.settled(&prefix, &all).await;
    // One after the other: each loss is made good before the next, so nothing is ever lost.
    for victim in 0..4 {
        copies.fate(victim, Fate::Dead);
        let left: BTreeSet<usize> = (0..4).filter(|shard| *shard != victim).collect();
        copies.settled(&prefix, &left).await;
        copies.restart(victim);
        copies.settled(&prefix, &all).await;
    }
    let (again, finished) = copies.generate(&prompt(300), 40, (usize::MAX, &nothing)).await;
    assert_eq!((again, finished.cached_tokens), (tokens, 288), "nothing was computed again");
    copies.quiet(&all).await;
    let repair = copies.stats().await.into_iter().map(|stats| stats.repair);
    let (sent, dropped) = repair
        .fold((0, 0), |(sent, dropped), repair| (sent + repair.sent_total, dropped + repair.dropped_total));
    assert!(sent > 0 && dropped > 0, "{sent} copies sent, {dropped} given back");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_joins_or_leaves_moves_blocks_and_interrupts_nobody() {
    let mut copies = Copies::build(3).await;
    let expected = expected(40).await;
    copies.generate(&prompt(300), 40, (usize::MAX, &nothing)).await;
    let prefix = stored(&prompt(300)).to_vec();
    copies.house.add_shard().await;
    copies.informed().await;
    // At once: the blocks are still where they were, which is one change ago.
    let (tokens, finished) = copies.generate(&prompt(300), 40, (usize::MAX, &nothing)).await;
    assert_eq!((tokens, finished.cached_tokens), (expected.clone(), 288));
    copies.settled(&prefix, &(0..4).collect()).await;
    copies.house.remove_shard(0);
    copies.informed().await;
    let (tokens, finished) = copies.generate(&prompt(300), 40, (usize::MAX, &nothing)).await;
    assert_eq!((tokens, finished.cached_tokens), (expected, 288));
    let left = BTreeSet::from([1, 2, 3]);
    copies.settled(&prefix, &left).await;
    copies.quiet(&left).await;
}
