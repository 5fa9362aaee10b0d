//! The forward pass, cut at attention: whoever calls it brings attention from wherever the KV lies.

use crate::{Error, ModelConfig};

/// Residual stream of some rows. Opaque, so that a device may keep it; the host reads it with [`Activations::host`].
#[derive(Debug, Clone, PartialEq)]
pub struct Activations {
    rows: usize,
    width: usize,
    data: Vec<f32>,
}

impl Activations {
    /// Rows in host memory, f32 `[rows, width]`.
    pub fn from_host(width: usize, data: Vec<f32>) -> Self {
        debug_assert!(width > 0 && data.len().is_multiple_of(width));
        Self { rows: data.len() / width, width, data }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The chosen rows, in the order of `rows`; each must exist.
    pub fn select(&self, rows: &[usize]) -> Self {
        let data =
            rows.iter().flat_map(|row| &self.data[row * self.width..][..self.width]).copied().collect();
        Self { rows: rows.len(), width: self.width, data }
    }

    /// Elements, row-major.
    pub fn host(&self) -> &[f32] {
        &self.data
    }

    /// Elements, row-major.
    pub fn host_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }
}

/// Queries, keys and values of some rows in one layer; q and k are rotated.
#[derive(Debug, Clone, PartialEq)]
pub struct Qkv {
    /// f32 `[rows, query_heads, head_dim]`.
    pub q: Vec<f32>,
    /// f32 `[rows, kv_heads, head_dim]`.
    pub k: Vec<f32>,
    /// f32 `[rows, kv_heads, head_dim]`.
    pub v: Vec<f32>,
}

/// A model on a device. A row's result never depends on which other rows are in the call, bit for bit.
pub trait Backend: Send + Sync + std::fmt::Debug {
    /// What the model says of itself.
    fn config(&self) -> &ModelConfig;
    /// Bytes of its weights as they lie in memory.
    fn memory_bytes(&self) -> u64;
    /// Looks tokens up; refuses ids outside the vocabulary.
    fn embed(&self, tokens: &[u32]) -> Result<Activations, Error>;
    /// Norm, projections, biases, q/k norms, rotation at absolute `positions` (one per row).
    fn qkv(&self, layer: usize, x: &Activations, positions: &[u64]) -> Result<Qkv, Error>;
    /// Output projection of `attention` (f32 `[rows, query_heads * head_dim]`), residual, feed-forward, residual.
    fn finish(&self, layer: usize, x: Activations, attention: &[f32]) -> Result<Activations, Error>;
    /// Final norm and output matrix for the chosen rows: f32 `[rows.len(), vocabulary]`.
    fn logits(&self, x: &Activations, rows: &[usize]) -> Result<Vec<f32>, Error>;
}
