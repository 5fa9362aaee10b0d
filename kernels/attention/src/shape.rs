//! Shapes of heads and tiles.

use crate::Error;

/// Keys of a K panel, columns of a V panel.
pub(crate) const LANES: usize = 16;

/// Layout id of the CPU tile. Heads lie one after the other, in order; each head is its K, then its V:
/// K transposed in 16-key panels `[block / 16][head_dim][16]`, V in 16-column panels
/// `[ceil(head_dim / 16)][block][16]` (columns past `head_dim` are zero), then, in int8 tiles, the f32 scales of K
/// `[block]` and of V `[block]`. Everything is little-endian, without gaps between panels or heads.
pub const LAYOUT_CPU_PANELS: u32 = 1;

/// Layout id of a tile on a GPU, a page. Heads lie one after the other, in order; each head is its K `[block][head_dim]`, then its V
/// `[block][head_dim]`, then, in int8 tiles, the f32 scales of K `[block]` and of V `[block]`. Everything is little-endian, without gaps.
pub const LAYOUT_ROWS: u32 = 2;

/// Element type of K and V in a tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// 4 bytes.
    F32,
    /// 2 bytes: 5 of exponent, 10 of mantissa.
    F16,
    /// 2 bytes: 8 of exponent, 7 of mantissa.
    Bf16,
    /// 1 byte, from −127 to 127, times an f32 scale per token and KV head, one for K and one for V.
    Int8,
}

impl KvDtype {
    /// All of them, the widest first.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Bf16, Self::Int8];

    /// Bytes of one element, without its share of a scale.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Int8 => 1,
        }
    }

    /// Bytes of the scales of one token and KV head, K and V together.
    pub fn scale_bytes(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 0,
            Self::Int8 => 2 * size_of::<f32>(),
        }
    }

    /// Name in configuration and namespaces.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }
}

/// Heads of a layer: `kv_heads * group` query heads; query head `h` reads KV head `h / group`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HeadShape {
    /// KV heads.
    pub kv_heads: usize,
    /// Query heads per KV head.
    pub group: usize,
    /// Elements of one head.
    pub head_dim: usize,
}

impl HeadShape {
    /// Query heads.
    pub fn query_heads(&self) -> usize {
        self.kv_heads * self.group
    }
}

/// Shape of a KV tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TileShape {
    /// Token positions of a block; a multiple of 16.
    pub block_tokens: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Element type.
    pub dtype: KvDtype,
}

impl TileShape {
    /// Largest tile body that anybody may send: bounds messages and allocations.
    pub const MAX_BYTES: usize = 8 << 20;

    /// Checks the ranges: blocks of 16 to 256 (power of two), 1 to 1,024 heads, head size 1 to 1,024, body within [`Self::MAX_BYTES`].
    pub fn validate(&self) -> Result<(), Error> {
        let invalid = |field, problem: String| Err(Error::Invalid { field, problem });
        if !self.block_tokens.is_power_of_two() || !(16..=256).contains(&self.block_tokens) {
            return invalid(
                "block_tokens",
                format!("is {}, must be a power of two from 16 to 256", self.block_tokens),
            );
        }
        if !(1..=1024).contains(&self.kv_heads) {
            return invalid("kv_heads", format!("is {}, must be from 1 to 1024", self.kv_heads));
        }
        if !(1..=1024).contains(&self.head_dim) {
            return invalid("head_dim", format!("is {}, must be from 1 to 1024", self.head_dim));
        }
        if self.bytes() > Self::MAX_BYTES {
            return invalid(
                "tile_shape",
                format!("makes tiles of {} bytes, limit {}", self.bytes(), Self::MAX_BYTES),
            );
        }
        Ok(())
    }

    /// Elements of the K panels of one head.
    pub fn k_head_elements(&self) -> usize {
        self.block_tokens * self.head_dim
    }

    /// Elements of the V panels of one head, padding columns included.
    pub fn v_head_elements(&self) -> usize {
        self.block_tokens * self.head_dim.next_multiple_of(LANES)
    }

    /// Bytes of one head: K, V and, where the type has them, scales.
    pub fn head_bytes(&self) -> usize {
        let elements = self.k_head_elements() + self.v_head_elements();
        elements * self.dtype.bytes() + self.block_tokens * self.dtype.scale_bytes()
    }

    /// Bytes of the whole body.
    pub fn bytes(&self) -> usize {
        self.kv_heads * self.head_bytes()
    }
}
