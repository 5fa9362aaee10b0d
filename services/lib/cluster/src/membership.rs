//! Membership providers.

mod fixed;
mod memory;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::{ClusterView, Error, Member};

pub use fixed::StaticMembership;
pub use memory::MemoryMembership;

/// A place where processes register and watch each other. Ready for leases, watches and epochs of a real coordinator.
#[async_trait]
pub trait Membership: Send + Sync + std::fmt::Debug {
    /// Announces `member` until the registration is dropped or its lease is lost. Refuses an id that is taken.
    async fn register(&self, member: Member) -> Result<Registration, Error>;
    /// The current view and every later one.
    fn watch(&self) -> watch::Receiver<Arc<ClusterView>>;
}

/// A member's announcement; dropping it withdraws the member.
pub struct Registration {
    member: Member,
    lost: Option<watch::Receiver<bool>>,
    withdraw: Option<Box<dyn FnOnce() + Send + Sync>>,
}

impl Registration {
    /// An announcement for providers: `withdraw` runs once, when it is dropped; `lost` turns true when its lease is gone,
    /// `None` where nothing can be lost.
    pub fn new(
        member: Member,
        lost: Option<watch::Receiver<bool>>,
        withdraw: impl FnOnce() + Send + Sync + 'static,
    ) -> Self {
        Self { member, lost, withdraw: Some(Box::new(withdraw)) }
    }

    /// The member as it was announced.
    pub fn member(&self) -> &Member {
        &self.member
    }

    /// Resolves when the lease is lost: register again, with a new incarnation. Never resolves for `memory` and `static`.
    pub async fn lost(&self) {
        if let Some(lost) = &self.lost {
            // A provider that is gone can no longer keep the lease.
            let mut lost = lost.clone();
            drop(lost.wait_for(|lost| *lost).await);
            return;
        }
        std::future::pending::<()>().await;
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(withdraw) = self.withdraw.take() {
            withdraw();
        }
    }
}

impl std::fmt::Debug for Registration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registration").field("member", &self.member).finish_non_exhaustive()
    }
}
