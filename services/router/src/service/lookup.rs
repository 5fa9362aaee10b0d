//! Finds how much of a sequence the shards already hold.

use std::time::Duration;

use futures::future::join_all;
use longshore_blocks::ShardId;
use longshore_cluster::ClusterView;
use longshore_fabric::{CallContext, Error as CallError};
use longshore_proto::types::{Identity, Lookup};
use longshore_routing::{KEYS_MAX, PrefixPlan, ShardLookup};

use super::{Inner, sequence::Sequence};
use crate::Error;

/// Returns how many blocks of the sequence from the beginning on are held without a gap, as the shards confirm it. They are asked for
/// what the index says that they may hold and a little more; when all of that is there, for the rest too, so that an index that is behind
/// costs a round trip and never a block.
pub(crate) async fn cached_blocks(
    ctx: &CallContext,
    inner: &Inner,
    view: &ClusterView,
    identity: Identity,
    sequence: &Sequence,
) -> Result<u64, Error> {
    let (blocks, metrics) = (sequence.stored_blocks(), &inner.metrics.index);
    let (namespace, copies) = (identity.namespace, inner.config.copies as usize);
    let likely = inner.inventories.likely(namespace, sequence.chain(), &view.shard_map(), blocks, copies);
    inner.inventories.follow(namespace);
    let Some(likely) = likely else {
        return confirmed(ctx, inner, view, identity, sequence, blocks).await;
    };
    let found = confirmed(ctx, inner, view, identity, sequence, likely.ask).await?;
    if found < likely.blocks {
        metrics.ahead.inc();
    }
    if found > likely.blocks {
        metrics.behind.inc();
    }
    if found < likely.ask || likely.ask == blocks {
        metrics.spared_keys.inc_by(blocks - likely.ask);
        return Ok(found);
    }
    confirmed(ctx, inner, view, identity, sequence, blocks).await
}

/// Asks every shard for its blocks among the first `blocks`, all at once. A shard that fails, is slow or answers nonsense holds nothing:
/// its blocks are computed again.
async fn confirmed(
    ctx: &CallContext,
    inner: &Inner,
    view: &ClusterView,
    identity: Identity,
    sequence: &Sequence,
    blocks: u64,
) -> Result<u64, Error> {
    let (config, metrics) = (&inner.config, &inner.metrics);
    let (chain, map) = (sequence.chain(), view.shard_map());
    let plan = PrefixPlan::new(chain, &map, blocks, KEYS_MAX, config.copies as usize);
    let mut plan = plan.map_err(|error| match error {
        longshore_routing::Error::NoShards => Error::NoShards { retry_after: config.retry_after() },
        other => Error::Internal(other.to_string()),
    })?;
    let timeout = Duration::from_millis(config.lookup_timeout_ms);
    let calls = plan.lookups().iter().map(|part| ask(ctx, inner, view, identity, part, timeout));
    for (position, answer) in join_all(calls).await.into_iter().enumerate() {
        let shard = plan.lookups()[position].0.clone();
        let noted = answer.map_err(|error| error.to_string());
        let noted = noted.and_then(|held| plan.answer(position, &held).map_err(|error| error.to_string()));
        if let Err(error) = noted {
            metrics.lookup_failures.inc();
            tracing::warn!(request = %ctx.request_id, %shard, %error, "lookup failed, its blocks count as missing");
        }
    }
    Ok(plan.prefix_blocks())
}

async fn ask(
    ctx: &CallContext,
    inner: &Inner,
    view: &ClusterView,
    identity: Identity,
    (shard, blocks): &ShardLookup,
    timeout: Duration,
) -> Result<Vec<bool>, CallError> {
    let ShardId(id) = shard;
    let address = &view.member(id).expect("the shard map was made from this view").address;
    let keys = blocks.iter().map(|(_, key)| *key).collect();
    let client = inner.connector.shard(address)?;
    client.lookup(&ctx.child().with_timeout(timeout), Lookup { identity, keys, peek: false }).await
}
