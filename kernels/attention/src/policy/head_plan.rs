//! Head plans: which pattern each head of each layer has, as data.

mod duo;
mod minference;

use std::fmt::Write;

use crate::Error;

use super::digest::digest;
use super::invalid;

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

/// Patterns of all heads, `[layer][head]`; the heads are query heads or KV heads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadPlan {
    layers: Vec<Vec<HeadPattern>>,
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
        Ok(Self { layers })
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

    /// MInference's configuration of this plan, an entry per head of the plan, with score 1. Read back it visits the same,
    /// but `block_sparse` has 100 blocks there.
    pub fn to_minference_json(&self) -> String {
        let mut text = String::from("[");
        for (layer, heads) in self.layers.iter().enumerate() {
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
        digest(&self.to_minference_json())
    }

    /// Layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Heads of a layer.
    pub fn heads(&self) -> usize {
        self.layers[0].len()
    }

    /// Patterns of the heads of a layer < [`Self::layers`].
    pub fn layer(&self, layer: usize) -> &[HeadPattern] {
        &self.layers[layer]
    }

    pub(super) fn has_vertical_slash(&self) -> bool {
        self.layers.iter().flatten().any(HeadPattern::is_vertical_slash)
    }
}
