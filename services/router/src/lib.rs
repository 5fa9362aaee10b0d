//! The front door: takes prompts over gRPC and OpenAI HTTP, finds the cached prefix, picks workers by load, and streams
//! answers that survive the loss of a worker. Must never compute attention, hold KV, or know where a process runs.

mod config;
mod error;
#[cfg(test)]
mod fixture;
pub mod grpc;
pub mod http;
mod metrics;
mod policies;
mod service;

pub use config::{Config, HttpConfig};
pub use error::{Error, Kind};
pub use metrics::{IndexMetrics, Outcome, OutcomeLabel, PolicyLabel, RouterMetrics, code_name};
pub use policies::{DEFAULT_PREFILL_POLICY, Policies};
pub use service::{Parts, Router};
