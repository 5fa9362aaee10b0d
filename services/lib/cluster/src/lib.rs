//! Who is in the cluster: `memory` (one process) and `static` (addresses given by flags). etcd comes later behind the same trait.

mod error;
mod member;
mod membership;
mod view;

pub use error::{Error, Kind};
pub use member::{Labels, Member, Role};
pub use membership::{Membership, MemoryMembership, Registration, StaticMembership};
pub use view::{ClusterView, MEMBERS_MAX};
