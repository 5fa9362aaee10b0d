//! Reads one layer after the other into overrides of single keys.

use std::{fs, path::Path};

use serde_json::{Map, Value};

use super::{
    ConfigFault, ENV_PREFIX, Origin, Setting, Sources, bytes, join,
    schema::{Place, Schema},
};

/// A configuration file has at most this many bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// A key of the environment or of `--set` has at most this many levels.
const LEVELS_MAX: usize = 16;

/// A value for one key.
#[derive(Debug)]
pub(super) struct Override {
    pub(super) path: Vec<String>,
    pub(super) origin: Origin,
    /// Readings of the value, the likeliest first; never empty.
    pub(super) candidates: Vec<Value>,
}

impl Override {
    pub(super) fn key(&self) -> String {
        self.path.join(".")
    }
}

/// Every override of every layer, in their order, and a fault for everything that names no key or has no value.
pub(super) fn read(schema: &Schema, sources: &Sources, faults: &mut Vec<ConfigFault>) -> Vec<Override> {
    let mut walk = Walk { schema, overrides: Vec::new(), faults };
    if let Some(path) = &sources.file {
        walk.file(path);
    }
    for (variable, text) in &sources.env {
        if let Some(key) = variable.strip_prefix(ENV_PREFIX)
            && !sources.reserved_env.contains(variable)
            && !is_service_link(key, text)
        {
            walk.variable(variable, key, text);
        }
    }
    for set in &sources.sets {
        walk.set(set);
    }
    walk.overrides
}

/// Puts `value` at `path`, making tables on the way.
pub(super) fn insert(tree: &mut Value, path: &[String], value: Value) {
    let Some((name, rest)) = path.split_first() else {
        *tree = value;
        return;
    };
    if !tree.is_object() {
        *tree = Value::Object(Map::new());
    }
    if let Value::Object(table) = tree {
        insert(table.entry(name.clone()).or_insert(Value::Null), rest, value);
    }
}

/// Kubernetes injects `LONGSHORE_ROUTER_SERVICE_HOST`, `LONGSHORE_ROUTER_PORT_9000_TCP_ADDR` and the like into every pod
/// beside a service called `longshore-router`, and `LONGSHORE_PORT` beside one called `longshore`. They have no double underscore, and no key of ours looks like them.
fn is_service_link(key: &str, text: &str) -> bool {
    // Of a service called `longshore` alone there is nothing before `SERVICE` or `PORT`.
    let key = &format!("_{key}");
    let linked = text.starts_with("tcp://") || text.starts_with("udp://") || text.starts_with("sctp://");
    let named = key.ends_with("_SERVICE_HOST") || key.contains("_SERVICE_PORT");
    let port = key.split_once("_PORT_").is_some_and(|(_, rest)| {
        rest.split_once('_').is_some_and(|(number, rest)| {
            let protocol = rest.split('_').next().unwrap_or_default();
            number.parse::<u16>().is_ok() && ["TCP", "UDP", "SCTP"].contains(&protocol)
        })
    });
    !key.contains("__") && (named || port || (linked && key.ends_with("_PORT")))
}

struct Walk<'a> {
    schema: &'a Schema,
    overrides: Vec<Override>,
    faults: &'a mut Vec<ConfigFault>,
}

impl Walk<'_> {
    fn fault(&mut self, origin: &Origin, key: impl Into<String>, problem: impl Into<String>) {
        self.faults.push(ConfigFault { origin: origin.clone(), key: key.into(), problem: problem.into() });
    }

    fn file(&mut self, path: &Path) {
        let origin = Origin::File(path.to_owned());
        match read_file(path) {
            Ok(table) => self.table(&origin, self.schema.root(), &mut Vec::new(), table),
            Err(problem) => self.fault(&origin, "", problem),
        }
    }

    fn variable(&mut self, variable: &str, key: &str, text: &str) {
        let path: Vec<String> = key.split("__").map(str::to_ascii_lowercase).collect();
        self.text(&Origin::Environment(variable.to_owned()), path, text);
    }

    fn set(&mut self, set: &Setting) {
        let origin = set.flag.map_or(Origin::Set, Origin::Flag);
        let Some((key, text)) = set.text.split_once('=') else {
            let problem = format!("says `{}`, hint: write `--set section.key=value`", set.text);
            return self.fault(&origin, "", problem);
        };
        let path = key.trim().split('.').map(|level| level.trim().to_owned()).collect();
        self.text(&origin, path, text.trim());
    }

    /// A value that was written as text beside its key.
    fn text(&mut self, origin: &Origin, path: Vec<String>, text: &str) {
        if path.iter().any(String::is_empty) || path.len() > LEVELS_MAX {
            let problem =
                format!("is no key, hint: a key is 1 to {LEVELS_MAX} names with one separator between them");
            return self.fault(origin, path.join("."), problem);
        }
        let raw = Value::String(text.to_owned());
        let value = text
            .parse::<toml::Value>()
            .ok()
            .and_then(|value| to_json(value).ok())
            .unwrap_or_else(|| raw.clone());
        let depth = path.len();
        let nested =
            path.into_iter().rev().fold(value, |inner, name| Value::Object(Map::from_iter([(name, inner)])));
        let known = self.overrides.len();
        if let Value::Object(table) = nested {
            self.table(origin, self.schema.root(), &mut Vec::new(), table);
        }
        // `NAME=123` is a number as TOML, but a key that wants a string gets one.
        for o in self.overrides[known..].iter_mut().filter(|o| o.path.len() == depth) {
            o.candidates.push(raw.clone());
        }
    }

    fn table(
        &mut self,
        origin: &Origin,
        place: Place<'_>,
        path: &mut Vec<String>,
        table: Map<String, Value>,
    ) {
        for (name, value) in table {
            let below = match place {
                Place::Table(known) => known.get(&name).map(|value| Place::of(&name, value)),
                Place::Open => Some(Place::Open),
                Place::Leaf | Place::Bytes => None,
            };
            match below {
                Some(below) => {
                    path.push(name);
                    self.value(origin, below, path, value);
                    path.pop();
                }
                None => self.unknown(origin, &join(&path.join("."), &name)),
            }
        }
    }

    fn value(&mut self, origin: &Origin, place: Place<'_>, path: &mut Vec<String>, value: Value) {
        match (place, value) {
            (Place::Table(_) | Place::Open, Value::Object(table)) if !table.is_empty() => {
                self.table(origin, place, path, table);
            }
            (Place::Table(_), Value::Object(_)) => {}
            (Place::Table(known), _) => {
                let names: Vec<String> = known.keys().map(|name| format!("`{name}`")).collect();
                self.fault(
                    origin,
                    path.join("."),
                    format!("is a section, hint: its keys are {}", names.join(", ")),
                );
            }
            (Place::Leaf | Place::Bytes, Value::Object(_)) => {
                self.fault(origin, path.join("."), "is a single value, not a section");
            }
            (Place::Bytes, Value::String(text)) => match bytes(&text) {
                Ok(number) => self.value(origin, Place::Leaf, path, number.into()),
                Err(problem) => self.fault(origin, path.join("."), format!("is `{text}`, {problem}")),
            },
            (Place::Leaf | Place::Bytes | Place::Open, value) => {
                self.overrides.push(Override {
                    path: path.clone(),
                    origin: origin.clone(),
                    candidates: vec![value],
                });
            }
        }
    }

    fn unknown(&mut self, origin: &Origin, key: &str) {
        let problem = match self.schema.nearest(key) {
            Some(near) => format!("is not a known key, hint: did you mean `{near}`?"),
            None => "is not a known key, hint: `--print-config` shows all keys".to_owned(),
        };
        self.fault(origin, key, problem);
    }
}

fn read_file(path: &Path) -> Result<Map<String, Value>, String> {
    let length = fs::metadata(path).map_err(|error| format!("cannot be read: {error}"))?.len();
    if length > FILE_BYTES_MAX {
        return Err(format!("has {length} bytes, at most {FILE_BYTES_MAX} are read"));
    }
    let text = fs::read_to_string(path).map_err(|error| format!("cannot be read: {error}"))?;
    // The parser's own display quotes the line, which may hold a secret.
    let table: toml::Table = toml::from_str(&text).map_err(|error| {
        let line =
            error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        format!("is no TOML at line {line}: {}", error.message())
    })?;
    match to_json(toml::Value::Table(table))? {
        Value::Object(table) => Ok(table),
        _ => Err("is no table".to_owned()),
    }
}

fn to_json(value: toml::Value) -> Result<Value, String> {
    Ok(match value {
        toml::Value::String(text) => Value::String(text),
        toml::Value::Integer(number) => Value::from(number),
        toml::Value::Boolean(truth) => Value::Bool(truth),
        toml::Value::Datetime(time) => Value::String(time.to_string()),
        toml::Value::Float(number) => serde_json::Number::from_f64(number)
            .map(Value::Number)
            .ok_or_else(|| format!("is {number}, must be a finite number"))?,
        toml::Value::Array(values) => {
            Value::Array(values.into_iter().map(to_json).collect::<Result<_, _>>()?)
        }
        toml::Value::Table(table) => {
            let entries = table.into_iter().map(|(name, value)| Ok((name, to_json(value)?)));
            Value::Object(entries.collect::<Result<_, String>>()?)
        }
    })
}
