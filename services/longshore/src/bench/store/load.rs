//! Clients that put and get as fast as they can, and what came of it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use futures::StreamExt;
use longshore_attention::TileShape;
use longshore_blocks::{BlockKey, Deployment, EXACT_PREFILL, crc32c};
use longshore_engine::wire_tile_shape;
use longshore_fabric::{CallContext, Shard};
use longshore_proto::types::{GetBlocks, Identity, PutOutcome, TileMessage};
use serde::Serialize;
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
};

use super::{ring, ring::Ring, slab};
use crate::random::Random;

/// Blocks of one stream that may be unacknowledged.
const WINDOW_BLOCKS: usize = 2;
/// Blocks of one read call.
const GET_BLOCKS: usize = 4;
/// Bytes that a reader or writer keeps going around in.
const RING_BYTES: usize = 32 << 20;
/// Bytes of blocks that are there to be read.
const HELD_BYTES: usize = 64 << 20;

/// The deployment of every measurement.
pub(super) fn deployment() -> Deployment {
    Deployment::from_bytes([0x5b; 32])
}

/// The caller of every measurement.
pub(super) fn identity() -> Identity {
    let namespace = deployment().namespace(EXACT_PREFILL, b"bench");
    Identity { deployment: deployment(), namespace, shard_map_epoch: 0 }
}

/// Prepared tiles with their checksums.
#[derive(Debug)]
pub(super) struct Source {
    tiles: Vec<(u32, Bytes)>,
    tile_bytes: usize,
}

impl Source {
    /// About `bytes` of tiles of finite f16 numbers.
    pub(super) fn new(shape: TileShape, bytes: usize) -> Self {
        let tile_bytes = shape.bytes();
        let mut random = Random::new(1);
        let mut tile = || {
            // Without the highest bit of the exponent no number is infinite.
            let words = std::iter::repeat_with(|| random.next() & 0xbfff_bfff_bfff_bfff).take(tile_bytes / 8);
            let data: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
            (crc32c(&data), Bytes::from(data))
        };
        let tiles = (0..(bytes / tile_bytes).max(4)).map(|_| tile()).collect();
        Self { tiles, tile_bytes }
    }

    /// Bytes of each.
    pub(super) fn tile_bytes(&self) -> usize {
        self.tile_bytes
    }

    /// The bodies.
    pub(super) fn bodies(&self) -> &[(u32, Bytes)] {
        &self.tiles
    }

    /// The tile of a block in a layer.
    pub(super) fn tile(&self, key: BlockKey, layer: u32) -> TileMessage {
        let number = u64::from_le_bytes(std::array::from_fn(|byte| key.0[byte]));
        let index = number.wrapping_mul(7).wrapping_add(u64::from(layer)) % self.tiles.len() as u64;
        let (crc32c, data) = self.tiles[index as usize].clone();
        TileMessage { key, layer, data: data.into(), crc32c, place: None }
    }

    /// Memory for about `bytes` of tiles, every page of it touched.
    pub(super) fn ring(&self, bytes: usize) -> Vec<u8> {
        vec![1; bytes.next_multiple_of(self.tile_bytes)]
    }
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Operation {
    /// Blocks are stored: from the first tile to the acknowledgement.
    Put,
    /// Blocks are read, verified and copied, four a call.
    Get,
}

/// Bytes and times.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Bytes of tiles.
    pub(super) bytes: u64,
    /// Seconds from the first to the last.
    pub(super) seconds: f64,
    /// Of each block put or call of get.
    pub(super) milliseconds: Vec<f64>,
}

/// One point.
#[derive(Debug)]
pub(super) struct Load {
    pub(super) shard: Arc<dyn Shard>,
    pub(super) source: Arc<Source>,
    /// Where lanes that can do so put the tiles that are read.
    pub(super) memory: Arc<Ring>,
    pub(super) shape: TileShape,
    pub(super) layers: u32,
    pub(super) concurrency: u32,
    pub(super) duration: Duration,
    pub(super) verify: bool,
}

impl Load {
    /// Runs all streams, after a short run that does not count.
    pub(super) async fn run(self: &Arc<Self>, operation: Operation) -> Result<Tally> {
        let held: Arc<[BlockKey]> = match operation {
            Operation::Put => Arc::default(),
            Operation::Get => self.fill().await?.into(),
        };
        self.streams(operation, &held, self.duration.mul_f64(0.2)).await?;
        self.streams(operation, &held, self.duration).await
    }

    async fn streams(
        self: &Arc<Self>,
        operation: Operation,
        held: &Arc<[BlockKey]>,
        duration: Duration,
    ) -> Result<Tally> {
        let begun = Instant::now();
        let until = begun + duration;
        let mut tasks = JoinSet::new();
        for stream in 0..self.concurrency {
            let (load, held) = (Arc::clone(self), Arc::clone(held));
            tasks.spawn(async move {
                match operation {
                    Operation::Put => load.put(stream, until).await,
                    Operation::Get => load.get(stream, &held, until).await,
                }
            });
        }
        let mut tally = Tally::default();
        while let Some(part) = tasks.join_next().await {
            let part = part.context("a stream panicked")??;
            tally.bytes += part.bytes;
            tally.milliseconds.extend(part.milliseconds);
        }
        tally.seconds = begun.elapsed().as_secs_f64();
        Ok(tally)
    }

    fn block_bytes(&self) -> usize {
        self.source.tile_bytes() * self.layers as usize
    }

    /// Stores the blocks that will be read.
    async fn fill(&self) -> Result<Vec<BlockKey>> {
        let count = (HELD_BYTES / self.block_bytes()).max(GET_BLOCKS);
        let keys: Vec<BlockKey> = (0..count).map(|block| fresh_key(u32::MAX, block as u64)).collect();
        let mut next = keys.iter().copied();
        self.store(&mut || next.next()).await?;
        Ok(keys)
    }

    async fn put(&self, stream: u32, until: Instant) -> Result<Tally> {
        // Keys of different runs differ, so that no block is there already.
        let run = Random::of("put", &[u64::from(std::process::id()), nanoseconds()]).next();
        let mut block = 0;
        let mut next = || {
            block += 1;
            (Instant::now() < until).then(|| fresh_key(stream, run.wrapping_add(block)))
        };
        self.store(&mut next).await
    }

    /// One store stream with the blocks that `next` names.
    async fn store(&self, next: &mut (dyn FnMut() -> Option<BlockKey> + Send)) -> Result<Tally> {
        let ctx = CallContext::new("bench");
        let (sender, tiles) = mpsc::channel(1);
        let shape = wire_tile_shape(self.shape, self.layers as usize);
        let mut acks = self.shard.put_blocks(&ctx, identity(), shape, tiles).await?;
        let (begun, window) = (Mutex::new(HashMap::new()), Semaphore::new(WINDOW_BLOCKS));
        let lock = || begun.lock().unwrap_or_else(PoisonError::into_inner);
        let feed = async {
            while let Some(key) = next() {
                window.acquire().await.context("the window stays open")?.forget();
                lock().insert(key, Instant::now());
                for layer in 0..self.layers {
                    if sender.send(self.source.tile(key, layer)).await.is_err() {
                        return Ok(());
                    }
                }
            }
            drop(sender);
            anyhow::Ok(())
        };
        let read = async {
            let mut tally = Tally::default();
            while let Some(ack) = acks.next().await {
                let ack = ack?;
                let known = matches!(ack.outcome, PutOutcome::Stored | PutOutcome::Duplicate);
                ensure!(known, "a block was not stored: {ack:?}");
                let begun = lock().remove(&ack.key).context("an acknowledgement of another block")?;
                tally.milliseconds.push(begun.elapsed().as_secs_f64() * 1e3);
                tally.bytes += self.block_bytes() as u64;
                window.add_permits(1);
            }
            Ok(tally)
        };
        let ((), tally) = tokio::try_join!(feed, read)?;
        ensure!(lock().is_empty(), "the stream ended with blocks that nobody acknowledged");
        Ok(tally)
    }

    async fn get(&self, stream: u32, held: &[BlockKey], until: Instant) -> Result<Tally> {
        let mut tally = Tally::default();
        let mut ring = Vec::new();
        let mut calls = held.chunks(GET_BLOCKS).cycle().skip(stream as usize);
        while Instant::now() < until {
            let keys = calls.next().context("there are blocks to read")?.to_vec();
            let begun = Instant::now();
            tally.bytes += self.read(keys, &mut ring).await?;
            tally.milliseconds.push(begun.elapsed().as_secs_f64() * 1e3);
        }
        Ok(tally)
    }

    /// One read call; the bytes that came and verified.
    async fn read(&self, keys: Vec<BlockKey>, ring: &mut Vec<u8>) -> Result<u64> {
        let wanted = keys.len() * self.layers as usize;
        let get = GetBlocks::whole(identity(), keys);
        let memory = self.memory.clone();
        let mut tiles = self.shard.get_blocks_into(&CallContext::new("bench"), get, memory).await?;
        let tile_bytes = self.source.tile_bytes();
        let mut count = 0;
        while let Some(tile) = tiles.next().await {
            let tile = tile?.context("a block that was stored is missing")?;
            let sound = match ring::landed(&tile) {
                Some(sound) => sound,
                None => {
                    if ring.is_empty() {
                        *ring = self.source.ring(RING_BYTES);
                    }
                    slab::take(ring, &tile, count, self.verify)
                }
            };
            let sound = sound && tile.data.len() == tile_bytes;
            ensure!(sound, "a tile does not match its checksum");
            count += 1;
        }
        ensure!(count == wanted, "{count} tiles of {wanted}");
        Ok((count * tile_bytes) as u64)
    }
}

fn fresh_key(stream: u32, block: u64) -> BlockKey {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&block.to_le_bytes());
    key[8..12].copy_from_slice(&stream.to_le_bytes());
    BlockKey(key)
}

fn nanoseconds() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_nanos() as u64)
}
