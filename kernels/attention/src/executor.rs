//! Runs work lists. The canonical order of arithmetic makes a result independent of tiling, batching, threads and of where
//! a sequence lies: one partial per block (keys in order), folded left over the blocks of a work list in list order.

use crate::{Error, Partials, Queries, Tile, TileShape, WorkList};

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

/// Runs work lists on some device.
pub trait Executor: Send + Sync + std::fmt::Debug {
    /// One partial per item. Validates every index, length and shape before it computes.
    fn attend(&self, items: &[AttendItem<'_>]) -> Result<Vec<Partials>, Error>;
}

/// The CPU executor; uses the rayon pool that the caller runs in.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuExecutor;

impl Executor for CpuExecutor {
    fn attend(&self, _items: &[AttendItem<'_>]) -> Result<Vec<Partials>, Error> {
        todo!()
    }
}
