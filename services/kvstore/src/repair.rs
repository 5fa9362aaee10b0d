//! Keeping up the copies of the blocks that this shard holds. Every holder looks by itself where the copies of its blocks belong
//! among the shards that live, asks whether they are there, sends those that are missing, and drops its own when it is one too
//! many ([`longshore_blocks::repair`] decides). Nobody coordinates, and nothing is remembered: a search can begin anew at any time.

mod counters;
mod peers;
mod scan;
mod send;

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use longshore_blocks::quorum::CopyRule;
use longshore_chassis::Tasks;
use longshore_cluster::ClusterView;
use longshore_fabric::Connector;
use tokio::sync::watch;

use crate::{Error, store::Store};

pub(crate) use counters::RepairCounters;
use peers::Peers;
use scan::Outcome;

/// The other shards, and how many copies there should be.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// Members, as they come and go.
    pub views: watch::Receiver<Arc<ClusterView>>,
    /// Clients of the other shards.
    pub connector: Arc<dyn Connector>,
    /// Copies of each block.
    pub rule: CopyRule,
}

/// Starts watching the other shards and searching for missing copies.
pub(crate) fn start(store: &Arc<Store>, tasks: &Tasks, cluster: Cluster) {
    let own = store.identity().shard_id.clone();
    let peers = Arc::new(Peers::new(own, cluster.views, cluster.connector));
    let (weak, scope, pinged) = (Arc::downgrade(store), tasks.clone(), Arc::clone(&peers));
    tasks.spawn_critical("kvstore-peers", async move {
        tokio::select! {
            () = peers::watch(&weak, &pinged) => {}
            () = scope.cancelled() => {}
        }
        Ok::<(), Error>(())
    });
    let (weak, scope, rule) = (Arc::downgrade(store), tasks.clone(), cluster.rule);
    store.repair.rule(rule);
    tasks.spawn_critical("kvstore-repair", async move {
        tokio::select! {
            () = search(&weak, &peers, rule) => {}
            () = scope.cancelled() => {}
        }
        Ok::<(), Error>(())
    });
}

/// Searches again and again: at once when something happened to a shard, soon when something was left undone, else at leisure.
async fn search(store: &Weak<Store>, peers: &Peers, rule: CopyRule) {
    let mut changes = peers.changes();
    let mut rate = None;
    // Searches in a row that left something undone; each waits twice as long as the one before.
    let mut undone = 0u32;
    loop {
        changes.mark_unchanged();
        let pause = {
            let Some(store) = store.upgrade() else { return };
            let config = store.config().repair.clone();
            let rate = rate.get_or_insert_with(|| send::SharedRate::new(config.bytes_per_second));
            match scan::run(&store, peers, rule, rate, &changes).await {
                Outcome::Done => {
                    store.repair.passed();
                    undone = 0;
                    // Somebody waits for the end of a drain.
                    let is_on = store.drain.is_on();
                    Duration::from_millis(if is_on { config.retry_ms } else { config.scan_interval_ms })
                }
                Outcome::Undone if store.drain.is_on() => Duration::from_millis(config.retry_ms),
                Outcome::Undone => {
                    let pause_ms = config.retry_ms.saturating_mul(1 << undone.min(16));
                    undone += 1;
                    Duration::from_millis(pause_ms.min(config.scan_interval_ms))
                }
                Outcome::Outdated => {
                    undone = 0;
                    Duration::ZERO
                }
            }
        };
        // Ends early when something happens to a shard; the peers live as long as this task.
        if tokio::time::timeout(pause, changes.changed()).await.is_ok()
            && let Some(store) = store.upgrade()
        {
            store.repair.outdated();
        }
    }
}
