//! KV shards: hold the blocks of sequences in memory and answer attention where they lie.

mod attend;
mod compute;
mod config;
mod error;
mod get;
pub mod grpc;
mod inventory;
mod lifetime;
mod metrics;
mod put;
mod repair;
mod service;
mod store;
mod summaries;
#[cfg(test)]
mod tests;
mod views;

pub use config::{Config, RepairConfig};
pub use error::Error;
pub use repair::Cluster;
pub use service::KvStore;
pub use store::ShardIdentity;
