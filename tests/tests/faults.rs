//! Shards that lie, lose and rot: a failed check is a miss, the block is computed again, and no token is ever wrong.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures::StreamExt;
use longshore_blocks::{BlockKey, EXACT_PREFILL, KeyChain};
use longshore_fabric::{BoxStream, CallContext, Error, Inference, Shard};
use longshore_kvstore::KvStore;
use longshore_prefill::PrefixPolicy;
use longshore_proto::types::{
    AttendAnswer, AttendQuery, GenerateEvent, GenerateStart, GetBlocks, Identity, Lookup, OpenView,
    OpenedView, PromptChunk, PutAck, Sampling, ShardStats, TileMessage, WireTileShape,
};
use longshore_tests::house::{House, Plan};
use tokio::sync::mpsc;

/// What a shard does wrong, a few times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lie {
    /// Partials of another shape.
    WrongShape,
    /// Partials that are no numbers.
    NotANumber,
    /// Partials of stripes that it was not asked for.
    WrongStripe,
    /// One of the partials left out.
    Missing,
    /// Tiles with a flipped bit, when they are fetched.
    FlippedFetch,
    /// Claims to hold every block.
    ClaimsAll,
}

const LIES: [Lie; 6] =
    [Lie::WrongShape, Lie::NotANumber, Lie::WrongStripe, Lie::Missing, Lie::FlippedFetch, Lie::ClaimsAll];

#[derive(Debug)]
struct Liar {
    honest: Arc<KvStore>,
    lie: Lie,
    left: Arc<AtomicUsize>,
    told: Arc<AtomicUsize>,
    /// Calls that fetch tiles.
    fetches: Arc<AtomicUsize>,
}

impl Liar {
    /// True while lies are left; counts the ones that were told.
    fn lies_now(left: &AtomicUsize, told: &AtomicUsize) -> bool {
        let lies = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok();
        told.fetch_add(usize::from(lies), Ordering::SeqCst);
        lies
    }
}

fn twist(lie: Lie, answer: &mut AttendAnswer) -> bool {
    let AttendAnswer::Partials { partials, .. } = answer else { return false };
    let Some(last) = partials.last_mut() else { return false };
    let mut data = last.partial.data.to_vec();
    match lie {
        Lie::WrongShape => {
            last.partial.shape[2] -= 1;
            data.truncate(data.len() / 4 * 3);
            let elements: u64 = last.partial.shape.iter().product();
            data.resize(elements as usize * 4, 0);
        }
        Lie::NotANumber => data[..4].copy_from_slice(&f32::NAN.to_le_bytes()),
        Lie::WrongStripe => last.stripe += 1000,
        Lie::Missing => {
            partials.pop();
            return true;
        }
        Lie::FlippedFetch | Lie::ClaimsAll => return false,
    }
    last.partial.data = data.into();
    true
}

#[async_trait]
impl Shard for Liar {
    async fn lookup(&self, ctx: &CallContext, lookup: Lookup) -> Result<Vec<bool>, Error> {
        let honest = self.honest.lookup(ctx, lookup).await?;
        let lies = self.lie == Lie::ClaimsAll
            && !honest.iter().all(|held| *held)
            && Self::lies_now(&self.left, &self.told);
        Ok(if lies { vec![true; honest.len()] } else { honest })
    }

    async fn put_blocks(
        &self,
        ctx: &CallContext,
        identity: Identity,
        shape: WireTileShape,
        tiles: mpsc::Receiver<TileMessage>,
    ) -> Result<BoxStream<PutAck>, Error> {
        self.honest.put_blocks(ctx, identity, shape, tiles).await
    }

    async fn get_blocks(
        &self,
        ctx: &CallContext,
        get: GetBlocks,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        self.fetches.fetch_add(1, Ordering::SeqCst);
        let tiles = self.honest.get_blocks(ctx, get).await?;
        let (lie, left, told) = (self.lie, Arc::clone(&self.left), Arc::clone(&self.told));
        Ok(Box::pin(tiles.map(move |tile| {
            let mut tile = tile?;
            if let Some(tile) = tile.as_mut().filter(|_| lie == Lie::FlippedFetch)
                && Self::lies_now(&left, &told)
            {
                let mut data = tile.data.to_vec();
                data[7] ^= 0x10;
                tile.data = data.into();
            }
            Ok(tile)
        })))
    }

    async fn open_view(&self, ctx: &CallContext, open: OpenView) -> Result<OpenedView, Error> {
        self.honest.open_view(ctx, open).await
    }

    async fn attend(
        &self,
        ctx: &CallContext,
        queries: mpsc::Receiver<AttendQuery>,
    ) -> Result<BoxStream<AttendAnswer>, Error> {
        let answers = self.honest.attend(ctx, queries).await?;
        let (lie, left, told) = (self.lie, Arc::clone(&self.left), Arc::clone(&self.told));
        Ok(Box::pin(answers.map(move |answer| {
            let mut answer = answer?;
            let mut twisted = answer.clone();
            if twist(lie, &mut twisted) && Self::lies_now(&left, &told) {
                answer = twisted;
            }
            Ok(answer)
        })))
    }

    async fn close_view(&self, ctx: &CallContext, view_id: u64) -> Result<(), Error> {
        self.honest.close_view(ctx, view_id).await
    }

    async fn stats(&self, ctx: &CallContext) -> Result<ShardStats, Error> {
        self.honest.stats(ctx).await
    }
}

fn prompt(length: usize) -> Vec<u32> {
    (0..length).map(|i| 3 + ((i * 7 + i / 5) % 200) as u32).collect()
}

/// A house whose shards each tell `lie` once; the lies that were told; the calls that fetched tiles.
async fn lying_house(lie: Lie) -> (House, Arc<AtomicUsize>, Arc<AtomicUsize>) {
    let (told, fetches) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let seen = (Arc::clone(&told), Arc::clone(&fetches));
    let wrap = move |_, honest| -> Arc<dyn Shard> {
        let (told, fetches) = (Arc::clone(&seen.0), Arc::clone(&seen.1));
        Arc::new(Liar { honest, lie, left: Arc::new(AtomicUsize::new(1)), told, fetches })
    };
    // What is never fetched cannot be fetched damaged.
    let prefix = if lie == Lie::FlippedFetch { PrefixPolicy::Fetch } else { PrefixPolicy::Auto };
    let house = House::build(Plan { wrap: Box::new(wrap), prefix, ..Plan::default() }).await;
    (house, told, fetches)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lying_shard_never_changes_a_token() {
    let honest = House::build(Plan::default()).await;
    let expected = honest.generate(&prompt(300), 40).await.expect("an honest answer").tokens;
    assert_eq!(expected.len(), 40);
    // A rest behind a cached prefix, which the prefill worker attends to on its shards or fetches.
    let mut longer = prompt(300);
    longer.extend(prompt(900));
    let expected_longer = honest.generate(&longer, 8).await.expect("an honest answer").tokens;
    for lie in LIES {
        let (house, told, fetches) = lying_house(lie).await;
        for round in ["cold", "cached"] {
            let answer = house.generate(&prompt(300), 40).await;
            let answer = answer.unwrap_or_else(|error| panic!("{lie:?}, {round}: {error:?}"));
            assert_eq!(answer.tokens, expected, "{lie:?}, {round}");
        }
        let long = house.generate(&longer, 8).await;
        let long = long.unwrap_or_else(|error| panic!("{lie:?}, longer: {error:?}"));
        assert_eq!(long.tokens, expected_longer, "{lie:?}, longer");
        let told = told.load(Ordering::SeqCst);
        assert!(told > 0, "{lie:?} was never told, so nothing was tested");
        if lie == Lie::FlippedFetch {
            // Every damaged tile was refused by its reader, so its shard was asked once more.
            let fetches = fetches.load(Ordering::SeqCst);
            assert!(fetches >= 2 * told, "{told} damaged tiles and only {fetches} fetches");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rot_in_memory_is_a_miss() {
    let house = House::build(Plan { shards: 1, ..Plan::default() }).await;
    let clean = house.generate(&prompt(200), 20).await.expect("an answer");
    let keys = keys(&prompt(200), &house);
    assert!(house.shards[0].corrupt_for_test(keys[3], 1), "block 3 is held");
    let again = house.generate(&prompt(200), 20).await.expect("an answer in spite of the rot");
    assert_eq!(again.tokens, clean.tokens);
    let stats = house.shards[0].stats(&CallContext::new("test")).await.expect("statistics");
    assert!(stats.corrupt_total > 0, "{stats:?}: the rot was not noticed");
}

fn keys(tokens: &[u32], house: &House) -> Vec<BlockKey> {
    let mut chain = KeyChain::new(house.deployment.namespace(EXACT_PREFILL, b""), house.geometry);
    chain.push(tokens);
    chain.keys().to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_leaves_nothing_behind() {
    let house = House::build(Plan::default()).await;
    let ctx = CallContext::new("test");
    let idle = house.generate(&prompt(100), 4).await.expect("an answer");
    assert_eq!(idle.tokens.len(), 4);
    for tokens_read in [0, 1, 5] {
        let sampling =
            Sampling { temperature: 0.0, max_tokens: Some(3000), ignore_eos: true, ..Sampling::default() };
        let start = GenerateStart { sampling, ..GenerateStart::default() };
        let (send, chunks) = mpsc::channel(1);
        send.send(PromptChunk::Tokens(prompt(700))).await.expect("a channel of one takes one");
        drop(send);
        let mut events = house.router.generate(&ctx, start, chunks).await.expect("a stream");
        let mut seen = 0;
        while seen < tokens_read {
            if let Some(Ok(GenerateEvent::Tokens(piece))) = events.next().await {
                seen += piece.token_ids.len();
            }
        }
        drop(events);
        let began = Instant::now();
        loop {
            let mut busy = Vec::new();
            for shard in &house.shards {
                let stats = shard.stats(&ctx).await.expect("statistics");
                if stats.views + stats.open_blocks + stats.pinned_blocks > 0 {
                    busy.push(stats);
                }
            }
            if busy.is_empty() {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "after {tokens_read} tokens: {busy:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    let began = Instant::now();
    assert_eq!(house.end().await, Vec::<String>::new(), "tasks that did not end");
    assert!(began.elapsed() < Duration::from_secs(10), "an idle house took {:?} to end", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_and_stripes_do_not_change_a_bit() {
    let one = House::build(Plan { shards: 1, ..Plan::default() }).await;
    let expected = one.generate(&prompt(500), 64).await.expect("an answer");
    for (shards, decoders) in [(2, 1), (5, 2)] {
        let house = House::build(Plan { shards, decoders, ..Plan::default() }).await;
        for _ in 0..2 {
            let answer = house.generate(&prompt(500), 64).await.expect("an answer");
            assert_eq!(answer.tokens, expected.tokens, "{shards} shards, {decoders} decode workers");
        }
    }
    let used: u64 = expected.finished.placement.iter().map(|shard| shard.kv_bytes).sum();
    assert!(used > 0, "the answer says where its KV lies");
}
