//! Who is in the cluster: `memory` (one process) and `static` (addresses given by flags). etcd comes later behind the same trait.

mod error;
mod membership;
mod view;

pub use error::Error;
pub use membership::{Membership, MemoryMembership, Registration, StaticMembership};
pub use view::{ClusterView, Member, Role};
