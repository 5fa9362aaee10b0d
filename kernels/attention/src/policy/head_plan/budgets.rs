//! Budgets of heads: which scorer, selector and guards each KV head has, as data, in levels by the name of a policy.
//!
//! Layers differ by an order of magnitude in how many blocks hold their mass, so one budget for all is either too little for
//! some or wasted on most. A level says for every KV head `dense`, or the keys of a policy (`gamma=0.9`, `scorer=antidiagonal,
//! gamma=0.95`) over those that all heads of the level share.

use std::fmt::Write;

use serde::Deserialize;

use crate::Error;

use super::super::digest::digest;
use super::super::{Blocks, invalid, shown, shown_error, spec};

/// What a file says that it is.
const FORMAT: &str = "longshore-head-budgets";
const VERSION: u32 = 1;
/// Longest file.
const BYTES_MAX: usize = 16 << 20;
/// Most levels.
const LEVELS_MAX: usize = 16;
/// Longest name of a level, and longest note.
const NAME_MAX: usize = 32;
const NOTE_MAX: usize = 4096;
/// A head that visits everything.
const DENSE: &str = "dense";

/// One level of a plan as it is written.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BudgetLevel {
    /// Name: that of a preset (`balanced`), which then means this level, or another.
    pub name: String,
    /// Where it comes from, for people.
    #[serde(default)]
    pub note: String,
    /// `key=value` pairs of the policy `blocks` that heads have where they do not say otherwise.
    pub blocks: String,
    /// `[layer][KV head]`: `dense`, or `key=value` pairs, which may be none.
    pub heads: Vec<Vec<String>>,
}

/// A file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    format: String,
    version: u32,
    #[serde(default)]
    model: String,
    levels: Vec<BudgetLevel>,
}

/// Budgets of all heads of a model, in levels.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadBudgets {
    model: String,
    levels: Vec<Level>,
}

/// A level that was read.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::policy) struct Level {
    written: BudgetLevel,
    /// `[layer][KV head]`; none is dense.
    heads: Vec<Vec<Option<Blocks>>>,
    digest: String,
}

impl Level {
    pub(in crate::policy) fn digest(&self) -> &str {
        &self.digest
    }

    /// Rules of the KV heads of a layer; none beyond the last.
    pub(in crate::policy) fn layer(&self, layer: usize) -> Option<&[Option<Blocks>]> {
        self.heads.get(layer).map(Vec::as_slice)
    }

    pub(in crate::policy) fn layers(&self) -> usize {
        self.heads.len()
    }
}

impl HeadBudgets {
    /// Puts levels together; `model` says for people which model they were made for. Refuses none or more than 16 levels,
    /// names that are no words or given twice, another number of layers or KV heads, and heads whose keys or values the policy
    /// `blocks` does not have.
    pub fn new(model: &str, levels: Vec<BudgetLevel>, layers: usize, kv_heads: usize) -> Result<Self, Error> {
        if !(1..=LEVELS_MAX).contains(&levels.len()) {
            return invalid("plan", format!("has {} levels, must have 1 to {LEVELS_MAX}", levels.len()));
        }
        if model.len() > NOTE_MAX {
            return invalid("plan", format!("has a model of {} bytes, limit {NOTE_MAX}", model.len()));
        }
        let mut read: Vec<Level> = Vec::with_capacity(levels.len());
        for level in levels {
            check_name(&level)?;
            if read.iter().any(|other| other.written.name == level.name) {
                return invalid("plan", format!("has the level {} twice", shown(&level.name)));
            }
            read.push(read_level(level, layers, kv_heads)?);
        }
        Ok(Self { model: model.to_owned(), levels: read })
    }

    /// Reads a file: an object of `format` (`longshore-head-budgets`), `version` (1), `model` (for people) and `levels`, each a
    /// [`BudgetLevel`]. Refuses everything else, and what [`Self::new`] refuses.
    pub fn from_json(text: &str, layers: usize, kv_heads: usize) -> Result<Self, Error> {
        if text.len() > BYTES_MAX {
            return invalid("plan", format!("has {} bytes, limit {BYTES_MAX}", text.len()));
        }
        let file: File = match serde_json::from_str(text) {
            Ok(file) => file,
            Err(error) => {
                let error = error.to_string();
                return invalid("plan", format!("is no plan of budgets: {}", shown_error(&error)));
            }
        };
        if file.format != FORMAT {
            return invalid("plan", format!("has the format {}, must be `{FORMAT}`", shown(&file.format)));
        }
        if file.version != VERSION {
            return invalid(
                "plan",
                format!("has the version {}, this program reads {VERSION}", file.version),
            );
        }
        Self::new(&file.model, file.levels, layers, kv_heads)
    }

    /// The file of this plan, a line per layer.
    pub fn to_json(&self) -> String {
        let mut text = format!(
            "{{\n \"format\": \"{FORMAT}\",\n \"version\": {VERSION},\n \"model\": {},\n \"levels\": [",
            quoted(&self.model)
        );
        for (index, Level { written, .. }) in self.levels.iter().enumerate() {
            text.push_str(if index == 0 { "\n  {\n" } else { ",\n  {\n" });
            for (key, value) in
                [("name", &written.name), ("note", &written.note), ("blocks", &written.blocks)]
            {
                writeln!(text, "   \"{key}\": {},", quoted(value)).expect("strings take everything");
            }
            text.push_str("   \"heads\": [");
            for (layer, heads) in written.heads.iter().enumerate() {
                let heads: Vec<String> = heads.iter().map(|head| quoted(head)).collect();
                let comma = if layer == 0 { "" } else { "," };
                write!(text, "{comma}\n    [{}]", heads.join(", ")).expect("strings take everything");
            }
            text.push_str("\n   ]\n  }");
        }
        text.push_str("\n ]\n}\n");
        text
    }

    /// Layers.
    pub fn layers(&self) -> usize {
        self.levels[0].layers()
    }

    /// KV heads of a layer.
    pub fn kv_heads(&self) -> usize {
        self.levels[0].heads[0].len()
    }

    /// The levels, as they are written.
    pub fn levels(&self) -> impl ExactSizeIterator<Item = &BudgetLevel> {
        self.levels.iter().map(|level| &level.written)
    }

    pub(in crate::policy) fn level(&self, name: &str) -> Option<&Level> {
        self.levels.iter().find(|level| level.written.name == name)
    }

    pub(in crate::policy) fn with_digest(&self, digest: &str) -> Option<&Level> {
        self.levels.iter().find(|level| level.digest == digest)
    }

    /// The level, when there is one only.
    pub(in crate::policy) fn only(&self) -> Option<&Level> {
        if let [level] = &self.levels[..] { Some(level) } else { None }
    }

    /// Digest of all levels, without what is for people.
    pub(super) fn digest(&self) -> String {
        let levels = self.levels.iter().map(|level| format!("{}={}\n", level.written.name, level.digest));
        digest(&levels.collect::<String>())
    }

    /// Names of the levels, for errors.
    pub(in crate::policy) fn names(&self) -> String {
        self.levels.iter().map(|level| level.written.name.as_str()).collect::<Vec<_>>().join(", ")
    }
}

fn check_name(level: &BudgetLevel) -> Result<(), Error> {
    let word = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    if level.name.is_empty() || level.name.len() > NAME_MAX || !level.name.bytes().all(word) {
        let name = shown(&level.name);
        return invalid(
            "plan",
            format!("has the level {name}, must be 1 to {NAME_MAX} of a to z, 0 to 9 and -"),
        );
    }
    if level.note.len() > NOTE_MAX {
        let bytes = level.note.len();
        return invalid(
            "plan",
            format!("has a note of {bytes} bytes in level {}, limit {NOTE_MAX}", level.name),
        );
    }
    Ok(())
}

fn read_level(written: BudgetLevel, layers: usize, kv_heads: usize) -> Result<Level, Error> {
    let name = &written.name;
    if written.heads.len() != layers || layers == 0 {
        let found = written.heads.len();
        return invalid("plan", format!("has {found} layers in level {name}, the model has {layers}"));
    }
    let mut heads = Vec::with_capacity(layers);
    let mut canonical = String::new();
    for (layer, texts) in written.heads.iter().enumerate() {
        if texts.len() != kv_heads || kv_heads == 0 {
            let found = texts.len();
            return invalid(
                "plan",
                format!(
                    "has {found} heads in layer {layer} of level {name}, the model has {kv_heads} KV heads"
                ),
            );
        }
        let rules = texts.iter().enumerate().map(|(head, text)| {
            rule(&written.blocks, text).map_err(|error| {
                error.retold(|field, problem| {
                    let place = format!("head {head} of layer {layer} in level {name}");
                    ("plan", format!("has no budget for {place}: `{field}` {problem}"))
                })
            })
        });
        let rules: Vec<Option<Blocks>> = rules.collect::<Result<_, _>>()?;
        for rule in &rules {
            let text = rule.as_ref().map_or_else(|| DENSE.to_owned(), spec::canonical_blocks);
            canonical.push_str(&text);
            canonical.push('\n');
        }
        canonical.push('\n');
        heads.push(rules);
    }
    Ok(Level { heads, digest: digest(&canonical), written })
}

/// The rule of a head; none is dense.
fn rule(shared: &str, text: &str) -> Result<Option<Blocks>, Error> {
    if text == DENSE {
        // What all share is checked even where every head is dense.
        return spec::read_blocks("", shared).map(|_| None);
    }
    spec::read_blocks(text, shared).map(Some)
}

fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("a text is JSON")
}
