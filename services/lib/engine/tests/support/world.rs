//! A cluster with its runtime, driven from a test's own thread as an engine thread would.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::time::Duration;

use longshore_attention::KvDtype;
use longshore_blocks::quorum::CopyRule;
use longshore_engine::{
    EngineOptions, Error, Logits, Sequence, StepInput,
    testing::{Bodies, TestCluster, reference_tiles},
};
use longshore_fabric::{CallContext, PendingAttend};
use longshore_model::RowLogits;
use longshore_proto::types::{AttendItem, AttendQuery, Tensor};
use tokio::runtime::Runtime;

/// Tokens of a block in the test cluster.
pub(crate) const BLOCK: usize = 16;
const LEASE_MS: u32 = 60_000;
const HASTY: Duration = Duration::from_millis(500);

/// Floats as bits, so that a comparison is exact and shows NaN.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The tiles of blocks `[from, full)` of a sequence whose later blocks are here.
pub(crate) fn tiles(sequence: &Sequence, from: u64) -> Bodies {
    let blocks = from..sequence.full_blocks();
    let tiles = blocks.flat_map(|block| sequence.block_messages(block).expect("the block is local"));
    tiles.map(|tile| ((tile.key, tile.layer as usize), tile.data.to_vec())).collect()
}

pub(crate) struct World {
    pub(crate) runtime: Runtime,
    pub(crate) cluster: TestCluster,
}

impl World {
    pub(crate) fn new(shards: usize, dtype: KvDtype) -> Self {
        Self::with_options(shards, EngineOptions { kv_dtype: dtype, ..EngineOptions::default() })
    }

    pub(crate) fn with_options(shards: usize, options: EngineOptions) -> Self {
        Self::build(shards, options, CopyRule::default())
    }

    pub(crate) fn with_copies(shards: usize, copies: usize, write_acks: usize) -> Self {
        let rule = CopyRule::new(copies, write_acks).expect("the rule can be");
        Self::build(shards, EngineOptions::default(), rule)
    }

    /// Two copies, and little patience with shards that answer nothing.
    pub(crate) fn hasty(shards: usize) -> Self {
        Self::with_patience(shards, HASTY)
    }

    /// Two copies, and so much patience with shards that answer nothing.
    pub(crate) fn with_patience(shards: usize, patience: Duration) -> Self {
        let options = EngineOptions { patience, ..EngineOptions::default() };
        Self::build(shards, options, CopyRule::new(2, 2).expect("the rule can be"))
    }

    /// The same where time passes only while everybody waits: no shard is late because the machine is busy. For what needs no shard while
    /// an engine's thread waits for it.
    pub(crate) fn paused(shards: usize) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        let runtime = runtime.expect("a runtime starts");
        let rule = CopyRule::new(2, 2).expect("the rule can be");
        let options = EngineOptions { patience: HASTY, ..EngineOptions::default() };
        let cluster = runtime.block_on(async { TestCluster::with_copies(shards, options, rule) });
        Self { runtime, cluster }
    }

    fn build(shards: usize, options: EngineOptions, rule: CopyRule) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("a runtime starts");
        let cluster = runtime.block_on(async { TestCluster::with_copies(shards, options, rule) });
        Self { runtime, cluster }
    }

    /// Shards behind gRPC.
    pub(crate) fn over_grpc(shards: usize, options: EngineOptions) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("a runtime starts");
        let cluster = runtime.block_on(async { TestCluster::over_grpc(shards, options) });
        Self { runtime, cluster }
    }

    pub(crate) fn links(&self) -> std::sync::Arc<longshore_engine::ShardLinks> {
        let _on_runtime = self.runtime.enter();
        self.cluster.links()
    }

    pub(crate) fn empty(&self) -> Sequence {
        Sequence::new(&self.cluster.engine, self.cluster.identity(b""), self.links())
    }

    pub(crate) fn reference(&self, tokens: &[u32]) -> (Bodies, Vec<f32>) {
        self.reference_as(b"", tokens)
    }

    pub(crate) fn reference_as(&self, salt: &[u8], tokens: &[u32]) -> (Bodies, Vec<f32>) {
        reference_tiles(&self.cluster.engine, self.cluster.identity(salt), self.links(), tokens)
    }

    pub(crate) fn store(&self, tokens: &[u32]) {
        self.store_as(b"", tokens);
    }

    pub(crate) fn store_as(&self, salt: &[u8], tokens: &[u32]) {
        self.runtime.block_on(self.cluster.store(salt, tokens));
    }

    pub(crate) fn open(&self, prefix: &[u32]) -> Sequence {
        self.open_as(b"", prefix).expect("the blocks are there")
    }

    pub(crate) fn open_as(&self, salt: &[u8], prefix: &[u32]) -> Result<Sequence, Error> {
        let (ctx, identity, links) = (CallContext::new("test"), self.cluster.identity(salt), self.links());
        self.runtime.block_on(Sequence::open(&self.cluster.engine, &ctx, identity, links, prefix, LEASE_MS))
    }

    pub(crate) fn fetch(&self, prefix: &[u32]) -> Result<Sequence, Error> {
        let (ctx, identity, links) = (CallContext::new("test"), self.cluster.identity(b""), self.links());
        self.runtime.block_on(Sequence::fetch(&self.cluster.engine, &ctx, identity, links, prefix))
    }

    pub(crate) fn append(&self, sequence: &mut Sequence, count: u64) -> Result<(), Error> {
        self.runtime.block_on(sequence.append_remote(&CallContext::new("test"), count, LEASE_MS))
    }

    /// One step that must work; its logits.
    pub(crate) fn step(&self, sequence: &mut Sequence, tokens: &[u32]) -> Option<Vec<f32>> {
        self.try_step(sequence, tokens).expect("the step works")
    }

    pub(crate) fn try_step(
        &self,
        sequence: &mut Sequence,
        tokens: &[u32],
    ) -> Result<Option<Vec<f32>>, Error> {
        let input = StepInput { sequence, tokens, logits: Logits::Last };
        let mut outputs = self.cluster.engine.step(&CallContext::new("test"), &mut [input], &mut ())?;
        Ok(outputs.remove(0)?.map(RowLogits::into_all))
    }

    /// Tiles of the full local blocks of a sequence without remote ones.
    pub(crate) fn full_tiles(&self, sequence: &Sequence) -> Bodies {
        let blocks = 0..sequence.full_blocks();
        let tiles = blocks.flat_map(|block| sequence.block_messages(block).expect("the block is local"));
        tiles.map(|tile| ((tile.key, tile.layer as usize), tile.data.to_vec())).collect()
    }

    /// Asks a shard for attention over a view that is not open. It answers one query after the other, so that what it says to this one
    /// (`NotFound`) comes after all that it was asked before, also by those that gave up.
    pub(crate) fn ask_in_vain(&self, shard: usize) -> PendingAttend {
        let queries = Tensor::from_f32(&[1, 1, 1], &[0.0]);
        let item = AttendItem { view_id: u64::MAX, first_position: 0, queries, scale: 1.0, sparse: None };
        let identity = self.cluster.identity(b"");
        let query = AttendQuery { query_id: 0, identity, layer: 0, items: vec![item] };
        let asked = self.links().links()[shard].attend.query_blocking(&CallContext::new("test"), query);
        asked.expect("the link takes a query")
    }

    pub(crate) fn attends(&self) -> u64 {
        self.cluster.shards.iter().map(|shard| shard.attends()).sum()
    }

    /// Waits for views to be closed in the background, for a minute at most.
    pub(crate) fn views_settle_at(&self, expected: usize) -> bool {
        for _ in 0..6_000 {
            if self.cluster.open_views() == expected {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }
}
