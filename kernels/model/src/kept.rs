//! Attention over rows that a device keeps: what an executor on the device of a backend offers beside [`longshore_attention::Executor`], so
//! that queries and outputs need not visit the host between the forward pass and attention.

use std::ops::Range;

use longshore_attention::{
    Error, HeadShape, PagedKv, PlanInput, PrefillPolicy, Promise, Summaries, Tile, TileShape,
};

use crate::Activations;

/// What the rows of a part visit.
#[derive(Clone, Copy)]
pub enum KeptVisits<'a> {
    /// All keys up to their own position. Tile 0 of `kv` begins at `first_key`; those of the rows are written, or promised.
    All {
        /// Tiles of the sequence in this layer.
        kv: &'a dyn PagedKv,
        /// Position of its first key.
        first_key: u64,
        /// Versions of the last tiles, which are not written yet: [`KeptAttention::append_kept`] made their pages. As many as there are, in order,
        /// up to the tile of the last row.
        promised: &'a [Promise],
    },
    /// What a policy says; the queries of the input have no data.
    By {
        /// The policy.
        policy: &'a PrefillPolicy,
        /// Everything else that it is made from.
        input: &'a PlanInput<'a>,
        /// What of it is not written yet.
        promised: Promised<'a>,
    },
}

/// Versions of tiles that are not written yet: of the last ones, as many as there are, in order.
#[derive(Debug, Clone, Copy, Default)]
pub struct Promised<'a> {
    /// Of keys and values, up to the tile of the last row; [`KeptAttention::append_kept`] made their pages.
    pub tiles: &'a [Promise],
    /// Of means; [`KeptAttention::append_means`] made their pages.
    pub means: &'a [Promise],
}

impl std::fmt::Debug for KeptVisits<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::All { kv, first_key, promised } => f
                .debug_struct("All")
                .field("tiles", &kv.len())
                .field("first_key", first_key)
                .field("promised", &promised.len())
                .finish(),
            Self::By { policy, input, promised } => f
                .debug_struct("By")
                .field("policy", policy)
                .field("input", input)
                .field("promised", promised)
                .finish(),
        }
    }
}

/// Consecutive rows of one sequence.
#[derive(Debug, Clone)]
pub struct KeptPart<'a> {
    /// Rows of the queries.
    pub rows: Range<usize>,
    /// Position of the first.
    pub first_position: u64,
    /// Where their keys are, and which they visit.
    pub visits: KeptVisits<'a>,
}

/// Consecutive rows of one sequence whose keys and values become pages before their tiles are written.
#[derive(Debug, Clone)]
pub struct KeptAppend<'a> {
    /// Rows of the keys and values.
    pub rows: Range<usize>,
    /// Which token of the first of `tiles` the first row becomes; those before it are in that tile.
    pub offset: usize,
    /// The tiles that the rows go to, as they are without them.
    pub tiles: Vec<&'a Tile>,
    /// The version that each of them gets when the rows are written to it.
    pub promised: &'a [Promise],
}

/// Means of blocks whose tiles are not written yet.
#[derive(Debug, Clone, Copy)]
pub struct KeptMeans<'a> {
    /// Shape of the blocks' tiles.
    pub tile: TileShape,
    /// Promised versions of consecutive full blocks, whose pages [`KeptAttention::append_kept`] made.
    pub blocks: &'a [Promise],
    /// The first of these blocks, counted from the beginning of the sequence: the next that has no mean.
    pub first_block: u64,
    /// The means, as they are without these blocks.
    pub summaries: &'a Summaries,
    /// Whether means stand for blocks that are not visited.
    pub visited: bool,
    /// The version that each of the last tiles of means gets with these blocks ([`Summaries::promise`]).
    pub promised: &'a [Promise],
}

/// An executor that takes rows where a backend of its device leaves them.
pub trait KeptAttention: Send + Sync + std::fmt::Debug {
    /// Attention of the rows of `q`, f32 `[rows, query_heads * head_dim]`, rotated; each is in one of `parts`. What comes out has the same shape,
    /// for [`crate::Backend::finish_kept`]; nobody waits for it. `None`: the rows are not on this device, or another way is better or needs
    /// less room: by [`longshore_attention::Executor`], with queries of the host.
    fn attend_kept(
        &self,
        shape: (HeadShape, f32),
        q: &Activations,
        parts: &[KeptPart<'_>],
    ) -> Result<Option<Activations>, Error>;

    /// Writes keys and values, f32 `[rows, kv_heads * head_dim]` each, into pages under promised versions, as tiles will have them, bit for bit;
    /// each row is in one of `parts`. Nobody waits for it. False: the rows are not on this device, or there are no pages for them, and nothing
    /// has a promised version.
    fn append_kept(
        &self,
        _k: &Activations,
        _v: &Activations,
        _parts: &[KeptAppend<'_>],
    ) -> Result<bool, Error> {
        Ok(false)
    }

    /// Makes means of full blocks, out of pages of [`Self::append_kept`], into pages under promised versions, as tiles of means will have them, bit for
    /// bit. Nobody waits for it. False: there are no pages for them, and nothing has a promised version.
    fn append_means(&self, _means: &KeptMeans<'_>) -> Result<bool, Error> {
        Ok(false)
    }
}
