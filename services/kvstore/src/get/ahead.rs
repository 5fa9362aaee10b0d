//! Reading ahead: what a stream reads while earlier blocks go out, and how many streams may.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures::{StreamExt as _, stream::FuturesOrdered};
use longshore_blocks::Namespace;

/// Streams that read ahead at a time: what they read lies in memory until somebody takes it.
const STREAMS_MAX: usize = 24;
/// Of one tenant.
const TENANT_MAX: usize = STREAMS_MAX / 2;

/// Who reads ahead; clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Places(Arc<Mutex<HashMap<Namespace, usize>>>);

/// One of the streams that may, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    places: Places,
    tenant: Namespace,
}

impl Places {
    /// A place for a stream of `tenant`; none where too many have one.
    pub(crate) fn take(&self, tenant: Namespace) -> Option<Place> {
        let mut taken = self.lock();
        let (all, own) = (taken.values().sum::<usize>(), taken.get(&tenant).copied().unwrap_or(0));
        if all >= STREAMS_MAX || own >= TENANT_MAX {
            return None;
        }
        taken.insert(tenant, own + 1);
        Some(Place { places: self.clone(), tenant })
    }

    /// Streams that have one.
    #[cfg(test)]
    pub(crate) fn taken(&self) -> usize {
        self.lock().values().sum()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Namespace, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        let left = taken.remove(&self.tenant).map_or(0, |own| own - 1);
        if left > 0 {
            taken.insert(self.tenant, left);
        }
    }
}

/// Reads in order, of which up to `ahead` are under way or wait to be taken beside the one that goes out; with 0 the next begins when
/// it is asked for.
pub(super) struct Reads<I, R: Future> {
    left: I,
    ahead: usize,
    under_way: FuturesOrdered<R>,
    ready: VecDeque<R::Output>,
}

impl<I: Iterator<Item = R>, R: Future> Reads<I, R> {
    pub(super) fn new(left: I, ahead: usize) -> Self {
        Self { left, ahead, under_way: FuturesOrdered::new(), ready: VecDeque::new() }
    }

    fn begin(&mut self, up_to: usize) {
        let room = up_to.saturating_sub(self.under_way.len() + self.ready.len());
        self.under_way.extend(self.left.by_ref().take(room));
    }

    /// The next one, when it is done.
    pub(super) async fn next(&mut self) -> Option<R::Output> {
        self.begin(self.ahead.max(1));
        match self.ready.pop_front() {
            Some(read) => Some(read),
            None => self.under_way.next().await,
        }
    }

    /// Goes on with them while `waiting` is waited for: a read that was given its turn and stood still would keep the turn from others.
    pub(super) async fn beside<T>(&mut self, waiting: impl Future<Output = T>) -> T {
        self.begin(self.ahead);
        tokio::pin!(waiting);
        loop {
            tokio::select! {
                biased;
                done = &mut waiting => return done,
                Some(read) = self.under_way.next(), if !self.under_way.is_empty() => self.ready.push_back(read),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_tenant_has_half_of_the_places_at_most_and_all_come_back() {
        let (places, tenant) = (Places::default(), |byte| Namespace::from_bytes([byte; 32]));
        let of = |byte| -> Vec<_> { (0..100).map_while(|_| places.take(tenant(byte))).collect() };
        let all = [of(1), of(2), of(3)];
        assert_eq!(all.each_ref().map(Vec::len), [TENANT_MAX, STREAMS_MAX - TENANT_MAX, 0]);
        let [first, second, third] = all;
        drop(first);
        assert_eq!((places.taken(), of(3).len()), (TENANT_MAX, TENANT_MAX));
        drop((second, third));
        assert!(places.lock().is_empty());
    }

    #[tokio::test]
    async fn only_so_many_reads_begin_before_they_are_asked_for() {
        for (ahead, begun_beside) in [(0, 1), (1, 2), (3, 4), (100, 5)] {
            let begun = Cell::new(0);
            let reads = (0..5).map(|number| {
                begun.set(begun.get() + 1);
                async move {
                    tokio::task::yield_now().await;
                    number
                }
            });
            let mut reads = Reads::new(reads, ahead);
            assert_eq!(reads.next().await, Some(0));
            assert!(begun.get() <= ahead.max(1), "{ahead}");
            reads
                .beside(async {
                    for _ in 0..20 {
                        tokio::task::yield_now().await
                    }
                })
                .await;
            assert_eq!(begun.get(), begun_beside, "{ahead}");
            for number in 1..5 {
                assert_eq!(reads.next().await, Some(number), "{ahead}");
            }
            assert_eq!(reads.next().await, None);
        }
    }

    #[tokio::test]
    async fn a_read_goes_on_while_something_else_is_waited_for() {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let mut sender = Some(sender);
        let reads = (0..2).map(|number| {
            let told = (number == 1).then(|| sender.take()).flatten();
            async move {
                tokio::task::yield_now().await;
                told.map(|told: tokio::sync::oneshot::Sender<()>| told.send(()));
                number
            }
        });
        let mut reads = Reads::new(reads, 1);
        assert_eq!(reads.next().await, Some(0));
        // Stands still for ever if the read does.
        reads.beside(receiver).await.unwrap();
        assert_eq!(reads.next().await, Some(1));
    }
}
