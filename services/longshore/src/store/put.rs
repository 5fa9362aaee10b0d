//! `longshore store put`: blocks from files, on the shards that own them.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use futures::StreamExt;
use longshore_blocks::quorum::{Candidate, CopyRule, Tally, Verdict};
use longshore_fabric::{CallContext, Error};
use longshore_proto::types::{
    Identity, ModelDescription, PutOutcome, ShardStats, TileMessage, WireTileShape,
};
use tokio::sync::mpsc;

use super::{cluster::Cluster, file::BlockFile};
use crate::{cli::StorePutArgs, console};

/// Longest time for one block.
const BLOCK_TIMEOUT: Duration = Duration::from_secs(60);

/// Where a block went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Placed {
    /// Ids of the shards that hold it now, and whether they did before.
    pub(super) holders: Vec<(String, bool)>,
    /// Copies that there should be.
    pub(super) wanted: usize,
    /// Why others did not take it.
    pub(super) refusals: Vec<String>,
}

/// Runs the command.
pub(super) async fn put(args: &StorePutArgs) -> Result<()> {
    let cluster = Cluster::find(&args.cluster).await?;
    for path in &args.files {
        let placed = put_file(&cluster, path, args.shard.as_deref()).await;
        let placed = placed.with_context(|| path.display().to_string())?;
        let holders = placed.holders.iter().map(|(id, before)| match before {
            true => format!("{id} (held it already)"),
            false => id.clone(),
        });
        let holders = holders.collect::<Vec<_>>().join(", ");
        console::say(format!(
            "{}: on {holders}, {} of {} copies",
            path.display(),
            placed.holders.len(),
            placed.wanted
        ));
        placed.refusals.iter().for_each(console::note);
    }
    Ok(())
}

/// Reads a file, checks it whole, and stores its block.
pub(super) async fn put_file(cluster: &Cluster, path: &Path, only: Option<&str>) -> Result<Placed> {
    let block = BlockFile::read(path)?;
    let model = cluster.model().await?;
    fits(&block, &model)?;
    let stats = cluster.stats().await;
    let known: Vec<&ShardStats> = stats.iter().filter_map(|stats| stats.as_ref().ok()).collect();
    let told = known.iter().find(|stats| stats.copies.wanted > 0);
    let (copies, acks) =
        told.map_or((1, 1), |stats| (stats.copies.wanted as usize, stats.copies.write_acks as usize));
    let (rule, candidates) = match (only, block.place) {
        (Some(id), _) => (CopyRule::default(), vec![cluster.position(id)?]),
        (None, None) => bail!(
            "the block has no place: nobody told the shard that it came from where it belongs; hint: name a shard with `--shard`"
        ),
        (None, Some(place)) => {
            let map = cluster.view.shard_map();
            ensure!(
                known.iter().any(|stats| stats.shard_map_epoch == map.epoch()),
                "the shards place blocks by another shard map than these members make; hint: pass the `--members-file` that \
                 they have, or name a shard with `--shard`"
            );
            (CopyRule::new(copies, acks)?, map.candidates(&place.stripe_seed, copies))
        }
    };
    store(cluster, &block, &stats, rule, candidates).await
}

/// Refuses a block of another deployment, by the name of the field.
fn fits(block: &BlockFile, model: &ModelDescription) -> Result<()> {
    ensure!(
        block.shape == model.tile_shape,
        "`tile_shape` is {}, this cluster holds {}; hint: put it into the cluster that it came from",
        shown(&block.shape),
        shown(&model.tile_shape)
    );
    ensure!(
        block.deployment == model.deployment,
        "`deployment` is not that of this cluster; hint: its model and KV settings must be those that the block was made with"
    );
    Ok(())
}

fn shown(shape: &WireTileShape) -> String {
    format!(
        "{} layers of {} tokens × {} KV heads × {} in {} (layout {})",
        shape.layers,
        shape.block_tokens,
        shape.kv_heads,
        shape.head_dim,
        format!("{:?}", shape.dtype).to_lowercase(),
        shape.layout
    )
}

/// Sends the block to the first candidates that take it.
async fn store(
    cluster: &Cluster,
    block: &BlockFile,
    stats: &[Result<ShardStats, Error>],
    rule: CopyRule,
    candidates: Vec<usize>,
) -> Result<Placed> {
    let map = cluster.view.shard_map();
    let candidates = candidates.into_iter().map(|shard| Candidate { shard, host: map.host_of(shard) });
    let mut tally = Tally::new(rule, candidates);
    let mut placed = Placed { holders: Vec::new(), wanted: rule.copies(), refusals: Vec::new() };
    while let Some(at) = { tally.under_way().next() } {
        let shard = &cluster.shards[at];
        let outcome = match &stats[at] {
            Ok(stats) => send(cluster, at, block, stats.shard_map_epoch).await,
            Err(error) => Err(error.clone().into()),
        };
        match outcome {
            Ok(PutOutcome::Stored) => placed.holders.push((shard.id.clone(), false)),
            Ok(PutOutcome::Duplicate) => placed.holders.push((shard.id.clone(), true)),
            Ok(other) => placed.refusals.push(format!("shard `{}` did not take it: {other:?}", shard.id)),
            Err(ref error) => placed.refusals.push(format!(
                "shard `{}` did not take it: {}",
                shard.id,
                console::text(error)
            )),
        }
        match outcome {
            Ok(PutOutcome::Stored | PutOutcome::Duplicate) => tally.held(at),
            _ => {
                tally.refused(at);
                tally.ask_next();
            }
        }
    }
    ensure!(
        tally.verdict() == Verdict::Stored,
        "stored on {} shards, {} must confirm it: {}",
        placed.holders.len(),
        rule.write_acks(),
        placed.refusals.join("; ")
    );
    Ok(placed)
}

/// Sends the block to one shard.
async fn send(cluster: &Cluster, at: usize, block: &BlockFile, epoch: u64) -> Result<PutOutcome> {
    let shard = &cluster.shards[at];
    let identity =
        Identity { deployment: block.deployment, namespace: block.namespace, shard_map_epoch: epoch };
    let ctx = CallContext::new("store").with_timeout(BLOCK_TIMEOUT);
    let (sender, tiles) = mpsc::channel(1);
    let feed = async move {
        for (layer, (crc32c, body)) in (0..).zip(&block.tiles) {
            let data = body.clone().into();
            let tile = TileMessage { key: block.key, layer, data, crc32c: *crc32c, place: block.place };
            // A shard that takes no more says why.
            if sender.send(tile).await.is_err() {
                return;
            }
        }
    };
    let answer = async {
        let mut acks = shard.client.put_blocks(&ctx, identity, block.shape, tiles).await?;
        while let Some(ack) = acks.next().await {
            let ack = ack?;
            if ack.key == block.key {
                ensure!(ack.message.is_empty(), "{}", ack.message);
                return Ok(ack.outcome);
            }
        }
        bail!("it ended the stream and acknowledged nothing")
    };
    tokio::pin!(answer);
    tokio::select! {
        outcome = &mut answer => outcome,
        () = feed => answer.await,
    }
}
