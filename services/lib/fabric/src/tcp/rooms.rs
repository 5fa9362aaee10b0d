//! Memory for tiles where they will stay.

use longshore_attention::{Tile, TileShape};
use longshore_proto::types::{TileMemory, TileMessage, TileRoom};

/// Gives a new [`Tile`] for every body that is as long as one of its shape.
#[derive(Debug, Clone, Copy)]
pub struct TileRooms {
    shape: TileShape,
}

impl TileRooms {
    /// For tiles of `shape`, which must be valid.
    pub fn new(shape: TileShape) -> Self {
        Self { shape }
    }

    /// The tile that a message's body was read into, and the CRC-32C of what was written there, if it is one of this shape. Whoever
    /// takes it compares that with the message's.
    pub fn landed(&self, message: &TileMessage) -> Option<(std::sync::Arc<Tile>, u32)> {
        message.data.landed::<Tile>().filter(|(tile, _)| tile.shape() == self.shape)
    }
}

impl TileMemory for TileRooms {
    fn room(&self, bytes: usize) -> Option<Box<dyn TileRoom>> {
        // The lane writes all of it, or nobody ever sees it.
        (bytes == self.shape.bytes()).then(|| Box::new(Tile::unwritten(self.shape)) as Box<dyn TileRoom>)
    }
}
