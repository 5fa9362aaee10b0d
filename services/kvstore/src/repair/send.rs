//! Sending whole blocks to another shard, verified here before they go and there when they come, at no more than a given rate.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::StreamExt;
use longshore_blocks::{BlockKey, BlockPlace, repair::Rate};
use longshore_fabric::{CallContext, Code, Error, Shard};
use longshore_proto::types::{Identity, PutOutcome, TileMessage};
use tokio::sync::mpsc;

use crate::{get::message, store::Store};

/// Tiles that may wait for the wire.
const TILES_WAITING_MAX: usize = 4;
/// Longest time without an acknowledgement or a tile taken.
const PATIENCE: Duration = Duration::from_secs(10);

/// The rate of all that this shard sends for repair.
#[derive(Debug)]
pub(super) struct SharedRate(Mutex<Rate>);

impl SharedRate {
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Self(Mutex::new(Rate::new(bytes_per_second)))
    }

    async fn wait(&self, bytes: u64, now_us: u64) {
        let wait_us = self.0.lock().unwrap_or_else(PoisonError::into_inner).take(bytes, now_us);
        tokio::time::sleep(Duration::from_micros(wait_us)).await;
    }
}

/// Sends blocks to a shard; false when it did not take all of them.
pub(super) async fn run(
    store: &Arc<Store>,
    shard: &Arc<dyn Shard>,
    identity: Identity,
    blocks: &[(BlockKey, BlockPlace)],
    rate: &SharedRate,
) -> bool {
    let (sender, receiver) = mpsc::channel(TILES_WAITING_MAX);
    let ctx = CallContext::new("repair");
    // Dropped with this future, it ends the call.
    let _ends_the_call = ctx.cancel.clone().drop_guard();
    let mut open: HashSet<BlockKey> = blocks.iter().map(|(key, _)| *key).collect();
    let feed = feed(store, identity, blocks, rate, sender);
    let answers = async {
        let mut acks = shard.put_blocks(&ctx, identity, store.wire_shape(), receiver).await?;
        while let Some(ack) = acks.next().await {
            let ack = ack?;
            if open.remove(&ack.key) {
                let taken = matches!(ack.outcome, PutOutcome::Stored | PutOutcome::Duplicate);
                store.repair.tried(taken.then(|| store.block_bytes()));
                if !taken {
                    tracing::debug!(block = %ack.key, outcome = ?ack.outcome, reason = %ack.message, "a copy was not taken");
                }
            }
        }
        Ok::<(), Error>(())
    };
    let ended = {
        tokio::pin!(answers);
        tokio::select! {
            ended = &mut answers => ended,
            stalled = feed => match stalled {
                true => Err(Error::new(Code::DeadlineExceeded, "took no tile for too long")),
                false => tokio::time::timeout(PATIENCE, answers).await.unwrap_or_else(|_| {
                    Err(Error::new(Code::DeadlineExceeded, "acknowledged nothing for too long"))
                }),
            },
        }
    };
    if let Err(error) = &ended {
        tracing::warn!(%error, blocks = open.len(), "copies were not sent");
    }
    let all = open.is_empty();
    open.iter().for_each(|_| store.repair.tried(None));
    all && ended.is_ok()
}

/// Sends tiles until all went out or the shard takes no more; true when it took none for too long. Blocks that are no longer
/// here, or no longer sound, are left out.
async fn feed(
    store: &Arc<Store>,
    identity: Identity,
    blocks: &[(BlockKey, BlockPlace)],
    rate: &SharedRate,
    sender: mpsc::Sender<TileMessage>,
) -> bool {
    let layers = store.identity().layers;
    for (key, place) in blocks {
        rate.wait(store.block_bytes(), store.elapsed_us()).await;
        let Some(block) = store.read_here(identity.namespace, *key).await else { continue };
        for layer in 0..layers {
            let tile = TileMessage { place: Some(*place), ..message(&block, layer) };
            match tokio::time::timeout(PATIENCE, sender.send(tile)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return false,
                Err(_) => return true,
            }
        }
    }
    false
}
