//! Layered configuration: defaults, then a TOML file, then the environment, then `--set`. Later layers win key by key.
//!
//! The serialised `C::default()` is the schema: a key that is not in it is refused. `Option` fields need no list, since the
//! schema keeps their `None` as a null; below a null, and below a map that is empty by default, serde alone decides.
//! Config structs are plain serde structs with `#[serde(default, deny_unknown_fields)]`, without `skip_serializing`.
//!
//! * environment: `LONGSHORE_SECTION__KEY=value`, a double underscore between levels, upper case. The names in
//!   [`Sources::reserved_env`] mean other things, and the variables that Kubernetes injects for a service called `longshore-…`
//!   are passed over.
//! * `--set section.key=value`, and flags that stand for one. As in the environment, the value is read as TOML, and as a string when it
//!   is no TOML.
//!
//! Numbers of bytes, whose keys have the word `bytes`, may have a unit in every layer: `"32GiB"`.
//!
//! This module and the binary are the only places that read the environment.

mod describe;
mod error;
mod layer;
mod render;
mod schema;
mod secret;
mod size;
#[cfg(test)]
mod tests;

use std::{fmt::Display, ops::RangeInclusive, path::PathBuf};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::words::plain_numbers;
pub use describe::Descriptions;
pub use error::{ConfigError, ConfigFault, Origin};
use layer::Override;
pub use render::{render, render_described};
use schema::Schema;
pub use secret::{REDACTED, Secret};
pub use size::bytes;

/// Prefix of environment variables that set configuration keys.
pub const ENV_PREFIX: &str = "LONGSHORE_";

/// A configuration that can tell what is wrong with its values.
pub trait Validate {
    /// Appends one fault per value that can never work: ranges, and fields that do not fit together. `path` is the dotted key
    /// of this component, empty at the root; nested components get [`join`]`(path, field)`.
    fn faults(&self, path: &str, faults: &mut Vec<Fault>);
}

/// One value that can never work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Dotted key, for example `router.listen`.
    pub key: String,
    /// What is wrong, as a verb phrase: "is 0, must be at least 1".
    pub problem: String,
}

impl Fault {
    /// A fault of `field` of the component at `path`.
    pub fn new(path: &str, field: &str, problem: impl Into<String>) -> Self {
        Self { key: join(path, field), problem: problem.into() }
    }
}

/// Dotted key of `field` of the component at `path`.
pub fn join(path: &str, field: &str) -> String {
    if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") }
}

/// Appends a fault unless `value` lies in `range`.
pub fn check_range<T: PartialOrd + Display>(
    faults: &mut Vec<Fault>,
    path: &str,
    field: &str,
    value: T,
    range: RangeInclusive<T>,
) {
    if !range.contains(&value) {
        let problem = format!("is {value}, must be from {} to {}", range.start(), range.end());
        faults.push(Fault::new(path, field, problem));
    }
}

/// A value that was given on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// `section.key=value`.
    pub text: String,
    /// The flag that stands for it, for example `--threads`; `None`: `--set`.
    pub flag: Option<&'static str>,
}

impl From<String> for Setting {
    fn from(text: String) -> Self {
        Self { text, flag: None }
    }
}

/// Where values may come from, beside the defaults.
#[derive(Debug, Clone)]
pub struct Sources {
    /// TOML file; it must exist when it is named.
    pub file: Option<PathBuf>,
    /// Environment variables; those without [`ENV_PREFIX`] are passed over.
    pub env: Vec<(String, String)>,
    /// Values of the command line; later ones win.
    pub sets: Vec<Setting>,
    /// Variables that have the prefix but are no configuration keys.
    pub reserved_env: Vec<String>,
}

impl Default for Sources {
    /// Nothing but the defaults.
    fn default() -> Self {
        let reserved_env = ["LONGSHORE_CACHE", "LONGSHORE_CONFIG"].map(str::to_owned).to_vec();
        Self { file: None, env: Vec::new(), sets: Vec::new(), reserved_env }
    }
}

impl Sources {
    /// A file, variables told by the caller, and values of the command line.
    pub fn new(
        file: Option<PathBuf>,
        env: impl IntoIterator<Item = (String, String)>,
        sets: Vec<Setting>,
    ) -> Self {
        Self { file, env: env.into_iter().collect(), sets, ..Self::default() }
    }

    /// A file, the environment of this process, and values of the command line.
    pub fn from_process(file: Option<PathBuf>, sets: Vec<Setting>) -> Self {
        // `vars` panics on a variable that is not Unicode, also on one that is none of ours.
        let ours = std::env::vars_os().filter_map(|(name, value)| {
            let name = name.into_string().ok().filter(|name| name.starts_with(ENV_PREFIX))?;
            Some((name, value.to_string_lossy().into_owned()))
        });
        Self::new(file, ours, sets)
    }

    /// The same with one more variable that is no configuration key.
    pub fn reserve(mut self, variable: impl Into<String>) -> Self {
        self.reserved_env.push(variable.into());
        self
    }
}

/// Reads every layer, refuses unknown keys, wrong types and values that [`Validate`] rejects, and tells all of them at once.
pub fn load<C>(sources: &Sources) -> Result<C, ConfigError>
where
    C: Serialize + DeserializeOwned + Default + Validate,
{
    let schema = Schema::of(&C::default());
    let mut faults = Vec::new();
    let overrides = layer::read(&schema, sources, &mut faults);
    let config = build::<C>(&schema, &overrides, &mut faults);
    if let Some(config) = &config {
        let mut found = Vec::new();
        config.faults("", &mut found);
        faults.extend(found.into_iter().map(|fault| attribute(fault, &overrides)));
    }
    match config {
        Some(config) if faults.is_empty() => Ok(config),
        _ => Err(ConfigError::new(faults)),
    }
}

/// Applies the overrides to the defaults. When they do not fit together, each is tried alone, so that every one that is at
/// fault is named with its source; the others make a configuration that can still be validated.
fn build<C: DeserializeOwned>(
    schema: &Schema,
    overrides: &[Override],
    faults: &mut Vec<ConfigFault>,
) -> Option<C> {
    let first: Vec<(&Override, &Value)> = overrides.iter().map(|o| (o, &o.candidates[0])).collect();
    if let Ok(config) = apply(schema, &first) {
        return Some(config);
    }
    let mut fitting = Vec::with_capacity(overrides.len());
    for o in overrides {
        match fit::<C>(schema, o) {
            Ok(value) => fitting.push((o, value)),
            Err(problem) => faults.push(ConfigFault { origin: o.origin.clone(), key: o.key(), problem }),
        }
    }
    match apply(schema, &fitting) {
        Ok(config) => Some(config),
        Err(error) => {
            let origin = fitting.last().map_or(Origin::Defaults, |(o, _)| o.origin.clone());
            let key = fitting.last().map_or_else(String::new, |(o, _)| o.key());
            faults.push(ConfigFault {
                origin,
                key,
                problem: format!("does not fit the other values: {error}"),
            });
            None
        }
    }
}

/// The first reading of an override that the configuration accepts, or why it accepts none.
fn fit<'a, C: DeserializeOwned>(schema: &Schema, o: &'a Override) -> Result<&'a Value, String> {
    let mut problem = String::new();
    for value in &o.candidates {
        match apply::<C>(schema, &[(o, value)]) {
            Ok(_) => return Ok(value),
            Err(error) if problem.is_empty() => {
                problem = format!("cannot be read: {}", plain_numbers(&error.to_string()))
            }
            Err(_) => {}
        }
    }
    Err(problem)
}

fn apply<C: DeserializeOwned>(
    schema: &Schema,
    overrides: &[(&Override, &Value)],
) -> Result<C, serde_json::Error> {
    let mut tree = schema.defaults();
    for (o, value) in overrides {
        layer::insert(&mut tree, &o.path, (*value).clone());
    }
    serde_json::from_value(tree)
}

/// Names the layer that a rejected value came from.
fn attribute(fault: Fault, overrides: &[Override]) -> ConfigFault {
    let touches = |o: &&Override| {
        let key = o.key();
        let below = |long: &str, short: &str| {
            long.strip_prefix(short).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        below(&fault.key, &key) || below(&key, &fault.key)
    };
    let origin = overrides.iter().rev().find(touches).map_or(Origin::Defaults, |o| o.origin.clone());
    ConfigFault { origin, key: fault.key, problem: fault.problem }
}
