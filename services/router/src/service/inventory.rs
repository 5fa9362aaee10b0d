//! Follows what shards tell of their blocks, for the namespaces of the requests that came lately. Streams are resumed after gaps, begun
//! anew where a shard says so or does not agree with what it told, and there is a bound for everything.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::StreamExt as _;
use longshore_blocks::{BlockKey, Deployment, KeyChain, Namespace, ShardId, ShardMap};
use longshore_chassis::Tasks;
use longshore_cluster::{ClusterView, Member, Role};
use longshore_fabric::{CallContext, Code, Connector, Error as CallError};
use longshore_proto::types::{Identity, InventoryChange, InventoryNews, WatchInventory};
use longshore_routing::{InventoryIndex, Likely, News, Untaken, likely_prefix};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::metrics::IndexMetrics;

/// Pause before a stream that ended is begun again.
const RETRY: Duration = Duration::from_secs(1);
/// Shards tell their digest every five seconds: one that is silent for so long is not listened to.
const SILENCE: Duration = Duration::from_secs(20);

/// The index, and the streams that fill it.
#[derive(Debug)]
pub(crate) struct Inventories {
    deployment: Deployment,
    cluster: watch::Receiver<Arc<ClusterView>>,
    connector: Arc<dyn Connector>,
    tasks: Tasks,
    metrics: IndexMetrics,
    namespaces_max: usize,
    index: Mutex<InventoryIndex>,
    followed: Mutex<Followed>,
}

/// Namespaces that are followed, and when they were used.
#[derive(Debug, Default)]
struct Followed {
    uses: u64,
    namespaces: HashMap<Namespace, (u64, CancellationToken)>,
    /// The last one that came while there was no room: it gets some when it comes again.
    waiting: Option<Namespace>,
}

/// How a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// It can be begun again.
    Broken,
    /// It never tells anything that can be kept.
    Useless,
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
            index: Mutex::new(index),
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
        let index = self.index();
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
                let stays = shards.get(id).is_some_and(|other| other.address == member.address);
                if !stays {
                    end.cancel();
                }
                stays
            });
            for (id, member) in shards {
                streams.entry(id.clone()).or_insert_with(|| {
                    let (own, end, address) = (Arc::clone(&self), stop.child_token(), member.address.clone());
                    let ended = end.clone();
                    self.tasks.spawn("inventory-stream", async move {
                        own.listen(namespace, &id, &address, &ended).await;
                    });
                    (member, end)
                });
            }
            tokio::select! {
                changed = views.changed() => if changed.is_err() { return },
                () = stop.cancelled() => return,
            }
        }
    }

    /// Listens to one shard until it is told to end, again and again.
    async fn listen(&self, namespace: Namespace, shard: &ShardId, address: &str, end: &CancellationToken) {
        loop {
            let ended = tokio::select! {
                ended = self.watch(namespace, shard, address) => ended,
                () = end.cancelled() => break,
            };
            self.change(|index| index.lost(namespace, shard));
            if ended == Ok(Ended::Useless) {
                break;
            }
            if let Err(error) = ended {
                tracing::debug!(%shard, %error, "a shard tells nothing of its blocks");
                if error.code == Code::Unimplemented {
                    break;
                }
            }
            tokio::select! {
                () = tokio::time::sleep(RETRY) => {}
                () = end.cancelled() => break,
            }
        }
        self.change(|index| index.forget(namespace, shard));
    }

    async fn watch(&self, namespace: Namespace, shard: &ShardId, address: &str) -> Result<Ended, CallError> {
        let after = self.index().position(namespace, shard);
        let shard_map_epoch = self.cluster.borrow().epoch();
        let identity = Identity { deployment: self.deployment, namespace, shard_map_epoch };
        let ctx = CallContext::new("inventory");
        let _ends_with_this = ctx.cancel.clone().drop_guard();
        let client = self.connector.shard(address)?;
        let begun = client.watch_inventory(&ctx, WatchInventory { identity, after });
        let Ok(begun) = tokio::time::timeout(SILENCE, begun).await else { return Ok(Ended::Broken) };
        let mut stream = begun?;
        while let Ok(Some(news)) = tokio::time::timeout(SILENCE, stream.next()).await {
            match self.take(namespace, shard, news?) {
                Ok(()) => {}
                Err(Untaken::OutOfStep) => return Ok(Ended::Broken),
                Err(Untaken::Full) => return Ok(Ended::Useless),
            }
        }
        Ok(Ended::Broken)
    }

    fn take(&self, namespace: Namespace, shard: &ShardId, news: InventoryNews) -> Result<(), Untaken> {
        let InventoryNews { incarnation, reset, events, told, blocks, digest } = news;
        let held = |change: InventoryChange| change == InventoryChange::Stored;
        let events: Vec<_> =
            events.into_iter().map(|(number, key, change)| (number, key, held(change))).collect();
        let stored = events.iter().filter(|(_, _, held)| *held).count() as u64;
        self.metrics.stored.inc_by(stored);
        self.metrics.gone.inc_by(events.len() as u64 - stored);
        self.metrics.resets.inc_by(u64::from(reset));
        let news = News { incarnation, reset, events, told, blocks, digest };
        let taken = self.change(|index| index.take(namespace, shard, &news));
        match taken {
            Ok(()) => {}
            Err(Untaken::OutOfStep) => _ = self.metrics.out_of_step.inc(),
            Err(Untaken::Full) => _ = self.metrics.full.inc(),
        }
        taken
    }

    fn change<T>(&self, change: impl FnOnce(&mut InventoryIndex) -> T) -> T {
        let mut index = self.index();
        let result = change(&mut index);
        self.metrics.blocks.set(index.blocks() as i64);
        self.metrics.current.set(index.current() as i64);
        result
    }

    fn index(&self) -> MutexGuard<'_, InventoryIndex> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn followed(&self) -> MutexGuard<'_, Followed> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
