//! The metrics of a process: one registry, handed down with prefixes and labels.

mod scraped;
#[cfg(test)]
mod tests;

pub use scraped::{Figure, encode_counters, encode_gauges};

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Arc, Mutex, PoisonError},
};

use prometheus_client::{
    encoding::text,
    metrics::info::Info,
    registry::{Metric, Registry},
};

/// A handle on the registry. Clones and [`Metrics::sub`] share it. Names are `longshore_<crate>_<what>_<unit>`; a label names
/// a process or a fixed set, never a request.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    prefix: String,
    labels: Vec<(String, String)>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// An empty registry.
    pub fn new() -> Self {
        Self {
            registry: Arc::new(Mutex::new(Registry::default())),
            prefix: String::new(),
            labels: Vec::new(),
        }
    }

    /// The same registry with `prefix` and an underscore before every name.
    pub fn sub(&self, prefix: &str) -> Self {
        let prefix = format!("{}{prefix}_", self.prefix);
        Self { prefix, ..self.clone() }
    }

    /// The same registry with a label on every metric: tells apart services of one kind in one process.
    pub fn labelled(&self, name: &str, value: &str) -> Self {
        let mut labels = self.labels.clone();
        labels.push((name.to_owned(), value.to_owned()));
        Self { labels, ..self.clone() }
    }

    /// Registers one metric; the exposition appends `_total` to counters. `help` is a sentence without full stop.
    pub fn register(&self, name: &str, help: &str, metric: impl Metric) {
        self.with(|registry| registry.register(name, help, metric));
    }

    /// Lends the registry, below this handle's prefix and labels, to a constructor of a service's metrics.
    pub fn with<T>(&self, register: impl FnOnce(&mut Registry) -> T) -> T {
        let mut root = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let labels = self.labels.iter().map(|(name, value)| (name.clone().into(), value.clone().into()));
        let scoped = root.sub_registry_with_labels(labels);
        match self.prefix.strip_suffix('_') {
            Some(prefix) => register(scoped.sub_registry_with_prefix(prefix)),
            None => register(scoped),
        }
    }

    /// Registers `longshore_build_info{version}`.
    pub fn register_build(&self, version: &str) {
        let labels = vec![("version", version.to_owned())];
        self.register("longshore_build", "What this process was built from", Info::new(labels));
    }

    /// The registry in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        text::encode(&mut text, &registry).expect("writing to a string cannot fail");
        join_families(&text)
    }
}

/// Content type of [`Metrics::encode`].
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Brings the samples of one family together. Services of one kind register the same families under different labels, and a
/// family may appear only once in an exposition.
fn join_families(text: &str) -> String {
    let mut families: BTreeMap<&str, (Vec<&str>, Vec<&str>)> = BTreeMap::new();
    let mut current = "";
    for line in text.lines().filter(|line| *line != "# EOF") {
        match line.strip_prefix("# ").and_then(|comment| comment.split(' ').nth(1)) {
            Some(family) => {
                current = family;
                let (header, _) = families.entry(current).or_default();
                if !header.contains(&line) {
                    header.push(line);
                }
            }
            None => families.entry(current).or_default().1.push(line),
        }
    }
    let mut out = String::with_capacity(text.len());
    for line in families.values().flat_map(|(header, samples)| header.iter().chain(samples)) {
        writeln!(out, "{line}").expect("writing to a string cannot fail");
    }
    out + "# EOF\n"
}
