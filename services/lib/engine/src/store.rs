//! Putting tiles on the shards that will hold them, and getting them back.

mod streams;

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, stream::FuturesUnordered};
use longshore_attention::Tile;
use longshore_blocks::{BlockKey, quorum::Verdict};
use longshore_fabric::{CallContext, Code, TileRooms};
use longshore_proto::types::{GetBlocks, Identity, PutOutcome, TileMessage, WireTileShape};
use tokio::sync::mpsc;

use crate::{
    Engine, Error, LocalBlock, ShardLink, ShardLinks,
    intake::within,
    patience::{answer, patiently},
};

pub use streams::{PutStreams, Stored, Unstored};

/// Shards that a block is tried on within the caller's time, one after the other is silent.
const ATTEMPTS: u32 = 3;

/// Stores one block, all of its tiles, and waits for the acknowledgement.
pub async fn store_block(
    ctx: &CallContext,
    link: &ShardLink,
    identity: Identity,
    shape: WireTileShape,
    tiles: Vec<TileMessage>,
) -> Result<PutOutcome, Error> {
    let key = tiles.first().map(|tile| tile.key);
    let (sender, receiver) = mpsc::channel(1);
    let feed = async move {
        for tile in tiles {
            // The shard ends the call early when it holds the block already or refuses it; its answer says which.
            if sender.send(tile).await.is_err() {
                break;
            }
        }
    };
    let answer = async {
        let mut acks = link.shard.put_blocks(ctx, identity, shape, receiver).await?;
        match acks.next().await {
            Some(Ok(ack)) if Some(ack.key) == key => Ok(ack.outcome),
            Some(Ok(_)) => Err(longshore_fabric::Error::new(Code::DataLoss, "acknowledged another block")),
            Some(Err(error)) => Err(error),
            None => Err(longshore_fabric::Error::new(Code::Unavailable, "ended without an acknowledgement")),
        }
    };
    let both = async {
        tokio::pin!(feed);
        tokio::pin!(answer);
        tokio::select! {
            outcome = &mut answer => outcome,
            () = &mut feed => answer.await,
        }
    };
    let outcome = within(ctx, both).await.and_then(|outcome| outcome);
    outcome.map_err(|source| Error::of_shard(ctx, &link.id, source))
}

/// Stores one block on as many of `candidates`, by preference, as the rule of `links` says. Returns as soon as enough of them
/// acknowledged it; the other copies go on in the background. The outcome of a block that is not stored is that of the last
/// shard that refused it.
pub async fn store_copies(
    ctx: &CallContext,
    links: &Arc<ShardLinks>,
    candidates: &[usize],
    identity: Identity,
    shape: WireTileShape,
    tiles: Vec<TileMessage>,
) -> Result<PutOutcome, Error> {
    let (ctx, links) = (ctx.clone(), Arc::clone(links));
    // Silence is made good by the next candidate, which needs time too.
    let patience = ctx.time_left().map(|left| left / ATTEMPTS).filter(|_| candidates.len() > 1);
    let send = {
        let (ctx, links) = (ctx.clone(), Arc::clone(&links));
        move |shard: usize| {
            let (ctx, link, tiles) = (ctx.clone(), links.links()[shard].clone(), tiles.clone());
            async move {
                let outcome = store_patiently(&ctx, &link, patience, identity, shape, tiles).await;
                link.note(&outcome);
                (shard, outcome)
            }
        }
    };
    let mut tally = links.tally(candidates);
    let mut calls: FuturesUnordered<_> = tally.under_way().map(&send).collect();
    let mut refused = Err(Error::NoShards);
    while tally.verdict() == Verdict::Waiting {
        let Some((shard, outcome)) = calls.next().await else { break };
        match outcome {
            Ok(PutOutcome::Stored | PutOutcome::Duplicate) => tally.held(shard),
            outcome => {
                tally.refused(shard);
                refused = outcome;
            }
        }
        while let Some(next) = tally.ask_next() {
            calls.push(send(next));
        }
    }
    if tally.verdict() != Verdict::Stored {
        return refused;
    }
    // What finds no place here is found missing and made good by the shards.
    if !calls.is_empty()
        && let Ok(place) = Arc::clone(&links.background).try_acquire_owned()
    {
        let rest = async move {
            let _place = place;
            while let Some((shard, outcome)) = calls.next().await {
                match outcome {
                    Ok(PutOutcome::Stored | PutOutcome::Duplicate) => tally.held(shard),
                    _ => tally.refused(shard),
                }
                while let Some(next) = tally.ask_next() {
                    calls.push(send(next));
                }
            }
        };
        links.tasks().spawn_on(rest, links.runtime());
    }
    Ok(PutOutcome::Stored)
}

/// [`store_block`] that takes a shard for gone when nothing is heard for as long as `patience`, where there is one.
async fn store_patiently(
    ctx: &CallContext,
    link: &ShardLink,
    patience: Option<Duration>,
    identity: Identity,
    shape: WireTileShape,
    tiles: Vec<TileMessage>,
) -> Result<PutOutcome, Error> {
    patiently(link, patience, store_block(ctx, link, identity, shape, tiles)).await
}

/// Reads whole blocks of one shard: those that came and verified, each with its position in `keys`, and why the others did not. What
/// does not verify is an error, never a tile; what came before it can be used. A shard that sends nothing for as long as `patience`,
/// where there is one, is late.
pub async fn fetch_blocks(
    engine: &Engine,
    ctx: &CallContext,
    link: &ShardLink,
    identity: Identity,
    keys: &[BlockKey],
    patience: Option<Duration>,
) -> (Vec<(usize, LocalBlock)>, Result<(), Error>) {
    let mut blocks = Vec::with_capacity(keys.len());
    let ended = fetch_into(engine, (ctx, patience), link, identity, keys, &mut blocks).await;
    (blocks, ended)
}

async fn fetch_into(
    engine: &Engine,
    (ctx, patience): (&CallContext, Option<Duration>),
    link: &ShardLink,
    identity: Identity,
    keys: &[BlockKey],
    blocks: &mut Vec<(usize, LocalBlock)>,
) -> Result<(), Error> {
    let get = GetBlocks::whole(identity, keys.to_vec());
    let layers = engine.backend().config().layers;
    let block_bytes = (engine.tile_shape().bytes() * layers) as u64;
    let mut under_way = link.load.begin(keys.len() as u64 * block_bytes);
    let memory = Arc::new(TileRooms::new(engine.tile_shape()));
    let mut answers = answer(ctx, link, patience, link.shard.get_blocks_into(ctx, get, memory)).await?;
    let mut missing = Vec::new();
    for (at, &key) in keys.iter().enumerate() {
        let mut tiles = Vec::with_capacity(layers);
        for layer in 0..layers {
            let next = async { answers.next().await.transpose() };
            match answer(ctx, link, patience, next).await? {
                Some(Some(message)) => tiles.push(verified(engine, link, key, layer, &message)?),
                Some(None) if layer == 0 => {
                    missing.push(key);
                    break;
                }
                Some(None) | None => {
                    return Err(mismatch(link, format!("block `{key}` without layer {layer}")));
                }
            }
        }
        if tiles.len() == layers {
            blocks.push((at, LocalBlock::from_tiles(tiles)));
        }
        under_way.came(block_bytes);
    }
    match missing.is_empty() {
        true => Ok(()),
        false => Err(Error::Missing { shard: link.id.clone(), keys: missing }),
    }
}

fn verified(
    engine: &Engine,
    link: &ShardLink,
    key: BlockKey,
    layer: usize,
    message: &TileMessage,
) -> Result<Arc<Tile>, Error> {
    if message.key != key || message.layer as usize != layer {
        let problem =
            format!("block `{}` layer {} instead of `{key}` layer {layer}", message.key, message.layer);
        return Err(mismatch(link, problem));
    }
    let bad =
        |problem: &dyn std::fmt::Display| mismatch(link, format!("block `{key}` layer {layer}: {problem}"));
    // The checksum of the copy counts: the message may lie in memory that its sender can still write to. Some lanes made the copy.
    let (tile, crc32c) = match TileRooms::new(engine.tile_shape()).landed(message) {
        Some(landed) => landed,
        None => {
            let filled = Tile::filled(engine.tile_shape(), |body| message.data.copy_to(body));
            let (tile, copied) = filled.map_err(|error| bad(&error))?;
            (Arc::new(tile), copied.map_err(|error| bad(&error))?)
        }
    };
    if crc32c != message.crc32c {
        return Err(mismatch(link, format!("block `{key}` layer {layer} with a wrong checksum")));
    }
    Ok(tile)
}

fn mismatch(link: &ShardLink, problem: String) -> Error {
    Error::Mismatch { shard: link.id.clone(), problem }
}
