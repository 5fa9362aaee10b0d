//! Prints a configuration as TOML that can be loaded again.

use std::fmt::Write as _;

use serde::Serialize;
use serde_json::{Map, Value};

use super::{Descriptions, join};

/// Columns of a comment.
const COLUMNS: usize = 120;

/// `config` as TOML, secrets redacted; keys without a value are comments.
pub fn render<C: Serialize>(config: &C) -> String {
    render_described(config, &Descriptions::default())
}

/// The same with what is said of each key before it.
pub fn render_described<C: Serialize>(config: &C, descriptions: &Descriptions) -> String {
    let tree = serde_json::to_value(config).expect("config structs have string keys and serialise");
    let mut out = String::new();
    if let Value::Object(table) = tree {
        section(&table, "", descriptions, &mut out);
    }
    out
}

/// Comment lines with what is said of `key`.
fn describe(descriptions: &Descriptions, key: &str, out: &mut String) {
    let Some(text) = descriptions.get(key) else { return };
    let mut line = "#".to_owned();
    for word in text.split_whitespace() {
        if line.len() > 1 && line.len() + 1 + word.len() > COLUMNS {
            out.push_str(&line);
            line = "\n#".to_owned();
        }
        line.push(' ');
        line.push_str(word);
    }
    out.push_str(&line);
    out.push('\n');
}

fn section(table: &Map<String, Value>, path: &str, descriptions: &Descriptions, out: &mut String) {
    let is_section = |value: &Value| value.as_object().is_some_and(|inner| !inner.is_empty());
    for (name, value) in table.iter().filter(|(_, value)| !is_section(value)) {
        describe(descriptions, &join(path, name), out);
        let name = quoted(name);
        match (value, to_toml(value)) {
            (_, Some(value)) => writeln!(out, "{name} = {value}"),
            (Value::Null, None) => writeln!(out, "# {name} = (not set)"),
            (value, None) => writeln!(out, "# {name} = {value} (more than TOML can say)"),
        }
        .expect("writing to a string cannot fail");
    }
    for (name, value) in table {
        if let Some(inner) = value.as_object().filter(|inner| !inner.is_empty()) {
            let path = join(path, &quoted(name));
            let gap = if out.is_empty() { "" } else { "\n" };
            out.push_str(gap);
            describe(descriptions, &path, out);
            writeln!(out, "[{path}]").expect("writing to a string cannot fail");
            section(inner, &path, descriptions, out);
        }
    }
}

fn quoted(name: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !name.is_empty() && name.chars().all(bare) {
        name.to_owned()
    } else {
        // A key must be a one-line string, which the writer for values does not promise. JSON's escapes are a subset of
        // TOML's basic string, except that TOML wants DEL escaped.
        Value::from(name).to_string().replace('\u{7f}', "\\u007F")
    }
}

fn to_toml(value: &Value) -> Option<toml::Value> {
    Some(match value {
        Value::Null => return None,
        Value::Bool(truth) => toml::Value::Boolean(*truth),
        Value::String(text) => toml::Value::String(text.clone()),
        Value::Number(number) if number.is_f64() => toml::Value::Float(shortest(number.as_f64()?)),
        Value::Number(number) => toml::Value::Integer(number.as_i64()?),
        Value::Array(values) => toml::Value::Array(values.iter().map(to_toml).collect::<Option<_>>()?),
        Value::Object(table) => {
            let entries = table.iter().filter_map(|(name, value)| Some((name.clone(), to_toml(value)?)));
            toml::Value::Table(entries.collect())
        }
    })
}

/// An f32 became an f64 on its way here: 0.1 is shown as 0.1, not as 0.10000000149011612.
fn shortest(number: f64) -> f64 {
    let narrow = number as f32;
    if f64::from(narrow) == number { narrow.to_string().parse().unwrap_or(number) } else { number }
}
