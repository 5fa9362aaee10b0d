//! MInference's configuration files.

use serde::Deserialize;
use serde::de::{MapAccess, Visitor};
use serde_json::Value;

use crate::Error;

use super::super::{invalid, shown, shown_error};
use super::HeadPattern;

/// What MInference gives a head that its file does not name.
const DEFAULT: HeadPattern = HeadPattern::VerticalSlash { vertical: 1000, slash: 6096 };
/// Blocks of a block-sparse head.
const TOP: u64 = 100;
/// Longest file.
const BYTES_MAX: usize = 16 << 20;

/// The entries of an object, none lost: a map would forget keys that are given twice.
struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object from head to [type, first, second, score]")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Entries(entries))
    }
}

/// Patterns, `[layers][heads]`.
pub(super) fn read(text: &str, layers: usize, heads: usize) -> Result<Vec<Vec<HeadPattern>>, Error> {
    if text.len() > BYTES_MAX {
        return invalid("plan", format!("has {} bytes, limit {BYTES_MAX}", text.len()));
    }
    let read: Result<Vec<Entries>, _> = serde_json::from_str(text);
    let found = match read {
        Ok(found) => found,
        Err(error) => {
            return invalid(
                "plan",
                format!("is no list of layers, each an object of heads: {}", shown_error(&error.to_string())),
            );
        }
    };
    if found.len() != layers {
        return invalid("plan", format!("has {} layers, the model has {layers}", found.len()));
    }
    let each = found.into_iter().enumerate();
    each.map(|(layer, Entries(entries))| read_layer(layer, &entries, heads)).collect()
}

fn read_layer(layer: usize, entries: &[(String, Value)], heads: usize) -> Result<Vec<HeadPattern>, Error> {
    let mut patterns = vec![None; heads];
    for (key, value) in entries {
        let digits = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_digit());
        let head = key.parse::<usize>().ok().filter(|head| digits && *head < heads);
        let Some(head) = head else {
            let last = heads - 1;
            return invalid(
                "plan",
                format!("has head {} in layer {layer}, valid are 0 to {last}", shown(key)),
            );
        };
        if patterns[head].replace(pattern(layer, head, value)?).is_some() {
            return invalid("plan", format!("has head {head} of layer {layer} twice"));
        }
    }
    Ok(patterns.into_iter().map(|pattern| pattern.unwrap_or(DEFAULT)).collect())
}

fn pattern(layer: usize, head: usize, value: &Value) -> Result<HeadPattern, Error> {
    let parts = value.as_array().map(Vec::as_slice);
    let Some([Value::String(name), first, second, Value::Number(_)]) = parts else {
        let problem = format!("has no [type, first, second, score] for head {head} of layer {layer}");
        return invalid("plan", problem);
    };
    let (first, second) = (budget(layer, head, first)?, budget(layer, head, second)?);
    match name.as_str() {
        "dense" => Ok(HeadPattern::Dense),
        "vertical_and_slash" => Ok(HeadPattern::VerticalSlash { vertical: first, slash: second }),
        "stream_llm" => Ok(HeadPattern::Streaming { sink: first, recent: second.max(1) }),
        "block_sparse" => Ok(HeadPattern::BlockSparse { top: TOP }),
        _ => invalid(
            "plan",
            format!(
                "has the type {} for head {head} of layer {layer}, must be one of: vertical_and_slash, stream_llm, \
                 block_sparse, dense",
                shown(name)
            ),
        ),
    }
}

fn budget(layer: usize, head: usize, value: &Value) -> Result<u64, Error> {
    match value.as_u64().filter(|budget| *budget <= HeadPattern::BUDGET_MAX) {
        Some(budget) => Ok(budget),
        None => invalid(
            "plan",
            format!(
                "has the budget {} for head {head} of layer {layer}, must be a whole number from 0 to {}",
                shown(&value.to_string()),
                HeadPattern::BUDGET_MAX
            ),
        ),
    }
}
