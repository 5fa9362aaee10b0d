//! The prefill worker: turns prompts into KV blocks and streams every layer's tiles to their shards while the next layer
//! computes. Holds no KV longer than it needs; must never acknowledge a block that no shard acknowledged.

mod compute;
mod config;
mod error;
pub mod grpc;
mod metrics;
mod policy;
mod prefix;
mod service;

pub use config::{Config, PrefixPolicy};
pub use error::Error;
pub use metrics::PrefillMetrics;
pub use service::PrefillWorker;
