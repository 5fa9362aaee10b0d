//! Partial results of attention and their merge.

use crate::Error;

/// Attention of some rows over some keys: per (row, query head) the running maximum `m` (base 2), the sum `l` and the
/// un-normalised output `o`. The empty key set is (−∞, 0, 0), the identity of [`Partials::merge`].
#[derive(Debug, Clone, PartialEq)]
pub struct Partials {
    rows: usize,
    heads: usize,
    head_dim: usize,
    m: Vec<f32>,
    l: Vec<f32>,
    o: Vec<f32>,
}

impl Partials {
    /// The identity: no keys seen.
    pub fn identity(rows: usize, heads: usize, head_dim: usize) -> Self {
        let n = rows * heads;
        Self { rows, heads, head_dim, m: vec![f32::NEG_INFINITY; n], l: vec![0.0; n], o: vec![0.0; n * head_dim] }
    }

    /// Merges `other` (keys that come later) into self: both are rescaled to the larger maximum. Bit for bit, merging
    /// the identity changes nothing. Errors when the shapes differ.
    pub fn merge(&mut self, _other: &Self) -> Result<(), Error> {
        todo!()
    }

    /// `O = o / l`, f32 `[rows, heads * head_dim]`; rows without keys are 0.
    pub fn finish(self) -> Vec<f32> {
        todo!()
    }

    /// Wire form, f32 `[rows, heads, 2 + head_dim]` as (m, l, o...).
    pub fn to_interleaved(&self) -> Vec<f32> {
        todo!()
    }

    /// Reads the wire form; refuses a wrong length, NaN anywhere, negative or infinite `l`, `m` = +∞.
    pub fn from_interleaved(_rows: usize, _heads: usize, _head_dim: usize, _data: &[f32]) -> Result<Self, Error> {
        todo!()
    }

    /// Rows, query heads and head size.
    pub fn shape(&self) -> (usize, usize, usize) {
        (self.rows, self.heads, self.head_dim)
    }
}
