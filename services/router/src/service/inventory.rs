//! Follows what shards tell of their blocks, for the namespaces of the requests that came lately. Streams are resumed after gaps, begun
//! anew where a shard says so or does not agree with what it told, and there is a bound for everything.

mod listener;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use longshore_blocks::{BlockKey, Deployment, KeyChain, Namespace, ShardId, ShardMap};
use longshore_chassis::Tasks;
use longshore_cluster::{ClusterView, Member, Role};
use longshore_fabric::Connector;
use longshore_routing::{InventoryIndex, Likely, likely_prefix};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::metrics::IndexMetrics;
use listener::Listener;

/// The index, and the streams that fill it.
#[derive(Debug)]
pub(crate) struct Inventories {
    deployment: Deployment,
    cluster: watch::Receiver<Arc<ClusterView>>,
    connector: Arc<dyn Connector>,
    tasks: Tasks,
    metrics: IndexMetrics,
    namespaces_max: usize,
    book: Mutex<Book>,
    followed: Mutex<Followed>,
}

/// The index, and who writes to it: of the listeners to one shard the one that began last, whichever of them ends last.
#[derive(Debug)]
struct Book {
    index: InventoryIndex,
    writers: HashMap<(Namespace, ShardId), u64>,
    last_writer: u64,
}

/// Namespaces that are followed, and when they were used.
#[derive(Debug, Default)]
struct Followed {
    uses: u64,
    namespaces: HashMap<Namespace, (u64, CancellationToken)>,
    /// The last one that came while there was no room: it gets some when it comes again.
    waiting: Option<Namespace>,
}

impl Inventories {
    pub(crate) fn new(
        deployment: Deployment,
        cluster: watch::Receiver<Arc<ClusterView>>,
        connector: Arc<dyn Connector>,
        tasks: Tasks,
        metrics: IndexMetrics,
        (namespaces_max, blocks_max): (u32, u64),
    ) -> Arc<Self> {
        let index = InventoryIndex::new(usize::try_from(blocks_max).unwrap_or(usize::MAX));
        Arc::new(Self {
            deployment,
            cluster,
            connector,
            tasks,
            metrics,
            namespaces_max: namespaces_max as usize,
            book: Mutex::new(Book { index, writers: HashMap::new(), last_writer: 0 }),
            followed: Mutex::default(),
        })
    }

    /// How much of a sequence may be held; `None` when nothing is known of its namespace.
    pub(crate) fn likely(
        &self,
        namespace: Namespace,
        chain: &KeyChain,
        map: &ShardMap,
        blocks: u64,
        copies: usize,
    ) -> Option<Likely> {
        let index = &self.book().index;
        let may_hold = |shard: &ShardId, key: &BlockKey| index.may_hold(namespace, shard, key);
        index.knows(namespace).then(|| likely_prefix(chain, map, blocks, copies, may_hold))
    }

    /// Takes note that a namespace is used, and follows it from now on where there is room. When there is none, one that comes twice takes
    /// the place of the one that was used least lately: many that come once drive nobody out.
    pub(crate) fn follow(self: &Arc<Self>, namespace: Namespace) {
        if self.namespaces_max == 0 || self.tasks.is_cancelled() {
            return;
        }
        let mut followed = self.followed();
        followed.uses += 1;
        let now = followed.uses;
        if let Some((used, _)) = followed.namespaces.get_mut(&namespace) {
            *used = now;
            return;
        }
        if followed.namespaces.len() >= self.namespaces_max {
            if followed.waiting.replace(namespace) != Some(namespace) {
                return;
            }
            let oldest = followed.namespaces.iter().min_by_key(|(_, (used, _))| *used).map(|(old, _)| *old);
            let gone = oldest.and_then(|old| followed.namespaces.remove(&old));
            if let Some((_, stop)) = gone {
                stop.cancel();
            }
        }
        let stop = self.tasks.token().child_token();
        followed.namespaces.insert(namespace, (now, stop.clone()));
        self.metrics.namespaces.set(followed.namespaces.len() as i64);
        let own = Arc::clone(self);
        self.tasks.spawn("inventory", async move { own.keep(namespace, stop).await });
    }

    /// Keeps a stream to every shard, as shards come and go.
    async fn keep(self: Arc<Self>, namespace: Namespace, stop: CancellationToken) {
        let mut views = self.cluster.clone();
        let mut streams: HashMap<ShardId, (Member, CancellationToken)> = HashMap::new();
        loop {
            let view = Arc::clone(&views.borrow_and_update());
            let shards: HashMap<ShardId, Member> = view
                .with_role(Role::KvStore)
                .map(|member| (ShardId(member.id.clone()), member.clone()))
                .collect();
            streams.retain(|id, (member, end)| {
                // Another start of a shard may tell what the one before refused to.
                let is_same = |other: &Member| {
                    (&other.address, other.incarnation) == (&member.address, member.incarnation)
                };
                let stays = shards.get(id).is_some_and(is_same);
                if !stays {
                    end.cancel();
                }
                stays
            });
            for (id, member) in shards {
                if streams.contains_key(&id) {
                    continue;
                }
                let listener = Listener::new(Arc::clone(&self), namespace, &id, &member.address, &stop);
                let Some(listener) = listener else { return };
                let end = stop.child_token();
                streams.insert(id, (member, end.clone()));
                self.tasks.spawn("inventory-stream", async move { listener.run(&end).await });
            }
            tokio::select! {
                changed = views.changed() => if changed.is_err() { return },
                () = stop.cancelled() => return,
            }
        }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn followed(&self) -> MutexGuard<'_, Followed> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
