//! KV shards: hold the blocks of sequences in memory and on disk and answer attention where they lie.

mod attend;
mod borrowed;
mod compute;
mod config;
mod drain;
mod epochs;
mod error;
mod get;
pub mod grpc;
mod inventory;
mod lanes;
mod lifetime;
mod list;
mod metrics;
mod put;
mod repair;
mod scrub;
mod service;
mod stats;
mod store;
mod summaries;
#[cfg(test)]
mod tests;
mod tier;
mod turns;
mod views;

pub use compute::ShardCompute;
pub use config::{Config, DiskConfig, RepairConfig};
pub use epochs::epochs;
pub use error::Error;
pub use repair::Cluster;
pub use service::KvStore;
pub use store::ShardIdentity;
pub use tier::DiskError;
#[doc(hidden)]
pub use tier::DiskFaults;
