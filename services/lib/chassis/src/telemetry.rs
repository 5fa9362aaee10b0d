//! Logs: `tracing` to standard error, as text or JSON.

#[cfg(test)]
mod tests;

use std::{io::IsTerminal as _, sync::atomic::AtomicU64};

use prometheus_client::metrics::counter::Counter;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    EnvFilter, Layer, fmt,
    layer::{Context, SubscriberExt as _},
    util::SubscriberInitExt as _,
};

use crate::{Error, Fault, Metrics, Validate};

/// Levels as people write them.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people; coloured on a terminal unless `NO_COLOR` is set.
    #[default]
    Text,
    /// One object a line, for collectors.
    Json,
}

/// What is logged and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// Level, or directives such as `info,longshore_router=debug`.
    pub filter: String,
    /// `text` or `json`.
    pub format: LogFormat,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self { filter: "info".to_owned(), format: LogFormat::Text }
    }
}

impl TelemetryConfig {
    fn filter(&self) -> Result<EnvFilter, String> {
        let hint =
            "hint: write a level (error, warn, info, debug, trace) or `target=level`, separated by commas";
        if self.filter.trim().is_empty() {
            return Err(format!("is empty, {hint}"));
        }
        // A word alone would be a target, and with a misspelt level nothing else would be logged.
        let is_level = |word: &&str| {
            LEVELS.iter().any(|level| level.eq_ignore_ascii_case(word))
                || word.is_empty()
                || word.contains(['=', '['])
        };
        if let Some(word) = self.filter.split(',').map(str::trim).find(|word| !is_level(word)) {
            return Err(format!("has `{word}`, which is no level, {hint}"));
        }
        EnvFilter::builder()
            .parse(&self.filter)
            .map_err(|error| format!("is `{}`: {error}, {hint}", self.filter))
    }
}

impl Validate for TelemetryConfig {
    fn faults(&self, path: &str, faults: &mut Vec<Fault>) {
        if let Err(problem) = self.filter() {
            faults.push(Fault::new(path, "filter", problem));
        }
    }
}

/// Counts of logged warnings and errors since the start; clones share them.
#[derive(Debug, Clone, Default)]
pub struct LogCounters {
    warnings: Counter<u64, AtomicU64>,
    errors: Counter<u64, AtomicU64>,
}

impl LogCounters {
    /// Warnings logged.
    pub fn warnings(&self) -> u64 {
        self.warnings.get()
    }

    /// Errors logged.
    pub fn errors(&self) -> u64 {
        self.errors.get()
    }

    /// Registers `longshore_log_warnings_total` and `longshore_log_errors_total`.
    pub fn register(&self, metrics: &Metrics) {
        metrics.register(
            "longshore_log_warnings",
            "Warnings logged: degraded but going on",
            self.warnings.clone(),
        );
        metrics.register("longshore_log_errors", "Errors logged: a human is needed", self.errors.clone());
    }
}

impl<S: Subscriber> Layer<S> for LogCounters {
    fn on_event(&self, event: &Event<'_>, _ctx: Context<'_, S>) {
        match *event.metadata().level() {
            Level::ERROR => drop(self.errors.inc()),
            Level::WARN => drop(self.warnings.inc()),
            _ => {}
        }
    }
}

/// Sets up logging for this process and counts warnings and errors. Works once; a second call is refused.
pub fn telemetry(config: &TelemetryConfig) -> Result<LogCounters, Error> {
    let filter =
        config.filter().map_err(|problem| Error::Telemetry { problem: format!("`filter` {problem}") })?;
    let coloured = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let lines = match config.format {
        LogFormat::Text => fmt::layer().with_writer(std::io::stderr).with_ansi(coloured).boxed(),
        LogFormat::Json => fmt::layer().json().flatten_event(true).with_writer(std::io::stderr).boxed(),
    };
    let counters = LogCounters::default();
    tracing_subscriber::registry()
        .with(filter)
        .with(counters.clone())
        .with(lines)
        .try_init()
        .map_err(|_| Error::Telemetry { problem: "it is set up already".to_owned() })?;
    Ok(counters)
}
