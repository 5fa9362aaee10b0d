//! Work lists of sparse attention: one per KV head and query tile, as compressed rows.

use std::ops::Range;

use crate::{Column, Error, ExactBlock, PagedKv, Partials, Queries};

/// Positions of a query tile. Tiles lie on a grid: `[32 k, 32 k + 32)`, whatever the chunk.
pub const QUERY_TILE: usize = 32;

/// One thing that a list visits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visit {
    /// Keys of a tile, up to each row's own position.
    Block(ExactBlock),
    /// Gathered keys `[first, first + count)` of [`SparseWork::columns`], at most `block_tokens` of them.
    Columns {
        /// First of them.
        first: u32,
        /// How many.
        count: u32,
    },
    /// Means of blocks: keys of a tile of the summaries, each standing for `block_tokens` keys. Visible to all rows.
    Means {
        /// Index of the tile in the summaries.
        tile: u32,
        /// Key that bit 0 of `keys` stands for; a multiple of 16.
        first: u32,
        /// Which keys count; at least one.
        keys: u64,
    },
    /// What was visited since the last one (or the beginning) is one stripe: it is folded onto the total.
    EndOfStripe,
}

/// Lists of all (KV head, query tile) pairs of a call. The rows of the tiles follow each other from row 0 on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SparseWork {
    kv_heads: usize,
    /// End of each tile's rows.
    row_ends: Vec<u32>,
    /// `[kv_heads][tiles]`: end of each list in `visits`.
    list_ends: Vec<u32>,
    visits: Vec<Visit>,
    columns: Vec<Column>,
}

impl SparseWork {
    /// Puts lists together, `[kv_heads][tiles]`, each with its own columns; `row_ends` are the ends of the tiles' rows.
    /// Refuses lists that are too few or too many, and more visits or columns than 2^32.
    pub fn new(
        kv_heads: usize,
        row_ends: Vec<u32>,
        lists: Vec<(Vec<Visit>, Vec<Column>)>,
    ) -> Result<Self, Error> {
        let invalid = |field, problem: String| Err(Error::Invalid { field, problem });
        if lists.len() != kv_heads * row_ends.len() {
            let problem = format!("are {}, must be {kv_heads} × {}", lists.len(), row_ends.len());
            return invalid("lists", problem);
        }
        if !row_ends.is_sorted_by(|a, b| a < b) || row_ends.first() == Some(&0) {
            return invalid("row_ends", "do not ascend from above 0".to_owned());
        }
        let mut work = Self { kv_heads, row_ends, ..Self::default() };
        for (visits, columns) in lists {
            let before = work.columns.len() as u32;
            work.columns.extend(columns);
            work.visits.extend(visits.into_iter().map(|visit| match visit {
                Visit::Columns { first, count } => {
                    Visit::Columns { first: first.wrapping_add(before), count }
                }
                other => other,
            }));
            work.list_ends.push(work.visits.len() as u32);
            if u32::try_from(work.visits.len().max(work.columns.len())).is_err() {
                return invalid("lists", "have more than 2^32 entries".to_owned());
            }
        }
        Ok(work)
    }

    /// KV heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Query tiles.
    pub fn tiles(&self) -> usize {
        self.row_ends.len()
    }

    /// Rows (positions) of a tile.
    pub fn rows(&self, tile: usize) -> Range<usize> {
        let start = if tile == 0 { 0 } else { self.row_ends[tile - 1] };
        start as usize..self.row_ends[tile] as usize
    }

    /// What a KV head of a tile visits, in order.
    pub fn list(&self, kv_head: usize, tile: usize) -> &[Visit] {
        let index = kv_head * self.tiles() + tile;
        let start = if index == 0 { 0 } else { self.list_ends[index - 1] };
        &self.visits[start as usize..self.list_ends[index] as usize]
    }

    /// Gathered keys that [`Visit::Columns`] name.
    pub fn columns(&self) -> &[Column] {
        &self.columns
    }
}

/// One sequence's part of a sparse attention call.
#[derive(Clone, Copy)]
pub struct SparseItem<'a> {
    /// Rotated query rows.
    pub queries: Queries<'a>,
    /// Keys and values.
    pub kv: &'a dyn PagedKv,
    /// Means of blocks, in f32 tiles of as many keys as a stripe has blocks.
    pub summaries: &'a dyn PagedKv,
    /// What to visit.
    pub work: &'a SparseWork,
    /// Partial of all stripes before those of the lists; `None` is the identity.
    pub earlier: Option<&'a Partials>,
    /// Partial of the blocks before those of the lists in the first stripe of the lists.
    pub stripe: Option<&'a Partials>,
    /// Skip-softmax (BLASST): blocks whose every logit lies so far (base 2, > 0) under the running maximum of its row, for
    /// all rows that are computed together, may be left out.
    pub skip_below: Option<f32>,
}
