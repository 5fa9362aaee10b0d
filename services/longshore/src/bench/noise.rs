//! Numbers without meaning for kernels to work on: their speed does not depend on values.

use longshore_attention::{HeadShape, KvDtype, Tile, TileShape, Tiles};

/// Reproducible numbers (SplitMix64).
#[derive(Debug, Clone)]
pub(super) struct Noise(pub(super) u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// Uniform in [-1, 1).
    pub(super) fn number(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// `[count]` of them.
    pub(super) fn numbers(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.number()).collect()
    }

    /// `[count]` tokens of a vocabulary.
    pub(super) fn tokens(&mut self, count: usize, vocabulary: usize) -> Vec<u32> {
        (0..count).map(|_| (self.next() % vocabulary as u64) as u32).collect()
    }

    /// A full tile.
    pub(super) fn tile(&mut self, shape: TileShape) -> Tile {
        let elements = shape.block_tokens * shape.kv_heads * shape.head_dim;
        let mut tile = Tile::zeroed(shape);
        tile.write(0, &self.numbers(elements), &self.numbers(elements))
            .expect("the elements are those of the shape");
        tile
    }
}

/// KV of `keys` tokens of one sequence in one layer, in memory of its own; the same few tiles over and over, which costs less to
/// make.
pub(super) fn tiles(heads: HeadShape, block_tokens: usize, dtype: KvDtype, keys: usize) -> Tiles {
    let shape = TileShape { block_tokens, kv_heads: heads.kv_heads, head_dim: heads.head_dim, dtype };
    let mut noise = Noise(keys as u64);
    let few: Vec<Tile> = (0..8).map(|_| noise.tile(shape)).collect();
    let tiles = few.iter().cycle().take(keys.div_ceil(block_tokens)).cloned().collect();
    Tiles { shape, tiles }
}
