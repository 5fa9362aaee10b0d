//! The blocks that a work list is made of: keys, values and who sees them, in the form that the microkernel reads.

use bytemuck::Zeroable;

use crate::shape::LANES;
use crate::simd::Lane;
use crate::tile::{Element, Head, Line, Tile, k_place, v_place};
use crate::{Column, ExactBlock, KvDtype, SummaryKey, TileShape};

use super::PagedKv;
use super::microkernel::Ahead;

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

/// Keys of a block that count; the others do not exist, whatever they hold.
#[derive(Debug, Clone, Copy)]
pub(super) struct Only<'a> {
    /// 16 keys each: 0 for those that count, −∞ for the others.
    pub(super) hidden: &'a [Lane],
    /// Those that count, in order.
    pub(super) keys: &'a [u8],
}

/// Some keys of one KV head.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block<'a, E> {
    /// K, V and scales.
    pub(super) head: Head<'a, E>,
    /// Lanes of a V panel.
    pub(super) v_stride: usize,
    /// Added to the logits of 16 keys each; empty means 0.
    pub(super) bias: &'a [Lane],
    /// See [`Block::only`].
    only: Option<Only<'a>>,
    /// Keys, at most [`MAX_KEYS`].
    pub(super) keys: usize,
    /// Who sees them.
    pub(super) visibility: Visibility<'a>,
    /// The block that comes next, so that it can be asked for.
    pub(super) ahead: Option<Ahead>,
}

impl<'a, E: Element> Block<'a, E> {
    /// When only some of the keys count: of means, which are f32, so that other types need not even ask.
    #[inline(always)]
    pub(super) fn only(&self) -> Option<Only<'a>> {
        if E::DTYPE == KvDtype::F32 { self.only } else { None }
    }

    /// The keys of a tile, in place.
    #[inline(always)]
    pub(super) fn exact(
        block: &ExactBlock,
        tile: &'a Tile,
        kv_head: usize,
        next: Option<(&Tile, usize)>,
    ) -> Self {
        let head = tile.head::<E>(kv_head);
        let bytes = tile.shape().head_bytes();
        let ahead = next.map(|(tile, kv_head)| Ahead::new(tile.head_address(kv_head), bytes));
        Self {
            head,
            v_stride: tile.shape().block_tokens,
            bias: &[],
            only: None,
            keys: block.len as usize,
            visibility: Visibility::From(block.first_position),
            ahead,
        }
    }
}

/// Room for blocks that are put together from keys of several places.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    k: Vec<Line>,
    v: Vec<Line>,
    k_scales: Vec<Lane>,
    v_scales: Vec<Lane>,
    bias: Vec<Lane>,
    hidden: Vec<Lane>,
    counted: Vec<u8>,
}

impl Gathered {
    /// Gathers columns, at most `block_tokens` of them, as they are stored. `bias` is empty or theirs.
    pub(super) fn columns<'a, E: Element>(
        &'a mut self,
        kv: &dyn PagedKv,
        kv_head: usize,
        columns: &'a [Column],
        bias: &[f32],
    ) -> Block<'a, E> {
        let shape = kv.shape();
        let (dim, tokens) = (shape.head_dim, shape.block_tokens);
        // Nobody sees what else lies there.
        self.resize::<E>(&shape);
        let k = bytemuck::cast_slice_mut::<Line, [E; LANES]>(&mut self.k);
        let v = bytemuck::cast_slice_mut::<Line, [E; LANES]>(&mut self.v);
        for (key, column) in columns.iter().enumerate() {
            let from = kv.tile(column.tile as usize).head::<E>(kv_head);
            let offset = column.offset as usize;
            let to_k = &mut k[key / LANES * dim..][..dim];
            for (to, from) in to_k.iter_mut().zip(&from.k[offset / LANES * dim..][..dim]) {
                to[key % LANES] = from[offset % LANES];
            }
            let to_v = v[key..].iter_mut().step_by(tokens);
            to_v.zip(from.v[offset..].iter().step_by(tokens)).for_each(|(to, from)| *to = *from);
            if E::SCALED {
                self.k_scales.as_flattened_mut()[key] = from.k_scales.as_flattened()[offset];
                self.v_scales.as_flattened_mut()[key] = from.v_scales.as_flattened()[offset];
            }
        }
        refill(&mut self.bias, bias.len().div_ceil(LANES), [0.0; LANES]);
        self.bias.as_flattened_mut()[..bias.len()].copy_from_slice(bias);
        self.block(&shape, columns.len(), Visibility::At(columns))
    }

    /// Gathers summaries of one KV head, at most `block_tokens` of them.
    pub(super) fn summaries(&mut self, shape: &TileShape, summaries: &[&SummaryKey]) -> Block<'_, f32> {
        self.resize::<f32>(shape);
        self.k.fill(Line::zeroed());
        self.v.fill(Line::zeroed());
        refill(&mut self.bias, shape.block_tokens / LANES, [0.0; LANES]);
        for (key, summary) in summaries.iter().enumerate() {
            for (element, (&k, &v)) in summary.key.iter().zip(&summary.value).enumerate() {
                self.set(shape, key, element, k, v);
            }
            let bias = f64::from(summary.weight).log2() + f64::from(summary.bias);
            self.bias.as_flattened_mut()[key] = bias as f32;
        }
        self.block(shape, summaries.len(), Visibility::All)
    }

    /// Makes room for a tile's head, whatever it holds.
    fn resize<E: Element>(&mut self, shape: &TileShape) {
        let lines = |elements: usize| (elements * size_of::<E>()).div_ceil(size_of::<Line>());
        let scales = if E::SCALED { shape.block_tokens / LANES } else { 0 };
        self.k.resize(lines(shape.k_head_elements()), Line::zeroed());
        self.v.resize(lines(shape.v_head_elements()), Line::zeroed());
        self.k_scales.resize(scales, [0.0; LANES]);
        self.v_scales.resize(scales, [0.0; LANES]);
    }

    fn set<E: Element>(&mut self, shape: &TileShape, key: usize, element: usize, k: E, v: E) {
        bytemuck::cast_slice_mut(&mut self.k)[k_place(shape.head_dim, key, element)] = k;
        bytemuck::cast_slice_mut(&mut self.v)[v_place(shape.block_tokens, key, element)] = v;
    }

    fn block<'a, E: Element>(
        &'a self,
        shape: &TileShape,
        keys: usize,
        visibility: Visibility<'a>,
    ) -> Block<'a, E> {
        // Lines may end beyond the last lane.
        let (k, v) = (bytemuck::cast_slice(&self.k), bytemuck::cast_slice(&self.v));
        let head = Head {
            k: &k[..shape.k_head_elements() / LANES],
            v: &v[..shape.v_head_elements() / LANES],
            k_scales: &self.k_scales,
            v_scales: &self.v_scales,
        };
        let v_stride = shape.block_tokens;
        Block { head, v_stride, bias: &self.bias, only: None, keys, visibility, ahead: None }
    }

    /// Some keys of a tile of means, in place: bit `i` of `keys`, which is not 0, stands for key `first + i`, and `first` is
    /// a multiple of 16. `bias` is added to their logits. Panels before the first and after the last key that counts are left
    /// out; one in between is not: it is rare, and more panels at once are faster.
    pub(super) fn means<'a>(
        &'a mut self,
        tile: &'a Tile,
        kv_head: usize,
        first: u32,
        keys: u64,
        bias: f32,
    ) -> Block<'a, f32> {
        let shape = tile.shape();
        let skipped = keys.trailing_zeros() as usize / LANES;
        let (first, keys) = (first as usize / LANES + skipped, keys >> (skipped * LANES));
        let end = (u64::BITS - keys.leading_zeros()) as usize;
        let panels = end.div_ceil(LANES);
        refill(&mut self.bias, panels, [bias; LANES]);
        refill(&mut self.hidden, panels, [f32::NEG_INFINITY; LANES]);
        self.counted.clear();
        for key in (0..end).filter(|key| keys >> key & 1 == 1) {
            self.hidden.as_flattened_mut()[key] = 0.0;
            self.counted.push(key as u8);
        }
        let head = tile.head::<f32>(kv_head);
        Block {
            head: Head { k: &head.k[first * shape.head_dim..], v: &head.v[first * LANES..], ..head },
            v_stride: shape.block_tokens,
            bias: &self.bias,
            only: Some(Only { hidden: &self.hidden, keys: &self.counted }),
            keys: end,
            visibility: Visibility::All,
            ahead: None,
        }
    }
}

fn refill<T: Copy>(room: &mut Vec<T>, len: usize, value: T) {
    room.clear();
    room.resize(len, value);
}
