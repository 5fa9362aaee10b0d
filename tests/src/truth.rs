//! What every stored block of a test holds: a function of its key, so that nobody has to remember it.

use longshore_blocks::{BlockKey, BlockPlace, crc32c};
use longshore_proto::types::TileMessage;

use crate::draws::Draws;

/// Body of a tile of `bytes` bytes (a multiple of 8): finite f16 values that its key and layer fix.
pub fn body(bytes: usize, key: BlockKey, layer: u32) -> Vec<u8> {
    let (low, high) = key.0.split_at(8);
    let word = |half: &[u8]| u64::from_le_bytes(half.try_into().expect("half of a key has 8 bytes"));
    let mut draws = Draws::new(&[word(low), word(high), u64::from(layer)]);
    // Without the highest bit of its exponent an f16 is finite.
    let words = std::iter::repeat_with(|| draws.word() & 0xbfff_bfff_bfff_bfff);
    words.take(bytes / 8).flat_map(u64::to_le_bytes).collect()
}

/// All tiles of a block, as their writer sends them.
pub fn messages(bytes: usize, layers: u32, key: BlockKey, place: BlockPlace) -> Vec<TileMessage> {
    let tile = |layer| {
        let data = body(bytes, key, layer);
        TileMessage { key, layer, crc32c: crc32c(&data), data: data.into(), place: Some(place) }
    };
    (0..layers).map(tile).collect()
}

/// Whether a tile holds what its key says.
pub fn is_right(tile: &TileMessage) -> bool {
    *tile.data == *body(tile.data.len(), tile.key, tile.layer)
}
