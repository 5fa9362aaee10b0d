//! Turns at what takes threads, computing above all: so many at a time, tenants one after the other, and each tenant's in the order in which they were asked for.
//! Whoever asks for very many delays itself and hardly anybody else.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use longshore_blocks::Namespace;
use tokio::sync::oneshot;

/// Turns of one shard.
#[derive(Debug, Clone)]
pub(crate) struct Turns(Arc<Mutex<Waiting>>);

/// A place in the queue, given up when it is dropped before its turn came.
struct Place<'a> {
    turns: &'a Turns,
    tenant: Namespace,
    receiver: Option<oneshot::Receiver<Turn>>,
}

#[derive(Debug)]
struct Waiting {
    free: usize,
    /// Tenants that wait, the next one first.
    order: VecDeque<Namespace>,
    /// What they wait for; none of the queues is empty.
    queues: HashMap<Namespace, VecDeque<oneshot::Sender<Turn>>>,
}

/// A turn, until it is dropped.
#[derive(Debug)]
#[must_use = "the turn is over when it is dropped"]
pub(crate) struct Turn(Option<Turns>);

impl Turns {
    /// `count` at a time.
    pub(crate) fn new(count: usize) -> Self {
        Self(Arc::new(Mutex::new(Waiting { free: count, order: VecDeque::new(), queues: HashMap::new() })))
    }

    /// Waits for a turn of `tenant`. Dropping the future gives up the place in the queue.
    pub(crate) async fn turn(&self, tenant: Namespace) -> Turn {
        let place = {
            let mut waiting = self.lock();
            if waiting.free > 0 {
                waiting.free -= 1;
                return Turn(Some(self.clone()));
            }
            waiting.enter(tenant)
        };
        let mut place = Place { turns: self, tenant, receiver: Some(place) };
        let receiver = place.receiver.as_mut().expect("it was made with one");
        let turn = receiver.await.expect("whoever waits is given a turn as long as there are any");
        place.receiver = None;
        turn
    }

    /// How many wait.
    pub(crate) fn waiting(&self) -> usize {
        self.lock().queues.values().map(VecDeque::len).sum()
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a turn that ended to the next one that waits.
    fn pass_on(self) {
        let mut turn = Turn(Some(self.clone()));
        let mut waiting = self.lock();
        while let Some(next) = waiting.next() {
            match next.send(turn) {
                Ok(()) => return,
                // It left meanwhile.
                Err(back) => turn = back,
            }
        }
        waiting.free += 1;
        // It is counted as free: not to be passed on once more, least of all under the lock.
        turn.0 = None;
    }
}

impl Waiting {
    fn enter(&mut self, tenant: Namespace) -> oneshot::Receiver<Turn> {
        let (sender, place) = oneshot::channel();
        let queue = self.queues.entry(tenant).or_default();
        if queue.is_empty() {
            self.order.push_back(tenant);
        }
        queue.push_back(sender);
        place
    }

    /// Some of a tenant's do not wait any more.
    fn leave(&mut self, tenant: Namespace) {
        let Some(queue) = self.queues.get_mut(&tenant) else { return };
        queue.retain(|waiting| !waiting.is_closed());
        if queue.is_empty() {
            self.queues.remove(&tenant);
            self.order.retain(|other| *other != tenant);
        }
    }

    /// Whoever has waited longest of the tenant whose turn it is.
    fn next(&mut self) -> Option<oneshot::Sender<Turn>> {
        let tenant = self.order.pop_front()?;
        let queue = self.queues.get_mut(&tenant).expect("tenants in the order wait");
        let next = queue.pop_front();
        if queue.is_empty() {
            self.queues.remove(&tenant);
        } else {
            self.order.push_back(tenant);
        }
        next
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Some(receiver) = self.receiver.take() {
            // A turn that came and was not looked at is passed on by this, so it is not done under the lock.
            drop(receiver);
            self.turns.lock().leave(self.tenant);
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(turns) = self.0.take() {
            turns.pass_on();
        }
    }
}

#[cfg(test)]
mod tests;
