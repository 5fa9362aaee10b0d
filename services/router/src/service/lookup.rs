//! Finds how much of a sequence the shards already hold.

use std::time::Duration;

use futures::future::join_all;
use longshore_blocks::ShardId;
use longshore_cluster::ClusterView;
use longshore_fabric::{CallContext, Connector, Error as CallError};
use longshore_proto::types::{Identity, Lookup};
use longshore_routing::{KEYS_MAX, PrefixPlan, ShardLookup};

use super::sequence::Sequence;
use crate::{Config, Error, metrics::RouterMetrics};

/// Asks every shard for its blocks of the sequence, all at once, and returns how many blocks from the beginning on are
/// held without a gap. A shard that fails, is slow or answers nonsense holds nothing: its blocks are computed again.
pub(crate) async fn cached_blocks(
    ctx: &CallContext,
    connector: &dyn Connector,
    view: &ClusterView,
    identity: Identity,
    sequence: &Sequence,
    (config, metrics): (&Config, &RouterMetrics),
) -> Result<u64, Error> {
    let plan = PrefixPlan::new(
        sequence.chain(),
        &view.shard_map(),
        sequence.stored_blocks(),
        KEYS_MAX,
        config.copies as usize,
    );
    let mut plan = plan.map_err(|error| match error {
        longshore_routing::Error::NoShards => Error::NoShards { retry_after: config.retry_after() },
        other => Error::Internal(other.to_string()),
    })?;
    let timeout = Duration::from_millis(config.lookup_timeout_ms);
    let calls = plan.lookups().iter().map(|part| ask(ctx, connector, view, identity, part, timeout));
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
    connector: &dyn Connector,
    view: &ClusterView,
    identity: Identity,
    (shard, blocks): &ShardLookup,
    timeout: Duration,
) -> Result<Vec<bool>, CallError> {
    let ShardId(id) = shard;
    let address = &view.member(id).expect("the shard map was made from this view").address;
    let keys = blocks.iter().map(|(_, key)| *key).collect();
    let client = connector.shard(address)?;
    client.lookup(&ctx.child().with_timeout(timeout), Lookup { identity, keys, peek: false }).await
}
