//! Membership providers.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::{ClusterView, Error, Member};

/// A place where processes register and watch each other. Ready for leases, watches and epochs of a real coordinator.
#[async_trait]
pub trait Membership: Send + Sync + std::fmt::Debug {
    /// Announces `member` until the registration is dropped or its lease is lost. Refuses an id that is taken.
    async fn register(&self, member: Member) -> Result<Registration, Error>;
    /// The current view and every later one.
    fn watch(&self) -> watch::Receiver<Arc<ClusterView>>;
}

/// A member's announcement; dropping it withdraws the member.
#[derive(Debug)]
pub struct Registration {}

/// Members of one process.
#[derive(Debug, Clone)]
pub struct MemoryMembership {}

/// Members fixed by configuration; registering checks that the member is one of them.
#[derive(Debug, Clone)]
pub struct StaticMembership {}
