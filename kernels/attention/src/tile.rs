//! K and V of one block in one layer.

use crate::{Error, TileShape};

/// K and V of one block in one layer, in the CPU layout, 64-byte aligned. Elements never written are zero.
#[derive(Debug, Clone)]
pub struct Tile {
    shape: TileShape,
}

impl Tile {
    /// An all-zero tile. `shape` must be valid.
    pub fn zeroed(_shape: TileShape) -> Self {
        todo!()
    }

    /// Copies a body that came from elsewhere; refuses a wrong length.
    pub fn from_bytes(_shape: TileShape, _body: &[u8]) -> Result<Self, Error> {
        todo!()
    }

    /// The body as it travels.
    pub fn as_bytes(&self) -> &[u8] {
        todo!()
    }

    /// Shape.
    pub fn shape(&self) -> TileShape {
        self.shape
    }

    /// Writes keys and values of consecutive tokens, f32 `[n, kv_heads, head_dim]` each, from token `offset` of the block on.
    pub fn write(&mut self, _offset: usize, _keys: &[f32], _values: &[f32]) -> Result<(), Error> {
        todo!()
    }

    /// Reads one token back as (key, value), f32 `[kv_heads, head_dim]` each.
    pub fn read(&self, _offset: usize) -> Result<(Vec<f32>, Vec<f32>), Error> {
        todo!()
    }
}
