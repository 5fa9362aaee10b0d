//! The blocks that a work list is made of: keys, values and who sees them, in the form that the microkernel reads.

use crate::shape::LANES;
use crate::tile::{Lane, Tile, Widened, k_place, v_place};
use crate::{Column, ExactBlock, SummaryKey, TileShape};

use super::PagedKv;

/// Largest number of keys of a block.
pub(super) const MAX_KEYS: usize = 256;

/// Which keys of a block a row sees.
#[derive(Debug, Clone, Copy)]
pub(super) enum Visibility<'a> {
    /// Those up to the row's position; the keys lie side by side from this position on.
    From(u64),
    /// Those up to the row's position; each key has its own.
    At(&'a [Column]),
    /// All.
    All,
}

impl Visibility<'_> {
    /// Whether a row at `position` sees key `key`.
    #[inline(always)]
    pub(super) fn sees(&self, position: u64, key: usize) -> bool {
        match self {
            Self::From(first) => first + key as u64 <= position,
            Self::At(columns) => columns[key].position <= position,
            Self::All => true,
        }
    }

    /// How many of the first `keys` keys a row at `position` sees before the first that it does not.
    #[inline(always)]
    pub(super) fn leading(&self, position: u64, keys: usize) -> usize {
        match self {
            Self::From(first) if *first > position => 0,
            Self::From(first) => (position - first + 1).min(keys as u64) as usize,
            Self::At(columns) => columns.iter().take_while(|column| column.position <= position).count(),
            Self::All => keys,
        }
    }

    /// No row up to `position` sees a key at or after this one.
    #[inline(always)]
    pub(super) fn end(&self, position: u64, keys: usize) -> usize {
        match self {
            Self::At(columns) => {
                columns.iter().rposition(|column| column.position <= position).map_or(0, |key| key + 1)
            }
            Self::From(_) | Self::All => self.leading(position, keys),
        }
    }
}

/// Some keys of one KV head.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block<'a> {
    /// K panels, `[.. / 16][head_dim]` lanes.
    pub(super) k: &'a [Lane],
    /// V panels, `[ceil(head_dim / 16)][v_stride]` lanes.
    pub(super) v: &'a [Lane],
    /// Lanes of a V panel.
    pub(super) v_stride: usize,
    /// Added to each key's logit; empty means 0.
    pub(super) bias: &'a [f32],
    /// Keys, at most [`MAX_KEYS`].
    pub(super) keys: usize,
    /// Who sees them.
    pub(super) visibility: Visibility<'a>,
}

impl<'a> Block<'a> {
    /// The keys of a tile, in place or widened into `room`.
    pub(super) fn exact(block: &ExactBlock, tile: &'a Tile, kv_head: usize, room: &'a mut Widened) -> Self {
        let (k, v) = tile.head(kv_head, room);
        Self {
            k,
            v,
            v_stride: tile.shape().block_tokens,
            bias: &[],
            keys: block.len as usize,
            visibility: Visibility::From(block.first_position),
        }
    }
}

/// A block that is put together from keys of several places.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    k: Vec<Lane>,
    v: Vec<Lane>,
    bias: Vec<f32>,
}

impl Gathered {
    /// Gathers columns, at most `block_tokens` of them.
    pub(super) fn columns<'a>(
        &'a mut self,
        kv: &dyn PagedKv,
        kv_head: usize,
        columns: &'a [Column],
    ) -> Block<'a> {
        let shape = kv.shape();
        self.clear(&shape);
        for (key, column) in columns.iter().enumerate() {
            let tile = kv.tile(column.tile as usize);
            tile.read_head(column.offset as usize, kv_head, |element, k, v| {
                self.set(&shape, key, element, k, v)
            });
        }
        self.block(&shape, columns.len(), Visibility::At(columns))
    }

    /// Gathers summaries of one KV head, at most `block_tokens` of them.
    pub(super) fn summaries(&mut self, shape: &TileShape, summaries: &[&SummaryKey]) -> Block<'_> {
        self.clear(shape);
        self.bias.resize(shape.block_tokens, 0.0);
        for (key, summary) in summaries.iter().enumerate() {
            for (element, (&k, &v)) in summary.key.iter().zip(&summary.value).enumerate() {
                self.set(shape, key, element, k, v);
            }
            self.bias[key] = f64::from(summary.weight).log2() as f32;
        }
        self.block(shape, summaries.len(), Visibility::All)
    }

    fn clear(&mut self, shape: &TileShape) {
        self.k.clear();
        self.k.resize(shape.k_head_elements() / LANES, [0.0; LANES]);
        self.v.clear();
        self.v.resize(shape.v_head_elements() / LANES, [0.0; LANES]);
        self.bias.clear();
    }

    fn set(&mut self, shape: &TileShape, key: usize, element: usize, k: f32, v: f32) {
        self.k.as_flattened_mut()[k_place(shape.head_dim, key, element)] = k;
        self.v.as_flattened_mut()[v_place(shape.block_tokens, key, element)] = v;
    }

    fn block<'a>(&'a self, shape: &TileShape, keys: usize, visibility: Visibility<'a>) -> Block<'a> {
        Block { k: &self.k, v: &self.v, v_stride: shape.block_tokens, bias: &self.bias, keys, visibility }
    }
}
