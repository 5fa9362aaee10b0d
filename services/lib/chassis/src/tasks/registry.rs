//! Names and abort handles of running tasks.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::task::AbortHandle;
use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};

/// The running tasks of one scope and of the scopes below it.
#[derive(Debug, Default)]
pub(super) struct Registry {
    pub(super) tracker: TaskTracker,
    running: Mutex<Running>,
}

#[derive(Debug, Default)]
struct Running {
    next: u64,
    tasks: BTreeMap<u64, (String, Option<AbortHandle>)>,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Running> {
        // Nothing panics while the lock is held, and a list of names has no invariant to break.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, name: &str) -> u64 {
        let mut running = self.lock();
        running.next += 1;
        let id = running.next;
        running.tasks.insert(id, (name.to_owned(), None));
        id
    }

    pub(super) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.lock().tasks.values().map(|(name, _)| name.clone()).collect();
        names.sort();
        names
    }

    /// Aborts everything that runs and names it. Blocking tasks go on.
    pub(super) fn abort(&self) -> Vec<String> {
        let handles: Vec<AbortHandle> =
            self.lock().tasks.values().filter_map(|(_, handle)| handle.clone()).collect();
        let names = self.names();
        handles.iter().for_each(AbortHandle::abort);
        names
    }
}

/// Where a task is entered.
#[derive(Debug, Clone)]
pub(super) struct Ids(Vec<(Arc<Registry>, u64)>);

impl Ids {
    /// Makes a task abortable; does nothing when it has already ended.
    pub(super) fn set_handle(&self, handle: &AbortHandle) {
        for (registry, id) in &self.0 {
            if let Some((_, slot)) = registry.lock().tasks.get_mut(id) {
                *slot = Some(handle.clone());
            }
        }
    }
}

/// A running task's presence in its scope and those above; dropping it, also by a panic or an abort, takes it out.
#[derive(Debug)]
pub(super) struct Entry {
    ids: Ids,
    _waited_for: Vec<TaskTrackerToken>,
}

impl Entry {
    pub(super) fn new(registries: &[Arc<Registry>], name: &str) -> Self {
        let ids = registries.iter().map(|registry| (registry.clone(), registry.add(name))).collect();
        let tokens = registries.iter().map(|registry| registry.tracker.token()).collect();
        Self { ids: Ids(ids), _waited_for: tokens }
    }

    pub(super) fn ids(&self) -> Ids {
        self.ids.clone()
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        for (registry, id) in &self.ids.0 {
            registry.lock().tasks.remove(id);
        }
    }
}
