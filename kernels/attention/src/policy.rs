//! Prefill policies: which blocks of its prefix a query tile visits. They own no memory and no threads.

use crate::{PagedKv, Queries};

/// What a plan is made from.
#[derive(Clone, Copy)]
pub struct PlanInput<'a> {
    /// Rotated query rows of one sequence.
    pub queries: Queries<'a>,
    /// Layer, from 0.
    pub layer: usize,
    /// Tiles of the sequence in this layer; tile `i` is block `first_block + i`. Those of the rows are written.
    pub kv: &'a dyn PagedKv,
    /// Block of tile 0.
    pub first_block: u64,
    /// Means of full blocks; tile `s` is stripe `first_block / stripe_blocks + s`.
    pub summaries: &'a dyn PagedKv,
    /// Blocks of a stripe.
    pub stripe_blocks: u32,
    /// Rows from this position on are exact.
    pub dense_from: u64,
}

/// How a prompt is attended to.
#[derive(Debug, Clone, PartialEq)]
pub struct PrefillPolicy {
    // Filled in by the policies' own modules.
}
