//! What clients of a simulation store and read, and what they know of it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::future::join_all;
use longshore_blocks::{BlockKey, BlockPlace, KeyChain};
use longshore_engine::{Error, PutStreams, Sequence, store_copies};
use longshore_fabric::CallContext;
use longshore_proto::types::{PutOutcome, TileMessage};
use longshore_tests::{draws::Draws, truth};

use super::{
    cluster::{Client, LAYERS, Name, SHAPE, TENANTS, geometry, namespace},
    network::{Happened, Network},
};

/// What a client gives a call.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a client waits for one shard.
const PATIENCE: Duration = Duration::from_secs(3);

/// A sequence that clients store and read.
#[derive(Debug)]
pub(crate) struct Text {
    pub(crate) tenant: u8,
    pub(crate) tokens: Vec<u32>,
    pub(crate) blocks: Vec<(BlockKey, BlockPlace)>,
}

/// What clients know.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// Every block that somebody began to store.
    pub(crate) known: BTreeMap<Name, BlockPlace>,
    /// Those that were acknowledged.
    pub(crate) stored: BTreeMap<Name, BlockPlace>,
    pub(crate) read: u64,
    pub(crate) failed: u64,
}

pub(crate) type Shared = Arc<Mutex<Ledger>>;

pub(crate) fn locked<T>(ledger: &Shared, with: impl FnOnce(&mut Ledger) -> T) -> T {
    with(&mut ledger.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Sequences of two tenants, some of which begin alike.
pub(crate) fn texts(draws: &mut Draws) -> Vec<Text> {
    let block_tokens = u64::from(geometry().block_tokens());
    let mut texts = Vec::<Text>::new();
    for _ in 0..8 {
        let tenant = *draws.pick(&TENANTS);
        let earlier: Vec<&Text> = texts.iter().filter(|text| text.tenant == tenant).collect();
        let mut tokens = Vec::new();
        if !earlier.is_empty() && draws.per_mille(500) {
            let text = *draws.pick(&earlier);
            let shared = draws.between(1..=text.blocks.len() as u64) * block_tokens;
            tokens.extend_from_slice(&text.tokens[..shared as usize]);
        }
        let more = draws.between(1..=4) * block_tokens;
        tokens.extend((0..more).map(|_| draws.below(97) as u32));
        let mut chain = KeyChain::new(namespace(tenant), geometry());
        chain.push(&tokens);
        let place = |index: u64| BlockPlace { stripe_seed: chain.stripe_seed(index), index };
        let blocks = chain.keys().iter().zip(0u64..).map(|(key, index)| (*key, place(index))).collect();
        texts.push(Text { tenant, tokens, blocks });
    }
    texts
}

/// One call of a client.
pub(crate) struct Call {
    pub(crate) client: Arc<Client>,
    pub(crate) network: Arc<Network>,
    pub(crate) ledger: Shared,
}

impl Call {
    pub(crate) async fn store(&self, text: &Text, streams: bool) {
        let known = text.blocks.iter().map(|(key, place)| ((text.tenant, *key), *place));
        locked(&self.ledger, |ledger| ledger.known.extend(known));
        let ctx = CallContext::new("store").with_timeout(CALL_TIMEOUT);
        let ended = match streams {
            true => self.store_by_streams(&ctx, text).await,
            false => self.store_each(&ctx, text).await,
        };
        if ended.is_err() {
            locked(&self.ledger, |ledger| ledger.failed += 1);
        }
    }

    fn acknowledged(&self, text: &Text, key: BlockKey, place: BlockPlace) {
        self.network.mark(Happened::Stored(key));
        locked(&self.ledger, |ledger| ledger.stored.insert((text.tenant, key), place));
    }

    /// Every block by a call of its own, as a decode worker does.
    async fn store_each(&self, ctx: &CallContext, text: &Text) -> Result<(), Error> {
        let (links, identity) = (self.client.shards.current()?, self.client.identity(text.tenant));
        let shape = self.client.engine.wire_tile_shape();
        let stores = text.blocks.iter().map(|&(key, place)| {
            let links = &links;
            async move {
                let candidates = links.candidates(&place.stripe_seed)?;
                let tiles = truth::messages(SHAPE.bytes(), LAYERS, key, place);
                let outcome = store_copies(ctx, links, &candidates, identity, shape, tiles).await?;
                if matches!(outcome, PutOutcome::Stored | PutOutcome::Duplicate) {
                    self.acknowledged(text, key, place);
                }
                Ok(())
            }
        });
        let stores: Vec<_> = stores.collect();
        join_all(stores).await.into_iter().collect()
    }

    /// Layer by layer over all blocks, as a prefill worker does.
    async fn store_by_streams(&self, ctx: &CallContext, text: &Text) -> Result<(), Error> {
        let (links, identity) = (self.client.shards.current()?, self.client.identity(text.tenant));
        let shape = self.client.engine.wire_tile_shape();
        let mut streams = PutStreams::new(ctx.clone(), identity, shape, Arc::clone(&links), 4);
        let tiles: Vec<Vec<TileMessage>> = text
            .blocks
            .iter()
            .map(|&(key, place)| truth::messages(SHAPE.bytes(), LAYERS, key, place))
            .collect();
        for layer in 0..LAYERS as usize {
            for (tiles, (key, place)) in tiles.iter().zip(&text.blocks) {
                if !streams.knows(key) {
                    streams.begin(*key, &links.candidates(&place.stripe_seed)?);
                }
                streams.send(tiles[layer].clone(), PATIENCE).await?;
            }
        }
        streams.end();
        let mut failed = Ok(());
        for (tiles, &(key, place)) in tiles.iter().zip(&text.blocks) {
            match streams.ensure(key, PATIENCE, || tiles.clone()).await {
                Ok(_) => self.acknowledged(text, key, place),
                Err(_) => failed = Err(Error::Cancelled),
            }
        }
        streams.detach();
        failed
    }

    /// The blocks of a text that were acknowledged, from its beginning on.
    fn prefix(&self, text: &Text) -> usize {
        locked(&self.ledger, |ledger| {
            let stored =
                |(key, _): &&(BlockKey, BlockPlace)| ledger.stored.contains_key(&(text.tenant, *key));
            text.blocks.iter().take_while(stored).count()
        })
    }

    /// Reads what was acknowledged of a text; when nothing is at fault it must succeed.
    pub(crate) async fn read(&self, text: &Text, calm: bool) {
        let count = self.prefix(text);
        if count == 0 {
            return;
        }
        let read = self.fetch(text, count).await;
        match read {
            Ok(sequence) => self.check_read(&sequence, text, count),
            Err(error) if calm => self.network.violated(format!("unreadable: {error}")),
            Err(_) => locked(&self.ledger, |ledger| ledger.failed += 1),
        }
    }

    async fn fetch(&self, text: &Text, count: usize) -> Result<Sequence, Error> {
        let ctx = CallContext::new("read").with_timeout(CALL_TIMEOUT);
        let (links, identity) = (self.client.shards.current()?, self.client.identity(text.tenant));
        let tokens = &text.tokens[..count * SHAPE.block_tokens];
        Sequence::fetch(&self.client.engine, &ctx, identity, links, tokens).await
    }

    fn check_read(&self, sequence: &Sequence, text: &Text, count: usize) {
        for (block, (key, _)) in text.blocks[..count].iter().enumerate() {
            let tiles = sequence.block_messages(block as u64).expect("fetched blocks are full and here");
            if tiles.iter().any(|tile| tile.key != *key || !truth::is_right(tile)) {
                self.network.violated(format!("wrong byte: a client read block {key}"));
            }
        }
        self.network.mark(Happened::Read(count));
        locked(&self.ledger, |ledger| ledger.read += count as u64);
    }

    /// Opens views of what was acknowledged, keeps them for a while, and closes them.
    pub(crate) async fn view(&self, text: &Text) {
        let count = self.prefix(text);
        let Ok(links) = self.client.shards.current() else { return };
        let ctx = CallContext::new("view").with_timeout(CALL_TIMEOUT);
        let (identity, tokens) =
            (self.client.identity(text.tenant), &text.tokens[..count * SHAPE.block_tokens]);
        let opened = Sequence::open(&self.client.engine, &ctx, identity, links, tokens, 5_000).await;
        match opened {
            Ok(sequence) => {
                tokio::time::sleep(Duration::from_millis(3_011)).await;
                sequence.close().await;
            }
            Err(_) => locked(&self.ledger, |ledger| ledger.failed += 1),
        }
    }
}
