//! Tiles for tests of schedules.

use crate::{PagedKv, Tile, TileShape};

/// Tiles that nobody looks at.
pub(super) struct Unseen(pub(super) TileShape);

impl PagedKv for Unseen {
    fn shape(&self) -> TileShape {
        self.0
    }
    fn len(&self) -> usize {
        usize::MAX
    }
    fn tile(&self, index: usize) -> &Tile {
        panic!("a schedule needs no tile, not even {index}")
    }
}
