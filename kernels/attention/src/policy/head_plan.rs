//! Head plans: which pattern or budget each head of each layer has, as data.

mod budgets;
mod duo;
mod minference;

use std::fmt::Write;

use crate::Error;

use super::digest::digest;
use super::invalid;

pub(super) use budgets::Level;
pub use budgets::{BudgetLevel, HeadBudgets};
pub use duo::GatesCut;

/// What a head visits, apart from the blocks that the query tile lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadPattern {
    /// Everything.
    Dense,
    /// The blocks of the first `sink` keys and of the `recent` newest of each row (A-shape).
    Streaming {
        /// Keys.
        sink: u64,
        /// Keys, the row's own among them.
        recent: u64,
    },
    /// The keys (columns) and distances (diagonals) that weigh most for the last rows of a span.
    VerticalSlash {
        /// Columns, at least 30.
        vertical: u64,
        /// Diagonals, at least 100.
        slash: u64,
    },
    /// The blocks whose mean key is nearest to the mean query of the tile.
    BlockSparse {
        /// Blocks.
        top: u64,
    },
}

impl HeadPattern {
    /// Largest budget.
    pub(super) const BUDGET_MAX: u64 = 1 << 24;

    pub(super) fn is_vertical_slash(&self) -> bool {
        matches!(self, Self::VerticalSlash { .. })
    }

    /// Name and budgets, as MInference writes them; `dense` is our addition.
    fn parts(&self) -> (&'static str, u64, u64) {
        match *self {
            Self::Dense => ("dense", 0, 0),
            Self::Streaming { sink, recent } => ("stream_llm", sink, recent),
            Self::VerticalSlash { vertical, slash } => ("vertical_and_slash", vertical, slash),
            Self::BlockSparse { top } => ("block_sparse", top, 0),
        }
    }
}

/// What the heads of a model visit: patterns, or budgets of mean-corrected blocks in levels.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadPlan {
    contents: Contents,
}

#[derive(Debug, Clone, PartialEq)]
enum Contents {
    /// Of all heads, `[layer][head]`; the heads are query heads or KV heads.
    Patterns(Vec<Vec<HeadPattern>>),
    Budgets(HeadBudgets),
}

impl From<HeadBudgets> for HeadPlan {
    fn from(budgets: HeadBudgets) -> Self {
        Self { contents: Contents::Budgets(budgets) }
    }
}

impl HeadPlan {
    /// A plan of these patterns, `[layer][head]`. Refuses no layers, no heads, layers of different width and budgets
    /// beyond 2^24.
    pub fn new(layers: Vec<Vec<HeadPattern>>) -> Result<Self, Error> {
        let heads = layers.first().map_or(0, Vec::len);
        if heads == 0 || layers.iter().any(|layer| layer.len() != heads) {
            return invalid("plan", "must have layers, all with the same number of heads, at least one");
        }
        for pattern in layers.iter().flatten() {
            let (name, first, second) = pattern.parts();
            if first.max(second) > HeadPattern::BUDGET_MAX {
                let (budget, limit) = (first.max(second), HeadPattern::BUDGET_MAX);
                return invalid("plan", format!("has a budget of {budget} in a head {name}, limit {limit}"));
            }
        }
        Ok(Self { contents: Contents::Patterns(layers) })
    }

    /// Reads MInference's configuration: a list over layers, each an object from query head (`"0"`, `"1"`, …) to
    /// `[type, first, second, score]`. Types are `vertical_and_slash` (columns, diagonals), `stream_llm` (first keys, newest
    /// keys), `block_sparse` (visits the best 100 blocks, as MInference does whatever the budgets) and, as our addition,
    /// `dense`. A head that is missing is vertical-slash (1000, 6096). Refuses any other number of layers, heads from
    /// `query_heads` on, a head twice, unknown types, budgets that are no whole numbers from 0 to 2^24.
    pub fn from_minference_json(
        text: &str,
        layers: usize,
        query_heads: usize,
        kv_heads: usize,
    ) -> Result<Self, Error> {
        if layers == 0 || kv_heads == 0 || !query_heads.is_multiple_of(kv_heads) || query_heads == 0 {
            return invalid(
                "plan",
                format!("cannot be of {layers} layers, {query_heads} query and {kv_heads} KV heads"),
            );
        }
        Self::new(minference::read(text, layers, query_heads)?)
    }

    /// Reads DuoAttention's gates: a line per layer, a column per KV head, separated by tabs, each from 0 to 1. Heads at
    /// or above the cut are dense, others streaming. Refuses any other number of lines or columns, and values that are no
    /// such numbers.
    pub fn from_duo_tsv(
        text: &str,
        cut: GatesCut,
        sink: u64,
        recent: u64,
        layers: usize,
        kv_heads: usize,
    ) -> Result<Self, Error> {
        let gates = duo::read(text, layers, kv_heads)?;
        let threshold = cut.threshold(&gates)?;
        let pattern = |&gate: &f64| match gate >= threshold {
            true => HeadPattern::Dense,
            false => HeadPattern::Streaming { sink, recent: recent.max(1) },
        };
        Self::new(gates.chunks(kv_heads).map(|layer| layer.iter().map(pattern).collect()).collect())
    }

    /// MInference's configuration of these patterns, an entry per head of the plan, with score 1. Read back it visits the
    /// same, but `block_sparse` has 100 blocks there. A plan of budgets has no patterns and gives an empty list.
    pub fn to_minference_json(&self) -> String {
        let mut text = String::from("[");
        for (layer, heads) in self.patterns().iter().enumerate() {
            text.push_str(if layer == 0 { "\n{" } else { ",\n{" });
            for (head, pattern) in heads.iter().enumerate() {
                let comma = if head == 0 { "" } else { ", " };
                let (name, first, second) = pattern.parts();
                write!(text, "{comma}\"{head}\": [\"{name}\", {first}, {second}, 1]")
                    .expect("strings take everything");
            }
            text.push('}');
        }
        text.push_str("\n]\n");
        text
    }

    /// Digest of all that the plan says.
    pub fn digest(&self) -> String {
        match &self.contents {
            Contents::Patterns(_) => digest(&self.to_minference_json()),
            Contents::Budgets(budgets) => budgets.digest(),
        }
    }

    /// The budgets, when it is a plan of such.
    pub fn budgets(&self) -> Option<&HeadBudgets> {
        match &self.contents {
            Contents::Patterns(_) => None,
            Contents::Budgets(budgets) => Some(budgets),
        }
    }

    /// Layers.
    pub fn layers(&self) -> usize {
        self.budgets().map_or(self.patterns().len(), HeadBudgets::layers)
    }

    /// Heads of a layer.
    pub fn heads(&self) -> usize {
        self.patterns().first().map_or_else(|| self.budgets().map_or(0, HeadBudgets::kv_heads), Vec::len)
    }

    /// Patterns of the heads of a layer; none beyond the last, and in a plan of budgets.
    pub fn layer(&self, layer: usize) -> &[HeadPattern] {
        self.patterns().get(layer).map_or(&[], Vec::as_slice)
    }

    fn patterns(&self) -> &[Vec<HeadPattern>] {
        match &self.contents {
            Contents::Patterns(layers) => layers,
            Contents::Budgets(_) => &[],
        }
    }

    pub(super) fn has_vertical_slash(&self) -> bool {
        self.patterns().iter().flatten().any(HeadPattern::is_vertical_slash)
    }
}
