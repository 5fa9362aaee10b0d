//! Members of one process.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::watch;

use super::{Membership, Registration};
use crate::{ClusterView, Error, Member};

/// Members of one process. Clones are the same membership.
#[derive(Debug, Clone)]
pub struct MemoryMembership {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Held while a view is derived from the last one, so that no change is lost.
    change: Mutex<()>,
    view: watch::Sender<Arc<ClusterView>>,
}

impl Default for MemoryMembership {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryMembership {
    /// A cluster of nobody.
    pub fn new() -> Self {
        let nobody = ClusterView::new(Vec::new()).expect("no member is at fault where there is none");
        let (view, _) = watch::channel(Arc::new(nobody));
        Self { inner: Arc::new(Inner { change: Mutex::new(()), view }) }
    }

    /// The current view.
    pub fn view(&self) -> Arc<ClusterView> {
        self.inner.view.borrow().clone()
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, ()> {
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(&self, member: &Member) -> Result<(), Error> {
        let _changing = self.lock();
        let mut members = self.view.borrow().members().to_vec();
        members.push(member.clone());
        self.view.send_replace(Arc::new(ClusterView::new(members)?));
        Ok(())
    }

    fn leave(&self, id: &str) {
        let _changing = self.lock();
        let mut members = self.view.borrow().members().to_vec();
        members.retain(|member| member.id != id);
        let view = ClusterView::new(members).expect("a view stays valid when a member leaves");
        self.view.send_replace(Arc::new(view));
    }
}

#[async_trait]
impl Membership for MemoryMembership {
    async fn register(&self, member: Member) -> Result<Registration, Error> {
        self.inner.join(&member)?;
        tracing::info!(member = %member, incarnation = member.incarnation, "member joined");
        let inner = self.inner.clone();
        let id = member.id.clone();
        Ok(Registration::new(member, None, move || {
            inner.leave(&id);
            tracing::info!(%id, "member left");
        }))
    }

    fn watch(&self) -> watch::Receiver<Arc<ClusterView>> {
        self.inner.view.subscribe()
    }
}
