//! A client of the store beside the workers: stores blocks of known contents on shards of the real program, with copies, and checks
//! whatever they give out.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::StreamExt;
use longshore_attention::{KvDtype, TileShape};
use longshore_blocks::{BlockKey, BlockPlace, EXACT_PREFILL, Geometry, KeyChain, quorum::CopyRule};
use longshore_cluster::{ClusterView, Member, Role};
use longshore_engine::{ShardDirectory, store_copies};
use longshore_fabric::{CallContext, Connector, GrpcConnector, GrpcOptions, Shard};
use longshore_proto::types::{
    GetBlocks, Identity, Lookup, ModelDescription, PutOutcome, ShardStats, WireTileShape,
};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::{draws::Draws, truth};

/// How long a shard is waited for beside others, which have the same blocks or can take them.
const PATIENCE: Duration = Duration::from_secs(5);
/// The same where there is no other: it is slow on a busy machine, and what it does not do nobody does.
const PATIENCE_ALONE: Duration = Duration::from_secs(30);

/// A process that stores blocks and reads them, as a worker would.
#[derive(Debug)]
pub struct StoreClient {
    directory: ShardDirectory,
    shards: Vec<Arc<dyn Shard>>,
    identity: Identity,
    shape: WireTileShape,
    tile_bytes: usize,
    stored: BTreeMap<BlockKey, BlockPlace>,
    read_patience: Option<Duration>,
    _views: watch::Sender<Arc<ClusterView>>,
}

impl StoreClient {
    /// A client of the shards among `members`, which serve `model` in f16.
    pub fn new(members: &[Member], model: &ModelDescription, rule: CopyRule) -> Self {
        Self::with(members, model, rule, GrpcOptions::default())
    }

    /// The same over the lanes that `options` allow.
    pub fn with(members: &[Member], model: &ModelDescription, rule: CopyRule, options: GrpcOptions) -> Self {
        let shards: Vec<Member> =
            members.iter().filter(|member| member.role == Role::KvStore).cloned().collect();
        let view = Arc::new(ClusterView::new(shards.clone()).expect("the members are valid"));
        let deployment = model.deployment;
        let namespace = deployment.namespace(EXACT_PREFILL, b"faults");
        let identity = Identity { deployment, namespace, shard_map_epoch: view.epoch() };
        let (views, told) = watch::channel(view);
        let connector = GrpcConnector::new(options);
        let clients = shards.iter().map(|member| connector.shard(&member.address).expect("an address"));
        let clients = clients.collect();
        let directory = ShardDirectory::new(told, Arc::new(connector), TaskTracker::new(), 4);
        let shape = model.tile_shape;
        let tile = TileShape {
            block_tokens: shape.block_tokens as usize,
            kv_heads: shape.kv_heads as usize,
            head_dim: shape.head_dim as usize,
            dtype: KvDtype::F16,
        };
        Self {
            directory: directory.with_copies(rule),
            shards: clients,
            identity,
            shape,
            tile_bytes: tile.bytes(),
            stored: BTreeMap::new(),
            read_patience: None,
            _views: views,
        }
    }

    /// The same client over connections of its own anew: those to an earlier start of a shard may end in the first answer.
    pub fn reconnected(self, members: &[Member], model: &ModelDescription, rule: CopyRule) -> Self {
        Self { stored: self.stored, read_patience: self.read_patience, ..Self::new(members, model, rule) }
    }

    /// How long one shard is waited for.
    fn patience(&self) -> Duration {
        if self.shards.len() == 1 { PATIENCE_ALONE } else { PATIENCE }
    }

    /// How long one shard may take to give out blocks before the next one is asked.
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { read_patience: Some(patience), ..self }
    }

    /// Acknowledged blocks.
    pub fn stored(&self) -> &BTreeMap<BlockKey, BlockPlace> {
        &self.stored
    }

    /// Expects nothing of what was stored any more.
    pub fn forget(&mut self) {
        self.stored.clear();
    }

    /// Stores the blocks of a fresh text, in stripes of one; keeps those that were acknowledged. Returns how many were not.
    pub async fn store(&mut self, name: u64, blocks: usize) -> usize {
        let geometry = Geometry::new(self.shape.block_tokens, 1).expect("the sizes are valid");
        let mut chain = KeyChain::new(self.identity.namespace, geometry);
        let mut draws = Draws::new(&[name]);
        let tokens: Vec<u32> = (0..blocks as u64 * u64::from(self.shape.block_tokens))
            .map(|_| draws.below(200) as u32)
            .collect();
        chain.push(&tokens);
        let links = self.directory.current().expect("the addresses make clients");
        let mut refused = 0;
        for (&key, index) in chain.keys().iter().zip(0..) {
            let place = BlockPlace { stripe_seed: chain.stripe_seed(index), index };
            let tiles = truth::messages(self.tile_bytes, self.shape.layers, key, place);
            let ctx = CallContext::new("store").with_timeout(self.patience());
            let candidates = links.candidates(&place.stripe_seed).expect("there are shards");
            let outcome = store_copies(&ctx, &links, &candidates, self.identity, self.shape, tiles).await;
            match outcome {
                Ok(PutOutcome::Stored | PutOutcome::Duplicate) => drop(self.stored.insert(key, place)),
                _ => refused += 1,
            }
        }
        refused
    }

    /// Reads blocks of one shard; those that it gave out before it ended, each checked.
    async fn read(&self, shard: usize, keys: &[BlockKey]) -> Vec<BlockKey> {
        let get = GetBlocks::whole(self.identity, keys.to_vec());
        let patience = self.read_patience.unwrap_or_else(|| self.patience());
        let ctx = CallContext::new("read").with_timeout(patience);
        let mut found = Vec::new();
        let Ok(mut tiles) = self.shards[shard].get_blocks(&ctx, get).await else { return found };
        while let Some(Ok(tile)) = tiles.next().await {
            let Some(tile) = tile else { continue };
            let sound = tile.data.matches(tile.crc32c);
            assert!(!sound || truth::is_right(&tile), "shard {shard} gave out a wrong byte of {}", tile.key);
            if sound && tile.layer == 0 {
                found.push(tile.key);
            }
        }
        found
    }

    /// Reads every acknowledged block from whoever answers; how many nobody gave out.
    pub async fn unread(&self) -> usize {
        let mut left: Vec<BlockKey> = self.stored.keys().copied().collect();
        for shard in 0..self.shards.len() {
            let found = self.read(shard, &left).await;
            left.retain(|key| !found.contains(key));
        }
        left.len()
    }

    /// The same, asking again for `within`: a connection of an earlier fault may end in the first answer.
    pub async fn lost(&self, within: Duration) -> usize {
        let began = Instant::now();
        loop {
            match self.unread().await {
                0 => return 0,
                lost if began.elapsed() > within => return lost,
                _ => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    }

    /// On how many shards each acknowledged block is.
    async fn copies(&self) -> BTreeMap<usize, usize> {
        let keys: Vec<BlockKey> = self.stored.keys().copied().collect();
        let mut counts = vec![0; keys.len()];
        for shard in &self.shards {
            let lookup = Lookup { identity: self.identity, keys: keys.clone(), peek: true };
            let ctx = CallContext::new("count").with_timeout(Duration::from_secs(5));
            let held = shard.lookup(&ctx, lookup).await.unwrap_or_default();
            held.iter().zip(&mut counts).for_each(|(held, count)| *count += usize::from(*held));
        }
        let mut blocks = BTreeMap::new();
        counts.into_iter().for_each(|count| *blocks.entry(count).or_default() += 1);
        blocks
    }

    /// What a shard says of itself, when it answers.
    pub async fn stats(&self, shard: usize) -> Option<ShardStats> {
        self.shards[shard].stats(&CallContext::new("stats").with_timeout(self.patience())).await.ok()
    }

    /// Waits until every acknowledged block has `copies` copies, no shard has anything that is not a block, and all reach each other.
    ///
    /// # Panics
    /// When that takes longer than `within`.
    pub async fn settled(&self, copies: usize, within: Duration, when: &str) {
        let began = Instant::now();
        loop {
            let found = self.copies().await;
            let mut leaks = Vec::new();
            for shard in 0..self.shards.len() {
                let Some(stats) = self.stats(shard).await else {
                    leaks.push(format!("shard {shard} does not answer"));
                    continue;
                };
                let bytes = stats.blocks * self.tile_bytes as u64 * u64::from(self.shape.layers);
                let used = stats.used_bytes - stats.summary_bytes;
                if (used, stats.open_blocks, stats.views, stats.repair.peers_down) != (bytes, 0, 0, 0) {
                    leaks.push(format!("shard {shard}: {stats:?}"));
                }
            }
            if found.keys().all(|count| *count == copies) && leaks.is_empty() {
                return;
            }
            assert!(began.elapsed() < within, "{when}: blocks by copies {found:?}, {leaks:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}
