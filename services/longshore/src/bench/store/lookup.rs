//! Lookups of a prefix of a million tokens, dealt out over four shards: one call to each.

use std::{sync::Arc, time::Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use futures::{StreamExt, future::try_join_all};
use longshore_attention::{KvDtype, TileShape};
use longshore_blocks::{BlockKey, KeyChain, ShardEntry, ShardId, ShardMap, crc32c};
use longshore_engine::wire_tile_shape;
use longshore_fabric::{CallContext, Shard};
use longshore_proto::types::{Lookup, PutOutcome, TileMessage};
use serde::Serialize;
use tokio::sync::mpsc;

use super::{
    BLOCK_TOKENS,
    load::identity,
    place::{Place, Plan},
};
use crate::{
    bench::statistics::Summary,
    cli::{BenchStoreArgs, StoreEnd},
};

/// Tokens of the prefix and shards that hold it.
const TOKENS: usize = 1_000_000;
const SHARDS: usize = 4;
/// Rounds that count.
const ROUNDS: usize = 200;
/// Bytes of a tile: as small as tiles get, since nobody reads them.
pub(super) const TILE_BYTES: u64 = 8_192;

/// Shape of those tiles.
pub(super) fn shape() -> TileShape {
    TileShape { block_tokens: BLOCK_TOKENS, kv_heads: 1, head_dim: 32, dtype: KvDtype::F16 }
}

/// Milliseconds of a lookup of all blocks, all shards asked at once.
#[derive(Debug, Clone, Serialize)]
pub(super) struct LookupPoint {
    pub(super) processes: u32,
    pub(super) keys: usize,
    pub(super) shards: usize,
    pub(super) milliseconds: Summary,
}

/// Stores the prefix and looks it up.
pub(super) async fn measure(args: &BenchStoreArgs, processes: u32) -> Result<LookupPoint> {
    let args = BenchStoreArgs { layers: 1, lanes: Vec::new(), ..args.clone() };
    let plan = Plan { shards: SHARDS, ..Plan::new(&args, shape(), StoreEnd::Store) };
    let place = if processes == 1 { Place::here(&plan).await? } else { Place::child(&plan).await? };
    let shards = place.shards()?;
    let parts = parts()?;
    try_join_all(shards.iter().zip(&parts).map(|(shard, keys)| fill(shard, keys))).await?;
    let mut samples = Vec::with_capacity(ROUNDS);
    for round in 0..ROUNDS + ROUNDS / 10 {
        let begun = Instant::now();
        let found = try_join_all(shards.iter().zip(&parts).map(|(shard, keys)| find(shard, keys))).await?;
        ensure!(found.into_iter().all(|all| all), "a block that was stored is missing");
        if round >= ROUNDS / 10 {
            samples.push(begun.elapsed().as_secs_f64() * 1e3);
        }
    }
    place.end().await?;
    let keys = parts.iter().map(Vec::len).sum();
    Ok(LookupPoint { processes, keys, shards: SHARDS, milliseconds: Summary::of(samples) })
}

/// Keys of the prefix by the shard that owns them.
fn parts() -> Result<Vec<Vec<BlockKey>>> {
    let entries = (0..SHARDS).map(|index| ShardEntry::new(ShardId(format!("kv-{index}")), 1));
    let map = ShardMap::new(0, entries.collect())?;
    let geometry = longshore_blocks::Geometry::new(BLOCK_TOKENS as u32, 32)?;
    let mut chain = KeyChain::new(identity().namespace, geometry);
    let tokens: Vec<u32> = (0..TOKENS as u32).collect();
    chain.push(&tokens);
    let mut parts = vec![Vec::new(); SHARDS];
    for (block, key) in chain.keys().iter().enumerate() {
        let owner = map.owner(&chain.stripe_seed(block as u64)).context("there are shards")?;
        let index = map.shards().iter().position(|entry| entry.id == owner.id).context("the owner is one")?;
        parts[index].push(*key);
    }
    Ok(parts)
}

async fn fill(shard: &Arc<dyn Shard>, keys: &[BlockKey]) -> Result<()> {
    let (sender, tiles) = mpsc::channel(16);
    let wire = wire_tile_shape(shape(), 1);
    let mut acks = shard.put_blocks(&CallContext::new("bench"), identity(), wire, tiles).await?;
    let data = Bytes::from(vec![0; shape().bytes()]);
    let crc32c = crc32c(&data);
    let feed = async {
        for &key in keys {
            let data = data.clone().into();
            sender
                .send(TileMessage { key, layer: 0, data, crc32c, place: None })
                .await
                .context("the shard listens")?;
        }
        drop(sender);
        anyhow::Ok(())
    };
    let read = async {
        let mut stored = 0;
        while let Some(ack) = acks.next().await {
            ensure!(ack?.outcome == PutOutcome::Stored, "a block was not stored");
            stored += 1;
        }
        Ok(stored)
    };
    let ((), stored) = tokio::try_join!(feed, read)?;
    ensure!(stored == keys.len(), "{stored} blocks of {} were stored", keys.len());
    Ok(())
}

async fn find(shard: &Arc<dyn Shard>, keys: &[BlockKey]) -> Result<bool> {
    let lookup = Lookup { identity: identity(), keys: keys.to_vec(), peek: false };
    let found = shard.lookup(&CallContext::new("bench"), lookup).await?;
    Ok(found.len() == keys.len() && found.into_iter().all(|held| held))
}
