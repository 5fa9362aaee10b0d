//! Stripe summaries: what sparse attention knows about the full blocks of a sequence without reading them.

mod mean;

use std::ops::Range;

use crate::{Error, KvDtype, PagedKv, Promise, Tile, TileShape};

pub use mean::Mean;

/// Blocks of a stripe, at most: what a tile of summaries has room for.
pub(crate) const STRIPE_MAX: u32 = 256;

/// Keys of a tile of summaries: room for a stripe, in whole panels.
pub(crate) fn stripe_keys(stripe_blocks: u32) -> usize {
    stripe_blocks.next_power_of_two().max(16) as usize
}

/// Mean keys and values of consecutive full blocks of one sequence in one layer: one f32 tile a stripe, whose key `b` is the
/// mean of the stripe's block `b`. 1 / `block_tokens` of the elements of the keys and values.
///
/// Tile 0 is the stripe of the first block; in a stripe that began before it, the keys of earlier blocks are zero, and so are
/// those of blocks that are still to come: [`crate::Visit::Means`] names the keys that count.
#[derive(Debug, Clone)]
pub struct Summaries {
    /// Of the blocks' tiles.
    blocks: TileShape,
    /// Of the summaries' tiles.
    shape: TileShape,
    stripe_blocks: u64,
    first_block: u64,
    tiles: Vec<Tile>,
    /// Variances of the elements of keys, where `tiles` has their means; their values are zero.
    spreads: Vec<Tile>,
    keeps_spreads: bool,
    /// `[blocks][kv_heads]`.
    cosines: Vec<f32>,
}

/// Versions that the last tiles of [`Summaries`] get once all blocks up to one have their means ([`Summaries::promise`]).
#[derive(Debug, Default)]
pub struct PromisedMeans {
    tiles: Vec<Promise>,
    /// Where the blocks end.
    end: u64,
}

impl PromisedMeans {
    /// The version of each tile, in order; none where no block was promised.
    pub fn tiles(&self) -> &[Promise] {
        &self.tiles
    }
}

impl Summaries {
    /// None yet: those of tiles of `shape`, from block `first_block` (counted from the beginning of the sequence) on. Refuses
    /// an invalid shape and stripes of more than 256 blocks.
    pub fn new(shape: TileShape, stripe_blocks: u32, first_block: u64) -> Result<Self, Error> {
        shape.validate()?;
        if !(1..=STRIPE_MAX).contains(&stripe_blocks) {
            let problem = format!("is {stripe_blocks}, must be from 1 to {STRIPE_MAX}");
            return Err(Error::Invalid { field: "stripe_blocks", problem });
        }
        let own = TileShape { block_tokens: stripe_keys(stripe_blocks), dtype: KvDtype::F32, ..shape };
        own.validate()?;
        Ok(Self {
            blocks: shape,
            shape: own,
            stripe_blocks: u64::from(stripe_blocks),
            first_block,
            tiles: Vec::new(),
            spreads: Vec::new(),
            keeps_spreads: true,
            cosines: Vec::new(),
        })
    }

    /// Keeps no spreads, whose tiles are half of the memory, from now on: for policies that do not read them.
    #[must_use]
    pub fn without_spreads(mut self) -> Self {
        self.keeps_spreads = false;
        self.spreads.clear();
        self
    }

    /// Shape of the tiles of the blocks.
    pub fn block_shape(&self) -> TileShape {
        self.blocks
    }

    /// Blocks that have a mean, counted from the beginning of the sequence.
    pub fn blocks(&self) -> Range<u64> {
        let blocks = self.cosines.len() / self.shape.kv_heads;
        self.first_block..self.first_block + blocks as u64
    }

    /// Takes in the next block, which is full. Refuses another block than the next and a tile of another shape.
    pub fn push(&mut self, block: u64, tile: &Tile) -> Result<(), Error> {
        self.check_next(block)?;
        if tile.shape() != self.blocks {
            let problem = format!("has shape {:?}, must be {:?}", tile.shape(), self.blocks);
            return Err(Error::Invalid { field: "tile", problem });
        }
        self.insert(block, &Mean::of(tile))
    }

    /// Takes in the mean of the next block, computed elsewhere. Refuses another block than the next and a mean of another
    /// shape.
    pub fn insert(&mut self, block: u64, mean: &Mean) -> Result<(), Error> {
        self.check_next(block)?;
        if mean.shape() != (self.shape.kv_heads, self.shape.head_dim) {
            let wanted = (self.shape.kv_heads, self.shape.head_dim);
            let problem = format!("has shape {:?}, must be {wanted:?} (KV heads, head size)", mean.shape());
            return Err(Error::Invalid { field: "mean", problem });
        }
        let (tile, key) = self.place(block);
        if tile == self.tiles.len() {
            self.tiles.push(Tile::zeroed(self.shape));
        }
        self.tiles[tile].write(key, mean.key(), mean.value())?;
        if self.keeps_spreads {
            if tile == self.spreads.len() {
                self.spreads.push(Tile::zeroed(self.shape));
            }
            self.spreads[tile].write(key, mean.spread(), &vec![0.0; mean.spread().len()])?;
        }
        self.cosines.extend_from_slice(mean.cosines());
        Ok(())
    }

    /// Versions for the last tiles as they are going to be once all blocks up to `end` have their means; none where they have. Tiles of stripes
    /// that have no mean yet are zero. Until [`Self::keep`] all tiles have the versions and the bytes that they had.
    pub fn promise(&mut self, end: u64) -> PromisedMeans {
        let next = self.blocks().end;
        if end <= next {
            return PromisedMeans::default();
        }
        let (first, last) = (self.place(next).0, self.place(end - 1).0);
        let shape = self.shape;
        self.tiles.resize_with(self.tiles.len().max(last + 1), || Tile::zeroed(shape));
        PromisedMeans { tiles: (first..=last).map(|_| Tile::promise()).collect(), end }
    }

    /// The means of the blocks that were promised came: the last tiles get the versions. Refuses versions for other blocks than those up to the
    /// last that has its mean.
    pub fn keep(&mut self, promised: PromisedMeans) -> Result<(), Error> {
        let PromisedMeans { tiles, end } = promised;
        if tiles.is_empty() {
            return Ok(());
        }
        let blocks = self.blocks();
        if blocks.end != end || blocks.is_empty() {
            let problem = format!("are for the blocks up to {end}, those of {blocks:?} have means");
            return Err(Error::Invalid { field: "promised", problem });
        }
        let last = self.place(end - 1).0;
        for (tile, promise) in self.tiles[..=last].iter_mut().rev().zip(tiles.into_iter().rev()) {
            tile.keep(promise);
        }
        Ok(())
    }

    /// Variances of the elements of the blocks' keys, as keys of tiles in the same places; the values are zero.
    pub fn spreads(&self) -> Spreads<'_> {
        Spreads(self)
    }

    /// Mean cosine of the block's keys with their mean (see [`Mean::cosines`]).
    ///
    /// # Panics
    /// When the block is none of [`Self::blocks`] or there is no such KV head.
    pub fn cosine(&self, block: u64, kv_head: usize) -> f32 {
        let (blocks, heads) = (self.blocks(), self.shape.kv_heads);
        assert!(blocks.contains(&block) && kv_head < heads, "block {block} of {blocks:?}, KV head {kv_head}");
        self.cosines[(block - self.first_block) as usize * heads + kv_head]
    }

    /// Tile and key where a block from the first on has its mean.
    pub fn place(&self, block: u64) -> (usize, usize) {
        let stripe = block / self.stripe_blocks - self.first_block / self.stripe_blocks;
        (stripe as usize, (block % self.stripe_blocks) as usize)
    }

    fn check_next(&self, block: u64) -> Result<(), Error> {
        let next = self.blocks().end;
        if block != next {
            return Err(Error::Invalid { field: "block", problem: format!("is {block}, must be {next}") });
        }
        Ok(())
    }
}

impl PagedKv for Summaries {
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

/// See [`Summaries::spreads`].
#[derive(Debug, Clone, Copy)]
pub struct Spreads<'a>(&'a Summaries);

impl PagedKv for Spreads<'_> {
    fn shape(&self) -> TileShape {
        self.0.shape
    }

    fn len(&self) -> usize {
        self.0.spreads.len()
    }

    fn tile(&self, index: usize) -> &Tile {
        &self.0.spreads[index]
    }
}

#[cfg(test)]
mod tests;
