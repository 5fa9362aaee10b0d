//! A shard or lane that lies in every way about what it gives out: its reader notices, and uses none of it.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use longshore_attention::KvDtype;
use longshore_blocks::{BlockKey, KeyChain};
use longshore_engine::{
    LocalBlock, fetch_blocks,
    testing::{MemoryShard, TestCluster, tokens},
};
use longshore_fabric::{BoxStream, CallContext, Code, Error, Shard};
use longshore_proto::types::{
    AttendAnswer, AttendQuery, GetBlocks, Identity, Lookup, OpenView, OpenedView, PutAck, ShardStats,
    TileData, TileMessage, WireTileShape,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::{Mutex, mpsc};

const CASES: u64 = 20_000;
/// Blocks of a read.
const BLOCKS: usize = 2;

type Answers = Vec<Result<Option<TileMessage>, Error>>;

/// Gives out what its inner shard would, with something done to it each time.
#[derive(Debug)]
struct Liar {
    inner: MemoryShard,
    /// Its choices, what it did last, and how often.
    state: Mutex<(ChaCha8Rng, &'static str, u64)>,
}

/// The seed of a test: its own, or another one that `LONGSHORE_DAMAGE_SEED=N` makes of it.
#[allow(clippy::print_stdout, reason = "a test says which seed it has")]
fn seed(own: u64) -> u64 {
    let Some(set) = std::env::var_os("LONGSHORE_DAMAGE_SEED") else { return own };
    let set: u64 = set.to_str().and_then(|set| set.parse().ok()).expect("LONGSHORE_DAMAGE_SEED is a number");
    println!("LONGSHORE_DAMAGE_SEED={set}");
    // Tests that have seeds of their own do not share them here either.
    set.wrapping_mul(16).wrapping_add(own)
}

fn below(random: &mut ChaCha8Rng, end: usize) -> usize {
    random.next_u32() as usize % end
}

/// A body with some bytes wrong.
fn wrong(random: &mut ChaCha8Rng, good: &[u8]) -> Vec<u8> {
    loop {
        let mut bad = good.to_vec();
        let from = below(random, good.len());
        let len = 1 + below(random, good.len() - from);
        match below(random, 5) {
            0 | 1 => bad[from] ^= 1 << below(random, 8),
            2 => bad[from..from + len].fill(0),
            3 => random.fill_bytes(&mut bad[from..from + len.min(64)]),
            _ => bad.rotate_left(1 + below(random, good.len() - 1)),
        }
        if bad != good {
            return bad;
        }
    }
}

/// Does something to one tile of an answer.
fn lie(random: &mut ChaCha8Rng, answers: &mut Answers) -> &'static str {
    let at = below(random, answers.len());
    let next = (at + 1 + below(random, answers.len() - 1)) % answers.len();
    let count = answers.len();
    let Ok(Some(other)) = answers[next].clone() else { panic!("all blocks are held") };
    let Ok(Some(tile)) = &mut answers[at] else { panic!("all blocks are held") };
    let good = tile.data.to_vec();
    match below(random, 14) {
        0..3 => {
            tile.data = wrong(random, &good).into();
            "a damaged body"
        }
        3 => {
            tile.data = good[..below(random, good.len())].to_vec().into();
            "a body that was cut off"
        }
        4 => {
            tile.data = [&good[..], &good[..1 + below(random, 64)]].concat().into();
            "a body that is too long"
        }
        5 => {
            tile.crc32c ^= 1 << below(random, 32);
            "a wrong checksum"
        }
        6 => {
            tile.data = other.data;
            "the body of another tile"
        }
        7 => {
            let middle = 1 + below(random, good.len() - 1);
            let pieces = [&good[middle..], &good[..middle]].map(Bytes::copy_from_slice);
            tile.data = TileData::from_pieces(pieces.into());
            "pieces out of order"
        }
        8 => {
            *tile = other;
            "another tile"
        }
        9 => {
            tile.key.0[below(random, 16)] ^= 1 << below(random, 8);
            "another key"
        }
        10 => {
            tile.layer ^= 1 << below(random, 32);
            "another layer"
        }
        11 => {
            answers.swap(at, next);
            "tiles out of order"
        }
        12 => {
            drop(answers.remove(at));
            "a tile that is missing"
        }
        _ => {
            match below(random, 3) {
                0 => answers.truncate(below(random, count)),
                1 => answers[at] = Ok(None),
                _ => answers.insert(at, Err(Error::new(Code::DataLoss, "the connection broke"))),
            }
            "a stream that ends early"
        }
    }
}

#[async_trait]
impl Shard for Liar {
    async fn get_blocks(
        &self,
        ctx: &CallContext,
        get: GetBlocks,
    ) -> Result<BoxStream<Option<TileMessage>>, Error> {
        let mut answers: Answers = self.inner.get_blocks(ctx, get).await?.collect().await;
        let mut state = self.state.lock().await;
        let (random, told, lies) = &mut *state;
        *told = lie(random, &mut answers);
        *lies += 1;
        Ok(futures::stream::iter(answers).boxed())
    }

    async fn lookup(&self, ctx: &CallContext, lookup: Lookup) -> Result<Vec<bool>, Error> {
        self.inner.lookup(ctx, lookup).await
    }

    async fn put_blocks(
        &self,
        ctx: &CallContext,
        identity: Identity,
        shape: WireTileShape,
        tiles: mpsc::Receiver<TileMessage>,
    ) -> Result<BoxStream<PutAck>, Error> {
        self.inner.put_blocks(ctx, identity, shape, tiles).await
    }

    async fn open_view(&self, ctx: &CallContext, open: OpenView) -> Result<OpenedView, Error> {
        self.inner.open_view(ctx, open).await
    }

    async fn attend(
        &self,
        ctx: &CallContext,
        queries: mpsc::Receiver<AttendQuery>,
    ) -> Result<BoxStream<AttendAnswer>, Error> {
        self.inner.attend(ctx, queries).await
    }

    async fn close_view(&self, ctx: &CallContext, view_id: u64) -> Result<(), Error> {
        self.inner.close_view(ctx, view_id).await
    }

    async fn stats(&self, ctx: &CallContext) -> Result<ShardStats, Error> {
        self.inner.stats(ctx).await
    }
}

#[tokio::test]
async fn no_lie_of_a_read_stream_is_believed() {
    let cluster = TestCluster::new(1, KvDtype::F16);
    let text = tokens(9, BLOCKS * 16);
    cluster.store(b"", &text).await;
    let identity = cluster.identity(b"");
    let mut chain = KeyChain::new(identity.namespace, cluster.engine.geometry());
    chain.push(&text);
    let keys: Vec<BlockKey> = chain.keys().to_vec();
    let ctx = CallContext::new("read");
    let links = cluster.links();
    let read = || fetch_blocks(&cluster.engine, &ctx, &links.links()[0], identity, &keys, None);
    let (honest, ended) = read().await;
    ended.expect("an honest shard is believed");
    assert_eq!(honest.len(), BLOCKS);
    let layers = cluster.engine.backend().config().layers;
    // What came before a lie is used, and must be what the honest shard gave.
    let is_honest = |(at, block): &(usize, LocalBlock)| {
        (0..layers).all(|layer| block.tile(layer).as_bytes() == honest[*at].1.tile(layer).as_bytes())
    };

    let state = Mutex::new((ChaCha8Rng::seed_from_u64(seed(6)), "", 0));
    let liar = Arc::new(Liar { inner: cluster.shards[0].clone(), state });
    cluster.connector.add_shard("shard-0", Arc::clone(&liar) as Arc<dyn Shard>);
    let mut detected = 0;
    for case in 0..CASES {
        let (blocks, ended) = read().await;
        if ended.is_ok() || !blocks.iter().all(is_honest) {
            panic!("case {case}: believed {}", liar.state.lock().await.1);
        }
        detected += 1;
    }
    assert_eq!((detected, liar.state.lock().await.2), (CASES, CASES));
    println!("{detected} cases of read streams");
}
