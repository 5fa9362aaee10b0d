//! Whether a process wants requests, and why not.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio_util::sync::CancellationToken;

/// Reasons why a process is not ready; ready when there are none. Clones share them.
#[derive(Debug, Clone)]
pub struct Readiness {
    waiting: Arc<Mutex<BTreeMap<String, String>>>,
    draining: CancellationToken,
}

impl Readiness {
    /// Ready until somebody says otherwise, or `draining` fires: then for good not ready.
    pub fn new(draining: CancellationToken) -> Self {
        Self { waiting: Arc::default(), draining }
    }

    /// `part` is not ready, for example ("model", "loads"). Replaces its last reason.
    pub fn wait_for(&self, part: impl Into<String>, reason: impl Into<String>) {
        self.lock().insert(part.into(), reason.into());
    }

    /// `part` is ready.
    pub fn ready(&self, part: &str) {
        self.lock().remove(part);
    }

    /// Whether requests are welcome.
    pub fn is_ready(&self) -> bool {
        self.reasons().is_empty()
    }

    /// Parts that are not ready, with their reasons, sorted by part.
    pub fn reasons(&self) -> Vec<(Cow<'static, str>, String)> {
        let drain =
            self.draining.is_cancelled().then(|| (Cow::Borrowed("drain"), "the process ends".to_owned()));
        let waiting = self.lock();
        let parts = waiting.iter().map(|(part, reason)| (Cow::Owned(part.clone()), reason.clone()));
        drain.into_iter().chain(parts).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
