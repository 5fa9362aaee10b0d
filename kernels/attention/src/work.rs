//! What an attention call visits.

use crate::HeadShape;

/// Query rows of one sequence in one layer, already rotated: f32 `[rows, query_heads, head_dim]`. Row `r` has the absolute
/// position `first_position + r`.
#[derive(Debug, Clone, Copy)]
pub struct Queries<'a> {
    /// Head shape.
    pub shape: HeadShape,
    /// Absolute position of row 0.
    pub first_position: u64,
    /// Softmax scale, normally `1 / sqrt(head_dim)`; the executor multiplies by log2(e).
    pub scale: f32,
    /// Elements; the length fixes the number of rows.
    pub data: &'a [f32],
}

impl Queries<'_> {
    /// Query rows (positions); none of heads that cannot be, which executors and policies refuse.
    pub fn rows(&self) -> usize {
        self.data.len().checked_div(self.shape.query_heads() * self.shape.head_dim).unwrap_or(0)
    }
}

/// A tile whose keys are visited one by one. Keys after a row's own position are invisible to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExactBlock {
    /// Index of the tile in the KV source.
    pub tile: u32,
    /// Absolute position of the tile's first key.
    pub first_position: u64,
    /// Keys that count, 1 to `block_tokens`.
    pub len: u32,
}

/// One gathered key, visited by every row at or after its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Column {
    /// Index of the tile in the KV source.
    pub tile: u32,
    /// Offset of the key in the tile.
    pub offset: u32,
    /// Absolute position of the key.
    pub position: u64,
}

/// A summary pseudo-token: mean key and value of `weight` keys; contributes `t + log2(weight) + bias`. Visible to all rows.
#[derive(Debug, Clone, PartialEq)]
pub struct SummaryKey {
    /// KV head that it belongs to.
    pub kv_head: u32,
    /// Mean key, `head_dim` elements.
    pub key: Vec<f32>,
    /// Mean value, `head_dim` elements.
    pub value: Vec<f32>,
    /// Number of keys that it stands for, > 0.
    pub weight: f32,
    /// Added to its logit, in base 2; normally 0.
    pub bias: f32,
}

/// What an attention call visits. Order is part of the contract: partials are folded block by block in list order, then
/// the columns (as blocks of `block_tokens` gathered keys), then the summaries likewise.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct WorkList {
    /// Tiles visited key by key.
    pub exact: Vec<ExactBlock>,
    /// Gathered keys.
    pub columns: Vec<Column>,
    /// Added to the logit of each column, in base 2 (log2 of what the key counts for); empty: nothing.
    pub column_bias: Vec<f32>,
    /// Pseudo-tokens.
    pub summaries: Vec<SummaryKey>,
}
