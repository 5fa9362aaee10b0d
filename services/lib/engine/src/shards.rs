//! Links to the shards of the current shard map, made once per epoch and shared by all sequences of a process.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::future::BoxFuture;
use longshore_blocks::{
    ShardId, ShardMap,
    quorum::{Candidate, CopyRule, Tally},
};
use longshore_cluster::{ClusterView, Role};
use longshore_fabric::{AttendLink, CallContext, Connector, Shard};
use longshore_proto::types::OpenedView;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, watch},
    time::Instant,
};
use tokio_util::task::TaskTracker;

use crate::{
    Error,
    health::{Health, SecondAsks},
    readers::{Distance, Load, ReadCounts, Site},
};

/// How long closing a view may take before it is left to its lease.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Blocks that count as stored and whose further copies are still under way, per process.
const BACKGROUND_MAX: usize = 64;
/// Views that are being opened and that nobody wants any more, per process.
const LATE_OPENS_MAX: usize = 64;
/// How long they are waited for: longer than a connection without any answer lives.
const LATE_OPEN_TIMEOUT: Duration = Duration::from_secs(40);

/// One shard and the ways to reach it.
#[derive(Debug, Clone)]
pub struct ShardLink {
    /// Name.
    pub id: ShardId,
    /// Calls.
    pub shard: Arc<dyn Shard>,
    /// The attention stream of this process to it.
    pub attend: AttendLink,
    /// What calls told of it.
    pub(crate) health: Arc<Health>,
    /// What it is to send.
    pub(crate) load: Arc<Load>,
}

impl ShardLink {
    /// Takes note of how a call ended: a shard that seems to be away is asked last for a while.
    pub(crate) fn note<T>(&self, outcome: &Result<T, Error>) {
        match outcome {
            Ok(_) | Err(Error::Missing { .. }) => self.health.answered(),
            Err(Error::Shard { source, .. }) if means_away(source.code) => {
                self.health.failed(Instant::now());
            }
            Err(Error::Late { waited_ms, .. }) => {
                self.health.late(Instant::now(), Duration::from_millis(*waited_ms));
            }
            Err(_) => {}
        }
    }
}

/// Whether an error says that its shard is away or stuck.
pub(crate) fn means_away(code: longshore_fabric::Code) -> bool {
    use longshore_fabric::Code;
    matches!(code, Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Internal)
}

/// The shards of one epoch, in the order of their shard map.
#[derive(Debug)]
pub struct ShardLinks {
    map: ShardMap,
    rule: CopyRule,
    links: Vec<ShardLink>,
    /// Of shards in other processes.
    distances: Vec<Distance>,
    late_opens: Arc<Semaphore>,
    pub(crate) background: Arc<Semaphore>,
    pub(crate) second_asks: SecondAsks,
    /// Which copies were read.
    pub(crate) reads: ReadCounts,
    tasks: TaskTracker,
    runtime: Handle,
}

impl ShardLinks {
    /// Links for `map`; `shards` gives the client of each entry, in the map's order. Must be called on a runtime, whose
    /// `tasks` then own the attention streams and the closing of views.
    pub fn new(
        map: ShardMap,
        shards: impl IntoIterator<Item = Arc<dyn Shard>>,
        tasks: &TaskTracker,
        in_flight_max: usize,
    ) -> Result<Self, Error> {
        let links: Vec<ShardLink> = map
            .shards()
            .iter()
            .zip(shards)
            .map(|(entry, shard)| ShardLink {
                id: entry.id.clone(),
                attend: AttendLink::new(Arc::clone(&shard), tasks, in_flight_max),
                health: Arc::default(),
                load: Arc::default(),
                shard,
            })
            .collect();
        if links.len() != map.shards().len() {
            let problem = format!("has {} clients for {} shards", links.len(), map.shards().len());
            return Err(Error::Invalid { field: "shards", problem });
        }
        let (rule, background) = (CopyRule::default(), Arc::new(Semaphore::new(BACKGROUND_MAX)));
        let (tasks, runtime, second_asks) = (tasks.clone(), Handle::current(), SecondAsks::default());
        let (distances, late_opens) =
            (vec![Distance::Far; links.len()], Arc::new(Semaphore::new(LATE_OPENS_MAX)));
        let reads = ReadCounts::default();
        Ok(Self { map, rule, links, distances, late_opens, background, second_asks, reads, tasks, runtime })
    }

    /// The same with the counters of all epochs.
    fn with_reads(mut self, reads: ReadCounts) -> Self {
        self.reads = reads;
        self
    }

    /// The same with what is known of how far the shards are, in the map's order.
    pub(crate) fn with_distances(mut self, distances: Vec<Distance>) -> Self {
        debug_assert_eq!(distances.len(), self.links.len());
        self.distances = distances;
        self
    }

    /// How far a shard is.
    pub(crate) fn distance(&self, shard: usize) -> Distance {
        if self.links[shard].attend.is_here() { Distance::Here } else { self.distances[shard] }
    }

    /// The same with so many copies of each block.
    pub fn with_copies(mut self, rule: CopyRule) -> Self {
        self.rule = rule;
        self
    }

    /// Copies of each block.
    pub fn rule(&self) -> CopyRule {
        self.rule
    }

    /// The shard map that places blocks.
    pub fn map(&self) -> &ShardMap {
        &self.map
    }

    /// Links in the map's order.
    pub fn links(&self) -> &[ShardLink] {
        &self.links
    }

    /// Index of the shard that holds the stripe named by `seed`.
    pub fn owner(&self, seed: &[u8; 32]) -> Result<usize, Error> {
        let entry = self.map.owner(seed).ok_or(Error::NoShards)?;
        let found = self.map.shards().binary_search_by(|other| other.id.cmp(&entry.id));
        Ok(found.expect("an owner is one of the map's shards, which are sorted by id"))
    }

    /// Indices of the shards that a copy of the stripe named by `seed` may lie on: those that did not fail lately come first,
    /// equals by rank. The first `copies` are those that get one.
    pub fn candidates(&self, seed: &[u8; 32]) -> Result<Vec<usize>, Error> {
        if self.rule.copies() == 1 {
            return Ok(vec![self.owner(seed)?]);
        }
        let mut found = self.map.candidates(seed, self.rule.copies());
        if found.is_empty() {
            return Err(Error::NoShards);
        }
        let now = Instant::now();
        found.sort_by_cached_key(|&index| self.links[index].health.is_avoided(now));
        Ok(found)
    }

    /// A block under way to the first of `candidates`, no two of them on one host.
    pub(crate) fn tally(&self, candidates: &[usize]) -> Tally {
        let candidate = |&shard: &usize| Candidate { shard, host: self.map.host_of(shard) };
        Tally::new(self.rule, candidates.iter().map(candidate))
    }

    /// The runtime that the links live on, for threads outside of it.
    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// Owner of tasks that outlive a call.
    pub fn tasks(&self) -> &TaskTracker {
        &self.tasks
    }

    /// Closes a view in the background; a shard that does not answer reclaims it when its lease ends.
    pub(crate) fn close_later(&self, shard: usize, view_id: u64) {
        let link = self.links[shard].clone();
        self.tasks.spawn_on(async move { close(&link, view_id).await }, &self.runtime);
    }

    /// Waits in the background for a view that is being opened and that nobody wants any more, and closes it. Where too many are
    /// waited for, or for too long, it is left to its lease.
    pub(crate) fn close_when_opened(
        &self,
        shard: usize,
        opening: BoxFuture<'static, Result<OpenedView, longshore_fabric::Error>>,
    ) {
        let Ok(place) = Arc::clone(&self.late_opens).try_acquire_owned() else { return };
        let link = self.links[shard].clone();
        let closing = async move {
            let _place = place;
            let opened = tokio::time::timeout(LATE_OPEN_TIMEOUT, opening).await;
            if let Ok(Ok(OpenedView::Open { view_id })) = opened {
                close(&link, view_id).await;
            }
        };
        self.tasks.spawn_on(closing, &self.runtime);
    }
}

async fn close(link: &ShardLink, view_id: u64) {
    let ctx = CallContext::new("close-view").with_timeout(CLOSE_TIMEOUT);
    let call = tokio::time::timeout(CLOSE_TIMEOUT, link.shard.close_view(&ctx, view_id)).await;
    if let Ok(Err(error)) = call {
        tracing::debug!(shard = %link.id, view_id, %error, "left a view to its lease");
    }
}

/// Follows the membership and keeps the links of its newest epoch.
#[derive(Debug)]
pub struct ShardDirectory {
    views: watch::Receiver<Arc<ClusterView>>,
    connector: Arc<dyn Connector>,
    tasks: TaskTracker,
    in_flight_max: usize,
    rule: CopyRule,
    /// Id of the member that this process is.
    own: Option<String>,
    reads: ReadCounts,
    current: Mutex<Option<(Arc<ClusterView>, Arc<ShardLinks>)>>,
}

impl ShardDirectory {
    /// A directory of the members that `views` shows; `in_flight_max` bounds attention queries under way per shard.
    pub fn new(
        views: watch::Receiver<Arc<ClusterView>>,
        connector: Arc<dyn Connector>,
        tasks: TaskTracker,
        in_flight_max: usize,
    ) -> Self {
        let (rule, own, current) = (CopyRule::default(), None, Mutex::new(None));
        Self { views, connector, tasks, in_flight_max, rule, own, reads: ReadCounts::default(), current }
    }

    /// Which copies were read so far, and why.
    pub fn reads(&self) -> &ReadCounts {
        &self.reads
    }

    /// The same of the member `id`: of several copies those near it are read. Its labels and address are those of the membership.
    pub fn of_member(mut self, id: impl Into<String>) -> Self {
        self.own = Some(id.into());
        self
    }

    /// The same with so many copies of each block.
    pub fn with_copies(mut self, rule: CopyRule) -> Self {
        self.rule = rule;
        self
    }

    /// Epoch of the newest shard map.
    pub fn epoch(&self) -> u64 {
        self.views.borrow().epoch()
    }

    /// Links of the newest shard map. They are kept while neither the epoch nor an address or incarnation of a shard
    /// changes, so that a restarted shard gets a new stream. Must be called on a runtime.
    pub fn current(&self) -> Result<Arc<ShardLinks>, Error> {
        let view = Arc::clone(&self.views.borrow());
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((seen, links)) = current.as_ref()
            && (Arc::ptr_eq(seen, &view) || (same_shards(seen, &view) && self.is_where_it_was(seen, &view)))
        {
            return Ok(Arc::clone(links));
        }
        let links = Arc::new(self.connect(&view)?);
        *current = Some((view, Arc::clone(&links)));
        Ok(links)
    }

    fn is_where_it_was(&self, a: &ClusterView, b: &ClusterView) -> bool {
        let site = |view: &ClusterView| self.own.as_ref().and_then(|id| view.member(id)).map(Site::of);
        site(a) == site(b)
    }

    fn connect(&self, view: &ClusterView) -> Result<ShardLinks, Error> {
        let map = view.shard_map();
        let own = self.own.as_ref().and_then(|id| view.member(id)).map(Site::of).unwrap_or_default();
        let (mut shards, mut distances) = (Vec::with_capacity(map.shards().len()), Vec::new());
        for entry in map.shards() {
            let member = view.with_role(Role::KvStore).find(|member| member.id == entry.id.0);
            let member = member.expect("every shard of a map is a member of its view");
            let client = self.connector.shard(&member.address);
            shards.push(client.map_err(|source| Error::Shard { shard: entry.id.clone(), source })?);
            distances.push(own.distance(&Site::of(member)));
        }
        let links = ShardLinks::new(map, shards, &self.tasks, self.in_flight_max)?;
        Ok(links.with_copies(self.rule).with_distances(distances).with_reads(self.reads.clone()))
    }
}

fn same_shards(a: &ClusterView, b: &ClusterView) -> bool {
    a.epoch() == b.epoch() && a.with_role(Role::KvStore).eq(b.with_role(Role::KvStore))
}
