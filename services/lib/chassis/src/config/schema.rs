//! Which keys exist, and which known key somebody may have meant.

use serde::Serialize;
use serde_json::{Map, Value};

use super::{join, secret::REDACTED};

/// The serialised defaults.
#[derive(Debug)]
pub(super) struct Schema {
    tree: Value,
}

/// What the schema says about a key.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place<'a> {
    /// A table of known keys.
    Table(&'a Map<String, Value>),
    /// A single value or an array.
    Leaf,
    /// A number of bytes, by the name of its key.
    Bytes,
    /// An optional value without default, or something below a free-form map: serde decides.
    Open,
}

impl<'a> Place<'a> {
    pub(super) fn of(name: &str, value: &'a Value) -> Self {
        match value {
            Value::Number(_) if name.split('_').any(|word| word == "bytes") => Self::Bytes,
            Value::Null => Self::Open,
            Value::Object(table) if table.is_empty() => Self::Open,
            Value::Object(table) => Self::Table(table),
            _ => Self::Leaf,
        }
    }
}

impl Schema {
    pub(super) fn of<C: Serialize>(defaults: &C) -> Self {
        let tree = serde_json::to_value(defaults).expect("config structs have string keys and serialise");
        assert!(tree.is_object(), "a config is a struct with named fields");
        Self { tree }
    }

    pub(super) fn root(&self) -> Place<'_> {
        Place::of("", &self.tree)
    }

    /// The defaults without secrets, whose serialised form is not their value.
    pub(super) fn defaults(&self) -> Value {
        let mut tree = self.tree.clone();
        drop_secrets(&mut tree);
        tree
    }

    /// The known key that is closest to an unknown one.
    pub(super) fn nearest(&self, unknown: &str) -> Option<String> {
        let mut keys = Vec::new();
        collect_keys(&self.tree, "", &mut keys);
        let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
        let limit = (unknown.len() / 3).max(2);
        let scored = keys.into_iter().map(|key| {
            let whole = distance(unknown, &key);
            // The right name in the wrong section is one slip, however long the section's name is.
            let moved = if last(unknown) == last(&key) { 1 } else { usize::MAX };
            (whole.min(moved), whole, key)
        });
        scored.filter(|(score, ..)| *score <= limit).min().map(|(.., key)| key)
    }
}

fn drop_secrets(tree: &mut Value) {
    if let Value::Object(table) = tree {
        table.retain(|_, value| value != REDACTED);
        table.values_mut().for_each(drop_secrets);
    }
}

fn collect_keys(tree: &Value, path: &str, keys: &mut Vec<String>) {
    if let Value::Object(table) = tree {
        for (name, value) in table {
            let key = join(path, name);
            collect_keys(value, &key, keys);
            keys.push(key);
        }
    }
}

/// Optimal string alignment distance: insertions, deletions, replacements and swaps of neighbours.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    for (j, cell) in rows[0].iter_mut().enumerate() {
        *cell = j;
    }
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replaced.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[a.len()][b.len()]
}
