//! Tiles that lie here.

use crate::{PagedKv, Tile, TileShape};

/// Tiles of one shape in memory, as a source of keys and values.
#[derive(Debug, Clone)]
pub struct Tiles {
    /// Shape of every tile.
    pub shape: TileShape,
    /// The tiles, in order.
    pub tiles: Vec<Tile>,
}

impl PagedKv for Tiles {
    fn shape(&self) -> TileShape {
        self.shape
    }

    fn len(&self) -> usize {
        self.tiles.len()
    }

    fn tile(&self, index: usize) -> &Tile {
        &self.tiles[index]
    }
}
