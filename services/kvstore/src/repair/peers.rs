//! Which other shards live: each is asked for its state again and again. One that does not answer for a while is down; one that
//! answers with another incarnation has lost what it held in memory.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use futures::future::join_all;
use longshore_blocks::{ShardId, ShardMap};
use longshore_cluster::{ClusterView, Role};
use longshore_fabric::{CallContext, Connector, Shard};
use tokio::{
    sync::watch as changes,
    time::{Instant, MissedTickBehavior},
};

use crate::store::Store;

/// Longest time for one answer.
const PING_TIMEOUT: Duration = Duration::from_secs(1);

/// The other shards.
#[derive(Debug)]
pub(super) struct Peers {
    own: ShardId,
    views: changes::Receiver<Arc<ClusterView>>,
    connector: Arc<dyn Connector>,
    state: Mutex<HashMap<String, Peer>>,
    /// Counts what happened to the other shards and to the shard map.
    changed: changes::Sender<u64>,
}

#[derive(Debug)]
struct Peer {
    address: String,
    shard: Arc<dyn Shard>,
    /// Unknown until it answers for the first time.
    incarnation: Option<u64>,
    last_answer: Instant,
    down: bool,
    /// Bytes that it could take without losing a block, on any tier, at its last answer.
    room_bytes: u64,
    /// It hands its blocks to others and is to leave.
    draining: bool,
}

/// What a shard said.
#[derive(Debug, Clone, Copy)]
struct Answer {
    incarnation: u64,
    room_bytes: u64,
    draining: bool,
}

/// The shards as one search sees them.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) map: ShardMap,
    /// Position of this shard in the map; `None` when it is no member any more.
    pub(super) me: Option<usize>,
    /// Clients of the others, by position; `None` for this shard and for those that are down.
    pub(super) alive: Vec<Option<Arc<dyn Shard>>>,
    /// Bytes that each could take without losing a block, by position.
    pub(super) room_bytes: Vec<u64>,
    /// Shards other than this one that are drained, by position: they own nothing.
    pub(super) draining: Vec<bool>,
}

impl Peers {
    pub(super) fn new(
        own: ShardId,
        views: changes::Receiver<Arc<ClusterView>>,
        connector: Arc<dyn Connector>,
    ) -> Self {
        let (changed, _) = changes::channel(0);
        Self { own, views, connector, state: Mutex::default(), changed }
    }

    /// Changes whenever something happens to another shard or the map.
    pub(super) fn changes(&self) -> changes::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The shards as they are now. Those that were never heard of count as alive, so that nothing is copied before they could
    /// answer.
    pub(super) fn site(&self) -> Site {
        let view = Arc::clone(&self.views.borrow());
        self.follow(&view, Instant::now());
        let (map, state) = (view.shard_map(), self.lock());
        let me = map.shards().iter().position(|shard| shard.id == self.own);
        let client =
            |id: &ShardId| state.get(&id.0).filter(|peer| !peer.down).map(|peer| Arc::clone(&peer.shard));
        let alive = map.shards().iter().map(|shard| client(&shard.id)).collect();
        let room = |id: &ShardId| state.get(&id.0).map_or(0, |peer| peer.room_bytes);
        let room_bytes = map.shards().iter().map(|shard| room(&shard.id)).collect();
        let draining = map
            .shards()
            .iter()
            .map(|shard| state.get(&shard.id.0).is_some_and(|peer| peer.draining))
            .collect();
        Site { map, me, alive, room_bytes, draining }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Peer>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn happened(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// Brings the table up to date with the membership.
    fn follow(&self, view: &ClusterView, now: Instant) {
        let mut state = self.lock();
        let others: Vec<_> = view.with_role(Role::KvStore).filter(|member| member.id != self.own.0).collect();
        state.retain(|id, peer| others.iter().any(|other| other.id == *id && other.address == peer.address));
        for member in others {
            if state.contains_key(&member.id) {
                continue;
            }
            let Ok(shard) = self.connector.shard(&member.address) else { continue };
            let address = member.address.clone();
            let peer = Peer {
                address,
                shard,
                incarnation: None,
                last_answer: now,
                down: false,
                room_bytes: 0,
                draining: false,
            };
            state.insert(member.id.clone(), peer);
        }
    }

    /// Asks every other shard once.
    async fn ping(&self, down_after: Duration) -> usize {
        let shards: Vec<(String, Arc<dyn Shard>)> =
            self.lock().iter().map(|(id, peer)| (id.clone(), Arc::clone(&peer.shard))).collect();
        let asked = shards.into_iter().map(|(id, shard)| async move {
            let ctx = CallContext::new("peers").with_timeout(PING_TIMEOUT);
            let answer = tokio::time::timeout(PING_TIMEOUT, shard.stats(&ctx)).await;
            let answer = answer.ok().and_then(Result::ok).map(|stats| Answer {
                incarnation: stats.incarnation,
                room_bytes: stats.room_bytes,
                draining: stats.drain.draining,
            });
            (id, answer)
        });
        let answers = join_all(asked).await;
        let (mut state, mut happened, now) = (self.lock(), false, Instant::now());
        for (id, answer) in answers {
            let Some(peer) = state.get_mut(&id) else { continue };
            happened |= peer.heard(&id, answer, now, down_after);
        }
        let down = state.values().filter(|peer| peer.down).count();
        drop(state);
        if happened {
            self.happened();
        }
        down
    }
}

impl Peer {
    /// Takes note of an answer or of none; true when that changes what copies are where.
    fn heard(&mut self, id: &str, answer: Option<Answer>, now: Instant, down_after: Duration) -> bool {
        let Some(Answer { incarnation, room_bytes, draining }) = answer else {
            let late = !self.down && now - self.last_answer >= down_after;
            if late {
                tracing::warn!(peer = %id, "another shard does not answer: its copies are made anew");
                self.down = true;
            }
            return late;
        };
        (self.last_answer, self.room_bytes) = (now, room_bytes);
        let turned = std::mem::replace(&mut self.draining, draining) != draining;
        let back = std::mem::take(&mut self.down);
        let before = self.incarnation.replace(incarnation);
        if back || before.is_some_and(|before| before != incarnation) {
            tracing::info!(peer = %id, incarnation, "another shard is back");
        }
        back || turned || before != Some(incarnation)
    }
}

/// Follows the membership and the other shards until the shard is gone.
pub(super) async fn watch(store: &Weak<Store>, peers: &Peers) {
    let mut views = peers.views.clone();
    let mut epoch = None;
    let Some((config, mut drain)) =
        store.upgrade().map(|store| (store.config().repair.clone(), store.drain.changes()))
    else {
        return;
    };
    let mut ticks = tokio::time::interval(Duration::from_millis(config.ping_interval_ms));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            // One look is enough when both are due.
            biased;
            _ = ticks.tick() => {}
            changed = views.changed() => if changed.is_err() { return },
            changed = drain.changed() => match changed {
                Ok(()) => peers.happened(),
                Err(_) => return,
            },
        }
        let view = Arc::clone(&views.borrow_and_update());
        peers.follow(&view, Instant::now());
        if epoch.replace(view.epoch()) != Some(view.epoch()) {
            peers.happened();
        }
        let down = peers.ping(Duration::from_millis(config.down_after_ms)).await;
        let Some(store) = store.upgrade() else { return };
        store.repair.peers_down(down);
    }
}
