//! The decode worker: generates tokens for many sequences at once. The KV of its sequences lies on the shards; it holds only
//! the growing block of each and what no shard has acknowledged yet. Must never let one sequence harm another.

mod active;
mod config;
mod error;
pub mod grpc;
mod metrics;
mod sealing;
mod service;
mod stepper;

pub use config::Config;
pub use error::Error;
pub use metrics::DecodeMetrics;
pub use service::DecodeWorker;
