//! Shards that are asked to hand their blocks over.

use std::{collections::BTreeSet, sync::atomic::Ordering::SeqCst};

use futures::FutureExt as _;
use longshore_fabric::{CallContext, Shard as _};
use longshore_kvstore::KvStore;
use longshore_proto::types::{BlockEntry, ListBlocks};

use super::cluster::{Cluster, Labelled};

impl Cluster {
    /// Asks a shard, which must run, to hand its blocks over, or to stop doing so.
    pub(crate) fn drain(&mut self, node: usize, on: bool) {
        let Some(life) = self.network.life(node) else { return };
        if on {
            life.drained.store(true, SeqCst);
            self.draining.insert(node);
        } else {
            self.draining.remove(&node);
        }
        let asked = life.store.drain(&CallContext::new("drain"), !on).now_or_never();
        asked.expect("a shard answers it at once").expect("and does not refuse it");
    }

    /// Shards that run and are asked to hand their blocks over.
    pub(crate) fn draining(&self) -> &BTreeSet<usize> {
        &self.draining
    }

    /// Hosts of members other than `node`.
    pub(crate) fn hosts_without(&self, node: usize) -> usize {
        let host = |node: usize| if self.plan.labels == Labelled::Hosts { node / 2 } else { node };
        let others = self.members().iter().filter(|other| **other != node);
        others.map(|other| host(*other)).collect::<BTreeSet<_>>().len()
    }
}

/// Everything that a shard says it holds, page by page.
pub(super) async fn listed(store: &KvStore) -> Result<Vec<BlockEntry>, longshore_fabric::Error> {
    let (mut blocks, mut after) = (Vec::new(), None);
    loop {
        let list = ListBlocks { after, ..ListBlocks::default() };
        let page = store.list_blocks(&CallContext::new("check"), list).await?;
        blocks.extend(page.blocks);
        after = page.next;
        if after.is_none() {
            return Ok(blocks);
        }
    }
}
