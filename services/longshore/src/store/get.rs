//! `longshore store get`: a block into a file.

use std::{ops::Range, path::Path, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use futures::StreamExt;
use longshore_fabric::CallContext;
use longshore_proto::types::{GetBlocks, Identity, ListBlocks, ModelDescription, TileMessage};

use super::{
    cluster::{Cluster, hex_digits, shown, unreachable},
    file::{BlockFile, HeadsFile, HeadsLayer, tile_bytes},
    listing::{Listing, Row},
};
use crate::{cli::StoreGetArgs, console};

/// Longest time for one block.
const BLOCK_TIMEOUT: Duration = Duration::from_secs(60);

/// Runs the command.
pub(super) async fn get(args: &StoreGetArgs) -> Result<()> {
    let cluster = Cluster::find(&args.cluster).await?;
    let row = find(&cluster, &args.key, args.namespace.as_deref().unwrap_or("")).await?;
    if let Some(heads) = &args.heads {
        return get_heads(&cluster, &row, heads, &args.out).await;
    }
    let (block, shard) = fetch(&cluster, &row).await?;
    let written = block.write(&args.out).with_context(|| format!("cannot write {}", args.out.display()))?;
    console::say(format!(
        "{}: block {} of {}, {} layers, {}, from {shard}",
        args.out.display(),
        row.key,
        shown(&row.namespace),
        block.shape.layers,
        console::bytes(written),
    ));
    Ok(())
}

/// Some KV heads of a block into a file.
async fn get_heads(cluster: &Cluster, row: &Row, heads: &Range<u32>, out: &Path) -> Result<()> {
    let (file, shard) = fetch_heads(cluster, row, heads).await?;
    let written = file.write(out).with_context(|| format!("cannot write {}", out.display()))?;
    console::say(format!(
        "{}: KV heads {} to {} of {} of block {} of {}, {} layers, {}, from {shard}",
        out.display(),
        heads.start,
        heads.end - 1,
        file.block.shape.kv_heads,
        row.key,
        shown(&row.namespace),
        file.block.shape.layers,
        console::bytes(written),
    ));
    Ok(())
}

/// Some KV heads of a block from the first of its holders whose copy is sound, and the id of that.
pub(super) async fn fetch_heads(
    cluster: &Cluster,
    row: &Row,
    heads: &Range<u32>,
) -> Result<(HeadsFile, String)> {
    let model = cluster.model().await?;
    let kv_heads = model.tile_shape.kv_heads;
    ensure!(
        heads.end <= kv_heads,
        "`--heads {}..{}` is beyond the tiles, which have {kv_heads} KV heads; hint: at most `--heads 0..{kv_heads}`",
        heads.start,
        heads.end
    );
    let mut failures = Vec::new();
    for (at, _) in &row.copies {
        let shard = &cluster.shards[*at];
        match fetch_heads_from(cluster, *at, row, &model, heads).await {
            Ok(file) => return Ok((file, shard.id.clone())),
            Err(error) => failures.push(format!("`{}`: {}", shard.id, console::text(&error))),
        }
    }
    bail!("no copy of block {} can be read: {}", row.key, failures.join("; "))
}

async fn fetch_heads_from(
    cluster: &Cluster,
    at: usize,
    row: &Row,
    model: &ModelDescription,
    heads: &Range<u32>,
) -> Result<HeadsFile> {
    let shape = model.tile_shape;
    let head_bytes = tile_bytes(&shape)? / shape.kv_heads as usize;
    let (ctx, get) = request(cluster, at, row, model).await?;
    let mut answers = cluster.shards[at].client.get_heads(&ctx, get, heads.clone()).await?;
    let mut layers = Vec::new();
    while let Some(answer) = answers.next().await {
        let tile = answer?.context("it no longer holds the block")?;
        due(&tile, row, layers.len(), shape.layers)?;
        let read = tile.copy_heads(heads.clone(), shape.kv_heads, head_bytes);
        let (body, tile_crc32c) = read.with_context(|| format!("layer {}", tile.layer))?;
        let part = tile.data.heads().context("its heads are proven")?;
        layers.push(HeadsLayer { tile_crc32c, head_crc32cs: part.head_crc32cs.clone(), body: body.into() });
    }
    ensure!(layers.len() == shape.layers as usize, "it sent {} of {} layers", layers.len(), shape.layers);
    Ok(HeadsFile { block: named(row, model, Vec::new()), heads: heads.clone(), layers })
}

/// The one block whose key and namespace begin so.
pub(super) async fn find(cluster: &Cluster, key: &str, namespace: &str) -> Result<Row> {
    let list = ListBlocks {
        key_prefix: hex_digits("the key", key, 32)?,
        namespace_prefix: hex_digits("`--namespace`", namespace, 64)?,
        limit: 2,
        ..ListBlocks::default()
    };
    let mut listing = Listing::new(cluster, list);
    let (first, second) = (listing.next().await, listing.next().await);
    let Some(row) = first else {
        if let Some((shard, error)) = listing.failures().next() {
            bail!("no shard that answers holds a block `{key}`; {}: {error}", unreachable(shard));
        }
        bail!("no shard holds a block `{key}`; hint: `longshore store ls --prefix {key}`");
    };
    if let Some(other) = second {
        let names = [&row, &other].map(|row| format!("{} of {}", row.key, shown(&row.namespace)));
        bail!(
            "more than one block begins with `{key}`: {}; hint: give more digits, or `--namespace`",
            names.join(", ")
        );
    }
    Ok(row)
}

/// A block from the first of its holders whose copy is sound, and the id of that.
pub(super) async fn fetch(cluster: &Cluster, row: &Row) -> Result<(BlockFile, String)> {
    let model = cluster.model().await?;
    let mut failures = Vec::new();
    for (at, _) in &row.copies {
        let shard = &cluster.shards[*at];
        match fetch_from(cluster, *at, row, &model).await {
            Ok(block) => return Ok((block, shard.id.clone())),
            Err(error) => failures.push(format!("`{}`: {}", shard.id, console::text(&error))),
        }
    }
    bail!("no copy of block {} can be read: {}", row.key, failures.join("; "))
}

async fn fetch_from(cluster: &Cluster, at: usize, row: &Row, model: &ModelDescription) -> Result<BlockFile> {
    let (ctx, get) = request(cluster, at, row, model).await?;
    let mut answers = cluster.shards[at].client.get_blocks(&ctx, get).await?;
    let mut tiles: Vec<(u32, Bytes)> = Vec::new();
    while let Some(answer) = answers.next().await {
        let tile = answer?.context("it no longer holds the block")?;
        due(&tile, row, tiles.len(), model.tile_shape.layers)?;
        tiles.push(verified(&tile)?);
    }
    ensure!(
        tiles.len() == model.tile_shape.layers as usize,
        "it sent {} of {} layers",
        tiles.len(),
        model.tile_shape.layers
    );
    Ok(named(row, model, tiles))
}

/// What a shard is asked for a whole block with.
async fn request(
    cluster: &Cluster,
    at: usize,
    row: &Row,
    model: &ModelDescription,
) -> Result<(CallContext, GetBlocks)> {
    let identity = Identity {
        deployment: model.deployment,
        namespace: row.namespace,
        shard_map_epoch: cluster.stats_of(at).await?.shard_map_epoch,
    };
    let ctx = CallContext::new("store").with_timeout(BLOCK_TIMEOUT);
    Ok((ctx, GetBlocks::whole(identity, vec![row.key])))
}

/// Refuses a tile that is not the one that is due.
fn due(tile: &TileMessage, row: &Row, layer: usize, layers: u32) -> Result<()> {
    ensure!(
        tile.key == row.key && tile.layer as usize == layer && tile.layer < layers,
        "it sent layer {} of block {} where layer {layer} of {} is due",
        tile.layer,
        tile.key,
        row.key
    );
    Ok(())
}

/// A block with all that names it.
fn named(row: &Row, model: &ModelDescription, tiles: Vec<(u32, Bytes)>) -> BlockFile {
    let place = row.copies.iter().find_map(|(_, entry)| entry.place);
    let (deployment, namespace, key, shape) = (model.deployment, row.namespace, row.key, model.tile_shape);
    BlockFile { deployment, namespace, key, place, shape, tiles }
}

/// An own copy of a tile's body that matches its checksum.
fn verified(tile: &TileMessage) -> Result<(u32, Bytes)> {
    let mut body = vec![0; tile.data.len()];
    let copied = tile.data.copy_to(&mut body)?;
    ensure!(copied == tile.crc32c, "layer {} does not match its checksum", tile.layer);
    Ok((tile.crc32c, body.into()))
}
