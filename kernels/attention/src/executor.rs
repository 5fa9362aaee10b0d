//! Runs work lists: what an executor is, and the one for the CPU.
//!
//! # Canonical arithmetic
//!
//! The bits of a row's result depend on the row, the keys that it sees and their division into blocks; on nothing else.
//! All of it is f32; `fma(a, b, c)` is `a * b + c`, rounded once.
//!
//! 1. A **block** is one entry of `exact` (its keys in order), then each run of `block_tokens` entries of `columns`, then
//!    each run of `block_tokens` entries of `summaries` that belong to the KV head, all in list order.
//! 2. Logits: `s = fma(q[i], k[i], s)` from 0 over the elements in order; `t = fma(s, scale * log2(e), b)`, where `b` is 0
//!    or, for a summary, the f32 nearest to `log2(weight)`. Elements of f16 tiles are widened, which is exact.
//! 3. Keys after the row's position do not take part: neither their logits nor their values enter any arithmetic.
//! 4. Block partial: `m` is the largest `t` (never −0); `p = exp2(t - m)`; `l` adds the `p` of keys 0, 16, 32, … of the
//!    block in order, likewise 1, 17, …, and the 16 sums pairwise (distance 8, 4, 2, 1); `o[i] = fma(p, v[i], o[i])` from 0
//!    over the keys in order. A block without a visible key is the identity.
//! 5. Block partials are folded in order onto `initial`, by the arithmetic of [`Partials::merge`].
//!
//! So rows, items, threads, padding and keys that a row does not see change no bit, and a fold may be cut between two
//! blocks and continued through [`AttendItem::initial`].

mod block;
mod check;
mod microkernel;
mod row_tile;

use rayon::prelude::*;

use crate::{Error, Partials, Queries, Tile, TileShape, WorkList};
use row_tile::{RowTile, Scratch};

/// A paged KV source: the tiles of one sequence in one layer.
pub trait PagedKv: Sync {
    /// Shape of every tile.
    fn shape(&self) -> TileShape;
    /// Number of tiles.
    fn len(&self) -> usize;
    /// True when there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The tile at `index` < len.
    fn tile(&self, index: usize) -> &Tile;
}

/// One sequence's part of an attention call.
#[derive(Clone, Copy)]
pub struct AttendItem<'a> {
    /// Rotated query rows.
    pub queries: Queries<'a>,
    /// Keys and values.
    pub kv: &'a dyn PagedKv,
    /// What to visit.
    pub work: &'a WorkList,
    /// Partial to fold onto (keys that come before the work list's); `None` is the identity.
    pub initial: Option<&'a Partials>,
}

impl std::fmt::Debug for AttendItem<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AttendItem")
            .field("queries", &self.queries.shape)
            .field("tiles", &self.kv.len())
            .field("exact", &self.work.exact.len())
            .field("columns", &self.work.columns.len())
            .field("summaries", &self.work.summaries.len())
            .field("continues", &self.initial.is_some())
            .finish()
    }
}

/// Runs work lists on some device.
pub trait Executor: Send + Sync + std::fmt::Debug {
    /// One partial per item. Validates every index, length and shape before it computes.
    fn attend(&self, items: &[AttendItem<'_>]) -> Result<Vec<Partials>, Error>;
}

/// The CPU executor; uses the rayon pool that the caller runs in.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuExecutor;

impl Executor for CpuExecutor {
    fn attend(&self, items: &[AttendItem<'_>]) -> Result<Vec<Partials>, Error> {
        items.iter().try_for_each(check::check)?;
        let mut partials: Vec<Partials> = items.iter().map(start).collect();
        let tasks: Vec<Task> =
            items.iter().enumerate().flat_map(|(index, item)| tasks(index, item)).collect();
        let results: Vec<RowTile> = tasks
            .par_iter()
            .with_max_len(1)
            .map_init(Scratch::default, |scratch, task| {
                row_tile::run(&items[task.item], task.kv_head, task.first_row, scratch)
            })
            .collect();
        for (task, rows) in tasks.iter().zip(&results) {
            rows.store(&mut partials[task.item], task.kv_head, items[task.item].queries.shape.group);
        }
        Ok(partials)
    }
}

/// A row tile of one KV head of one item: what one thread does at a time.
#[derive(Debug, Clone, Copy)]
struct Task {
    item: usize,
    kv_head: usize,
    /// First packed row.
    first_row: usize,
}

/// What the item's result is before any block is folded onto it.
fn start(item: &AttendItem<'_>) -> Partials {
    let shape = item.queries.shape;
    item.initial
        .cloned()
        .unwrap_or_else(|| Partials::identity(item.queries.rows(), shape.query_heads(), shape.head_dim))
}

/// Late row tiles see the most keys, so they come first.
fn tasks(index: usize, item: &AttendItem<'_>) -> impl Iterator<Item = Task> {
    let shape = item.queries.shape;
    let tiles = (item.queries.rows() * shape.group).div_ceil(row_tile::ROWS);
    (0..tiles).rev().flat_map(move |tile| {
        let first_row = tile * row_tile::ROWS;
        (0..shape.kv_heads).map(move |kv_head| Task { item: index, kv_head, first_row })
    })
}
