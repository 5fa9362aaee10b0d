//! What every process needs around its service: configuration, telemetry, listeners, health, tasks and drain. Knows no
//! service and no wire protocol; libraries never depend on it.

pub mod admin;
pub mod config;
mod error;
pub mod listen;
mod metrics;
pub mod signals;
mod tasks;
mod telemetry;
pub mod words;

pub use admin::{Admin, Readiness};
pub use config::{ConfigError, ConfigFault, Fault, Origin, Secret, Sources, Validate, load, render};
pub use error::{Error, Kind};
pub use listen::{Reserved, bind, reserve};
pub use metrics::{Figure, Metrics, encode_counters, encode_gauges};
pub use signals::{Ended, Signal, Signals, until_drained};
pub use tasks::Tasks;
pub use telemetry::{LogCounters, LogFormat, TelemetryConfig, telemetry};
