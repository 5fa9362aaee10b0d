//! Owners of tasks. Nothing runs in the background without a name, a scope that can cancel it, and somebody who waits for it.

mod registry;
#[cfg(test)]
mod tests;

use std::{
    any::Any,
    borrow::Cow,
    fmt::Display,
    future::Future,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::FutureExt as _;
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::TaskTracker,
};
use tracing::Instrument as _;

use registry::{Entry, Registry};

/// Owner of named tasks. Clones are the same owner. Dropping it does nothing: cancel and [`Tasks::drain`].
#[derive(Debug, Clone)]
pub struct Tasks {
    scope: Arc<Scope>,
}

/// One owner and those above it.
#[derive(Debug)]
struct Scope {
    /// Root first, this scope last: draining any of them waits for the tasks of this one.
    registries: Vec<Arc<Registry>>,
    token: CancellationToken,
    root: Arc<Root>,
}

/// What all scopes of one root share.
#[derive(Debug)]
struct Root {
    token: CancellationToken,
    failure: Mutex<Option<String>>,
}

impl Default for Tasks {
    fn default() -> Self {
        Self::new()
    }
}

impl Tasks {
    /// A root owner.
    pub fn new() -> Self {
        let token = CancellationToken::new();
        let root = Root { token: token.clone(), failure: Mutex::new(None) };
        Self { scope: Arc::new(Scope { registries: vec![Arc::default()], token, root: Arc::new(root) }) }
    }

    /// An owner below this one: it is cancelled with this one or alone, and this one's drain waits for its tasks.
    pub fn child(&self) -> Self {
        let mut registries = self.scope.registries.clone();
        registries.push(Arc::default());
        let token = self.scope.token.child_token();
        Self { scope: Arc::new(Scope { registries, token, root: self.scope.root.clone() }) }
    }

    /// Runs a task. A panic is logged with the task's name and ends only this task.
    pub fn spawn<F>(&self, name: impl Into<Cow<'static, str>>, future: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let name = name.into();
        let label = name.clone();
        let guarded = async move {
            if let Err(panic) = AssertUnwindSafe(future).catch_unwind().await {
                tracing::error!(task = %label, panic = panic_text(panic.as_ref()), "task panicked");
            }
        };
        self.start(name, guarded);
    }

    /// Runs a task that the process cannot do without: its panic or error is logged, kept for [`Tasks::failure`], and cancels
    /// the root, which starts the drain.
    pub fn spawn_critical<F, E>(&self, name: impl Into<Cow<'static, str>>, future: F)
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Display + Send + 'static,
    {
        let name = name.into();
        let label = name.clone();
        let root = self.scope.root.clone();
        let guarded = async move {
            match AssertUnwindSafe(future).catch_unwind().await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => root.fail(format!("task `{label}` failed: {error}")),
                Err(panic) => root.fail(format!("task `{label}` panicked: {}", panic_text(panic.as_ref()))),
            }
        };
        self.start(name, guarded);
    }

    /// Runs blocking code on tokio's blocking threads. It cannot be aborted, so it has to watch [`Tasks::token`].
    pub fn spawn_blocking<F>(&self, name: impl Into<Cow<'static, str>>, work: F)
    where
        F: FnOnce() + Send + 'static,
    {
        let name = name.into();
        let entry = self.enter(&name);
        let span = tracing::info_span!("task", name = %name);
        self.tracker().spawn_blocking(move || {
            let _entry = entry;
            let _in_span = span.entered();
            if let Err(panic) = std::panic::catch_unwind(AssertUnwindSafe(work)) {
                tracing::error!(task = %name, panic = panic_text(panic.as_ref()), "task panicked");
            }
        });
    }

    /// Resolves when this owner, or one above it, is cancelled.
    pub fn cancelled(&self) -> WaitForCancellationFutureOwned {
        self.scope.token.clone().cancelled_owned()
    }

    /// Whether this owner is cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.scope.token.is_cancelled()
    }

    /// The token that [`Tasks::cancel`] fires.
    pub fn token(&self) -> CancellationToken {
        self.scope.token.clone()
    }

    /// Asks this owner's tasks, and those of its children, to end. Does not wait.
    pub fn cancel(&self) {
        self.scope.token.cancel();
    }

    /// The tracker of this owner, for libraries that spawn on one. Their tasks are waited for by this owner only, and have
    /// no names.
    pub fn tracker(&self) -> &TaskTracker {
        &self.registry().tracker
    }

    /// The first critical task that failed under this root, as "task `name` failed: why".
    pub fn failure(&self) -> Option<String> {
        self.scope.root.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Names of the tasks that run now under this owner and its children, sorted.
    pub fn running(&self) -> Vec<String> {
        self.registry().names()
    }

    /// Cancels, waits until every task ended or `deadline` passed, aborts the rest, and names those that did not end in time.
    pub async fn drain(&self, deadline: Duration) -> Vec<String> {
        self.cancel();
        self.registry().tracker.close();
        if tokio::time::timeout(deadline, self.registry().tracker.wait()).await.is_ok() {
            return Vec::new();
        }
        let late = self.registry().abort();
        if !late.is_empty() {
            tracing::warn!(tasks = ?late, deadline_ms = deadline.as_millis() as u64, "tasks did not end in time");
        }
        late
    }

    fn registry(&self) -> &Arc<Registry> {
        self.scope.registries.last().expect("a scope has its own registry")
    }

    fn enter(&self, name: &str) -> Entry {
        Entry::new(&self.scope.registries, name)
    }

    fn start<F>(&self, name: Cow<'static, str>, future: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let entry = self.enter(&name);
        let ids = entry.ids();
        let span = tracing::info_span!("task", name = %name);
        let handle = self.tracker().spawn(
            async move {
                let _entry = entry;
                future.await;
            }
            .instrument(span),
        );
        ids.set_handle(&handle.abort_handle());
    }
}

impl Root {
    fn fail(&self, failure: String) {
        tracing::error!("{failure}");
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failure);
        self.token.cancel();
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "a value that is no text",
    }
}
