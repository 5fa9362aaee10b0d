//! Members fixed by configuration.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use tokio::sync::watch;

use super::{Membership, Registration};
use crate::{ClusterView, Error, Member};

/// Members fixed by configuration; registering checks that the member is one of them.
#[derive(Debug, Clone)]
pub struct StaticMembership {
    view: Arc<watch::Sender<Arc<ClusterView>>>,
    registered: Arc<Mutex<HashSet<String>>>,
}

impl StaticMembership {
    /// The cluster that these members make. Every process must be told the same list, in any order.
    pub fn new(members: Vec<Member>) -> Result<Self, Error> {
        let (view, _) = watch::channel(Arc::new(ClusterView::new(members)?));
        Ok(Self { view: Arc::new(view), registered: Arc::default() })
    }

    /// The view, which changes only by [`Self::replace`].
    pub fn view(&self) -> Arc<ClusterView> {
        self.view.borrow().clone()
    }

    /// Puts another list in the place of this one; true when it differs. One that cannot be changes nothing.
    pub fn replace(&self, members: Vec<Member>) -> Result<bool, Error> {
        let view = Arc::new(ClusterView::new(members)?);
        Ok(self.view.send_if_modified(|last| {
            let differs = *last != view;
            if differs {
                *last = Arc::clone(&view);
            }
            differs
        }))
    }

    /// The incarnation is the process's own, so it is the one field that need not be as configured.
    fn check(&self, member: &Member) -> Result<(), Error> {
        let view = self.view();
        let known = view.member(&member.id).ok_or_else(|| Error::Unknown { id: member.id.clone() })?;
        let differs = |field, ours: &dyn std::fmt::Display, theirs: &dyn std::fmt::Display| {
            let problem = format!("is `{ours}`, but the member list says `{theirs}`, hint: make them equal");
            Err(Error::invalid(&member.id, field, problem))
        };
        if known.role != member.role {
            return differs("role", &member.role, &known.role);
        }
        if known.address != member.address {
            return differs("address", &member.address, &known.address);
        }
        if known.weight != member.weight {
            return differs("weight", &member.weight, &known.weight);
        }
        if known.labels != member.labels {
            let (ours, theirs) = (&member.labels, &known.labels);
            let field = if ours.host == theirs.host { "zone" } else { "host" };
            let of = |labels: &crate::Labels| {
                if field == "host" { labels.host.clone() } else { labels.zone.clone() }
            };
            return differs(field, &of(ours), &of(theirs));
        }
        Ok(())
    }
}

#[async_trait]
impl Membership for StaticMembership {
    async fn register(&self, member: Member) -> Result<Registration, Error> {
        self.check(&member)?;
        let id = member.id.clone();
        let mut registered = self.registered.lock().unwrap_or_else(PoisonError::into_inner);
        if !registered.insert(id.clone()) {
            return Err(Error::Taken { id });
        }
        let registered = self.registered.clone();
        Ok(Registration::new(member, None, move || {
            registered.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        }))
    }

    fn watch(&self) -> watch::Receiver<Arc<ClusterView>> {
        self.view.subscribe()
    }
}
