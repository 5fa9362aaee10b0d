//! Identity, placement and bookkeeping of KV blocks. Decides, does no I/O: no clock, no network, no async; time is an argument.

mod admission;
mod checksum;
mod error;
mod geometry;
mod key;
mod namespace;
mod placement;
pub mod pool;
pub mod quorum;
pub mod repair;
pub mod tier;

pub use admission::{AdmissionFilter, AdmissionRule, Sketch};
pub use checksum::{combine_crc32c, copy_crc32c, crc32c, crc32c_append, fill_crc32c};
pub use error::{Error, Kind};
pub use geometry::Geometry;
pub use key::{BlockKey, KeyChain};
pub use namespace::{Deployment, DeploymentParts, EXACT_PREFILL, Namespace};
pub use placement::{BlockPlace, ShardEntry, ShardId, ShardMap};
pub use pool::{BlockPool, PoolConfig};
