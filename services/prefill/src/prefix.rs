//! Whether a cached prefix is fetched, or queries are shipped to it.

use longshore_attention::{PolicyReads, PrefillPolicy};
use longshore_engine::Engine;
use longshore_routing::{Choice, TransferShape};

use crate::{Config, PrefixPolicy};

/// What a prompt would move and hold.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    /// Blocks of the cached prefix.
    pub(crate) prefix_blocks: u64,
    /// Positions still to compute.
    pub(crate) rows: u64,
    /// Blocks of a chunk.
    pub(crate) chunk_blocks: u64,
}

/// How the prefix is attended to. Fetching must also leave room for the first chunk. A policy that reads all keys while it selects needs
/// the prefix here whatever the settings say, and was refused where it does not fit. What a sparse policy will visit is not known
/// beforehand: its partials are counted as if every list visited every stripe.
pub(crate) fn choose(config: &Config, engine: &Engine, policy: &PrefillPolicy, budget: Budget) -> Choice {
    let reads = policy.reads();
    if reads.all_keys {
        return Choice::Fetch;
    }
    let fetched_bytes = (budget.prefix_blocks + budget.chunk_blocks) * block_bytes(engine);
    let fits = fetched_bytes <= config.local_kv_bytes;
    match config.prefix {
        PrefixPolicy::Ship => Choice::Ship,
        PrefixPolicy::Fetch | PrefixPolicy::Auto if !fits => Choice::Ship,
        PrefixPolicy::Fetch => Choice::Fetch,
        PrefixPolicy::Auto => cheaper(engine, &reads, budget),
    }
}

/// By bytes per layer; equal bytes ship, because that takes less memory here.
fn cheaper(engine: &Engine, reads: &PolicyReads, budget: Budget) -> Choice {
    let heads = engine.backend().config().heads;
    let shape = TransferShape {
        query_heads: heads.query_heads() as u32,
        head_dim: heads.head_dim as u32,
        stripe_blocks: engine.geometry().stripe_blocks(),
        tile_bytes: engine.tile_shape().bytes() as u64,
    };
    let summary_bytes = budget.prefix_blocks * sent_summary_bytes(engine, reads);
    let ship_bytes = shape.ship_bytes(budget.rows, budget.prefix_blocks).saturating_add(summary_bytes);
    if shape.fetch_bytes(budget.prefix_blocks) < ship_bytes { Choice::Fetch } else { Choice::Ship }
}

/// Bytes of a block's tiles in all layers.
pub(crate) fn block_bytes(engine: &Engine) -> u64 {
    (engine.tile_shape().bytes() * engine.backend().config().layers) as u64
}

/// Bytes of a block's summary as it travels, in one layer.
fn sent_summary_bytes(engine: &Engine, reads: &PolicyReads) -> u64 {
    let shape = engine.tile_shape();
    let parts = [reads.means, reads.values, reads.spreads].into_iter().filter(|part| *part).count();
    let elements = shape.kv_heads * (shape.head_dim * parts + usize::from(reads.cosines));
    (elements * size_of::<f32>()) as u64
}

/// Bytes of a block's summary as a worker keeps it, in all layers: keys and values, and beside spreads zeros in place of values.
pub(crate) fn kept_summary_bytes(engine: &Engine, reads: &PolicyReads) -> u64 {
    let shape = engine.tile_shape();
    let parts = 2 * (usize::from(reads.means) + usize::from(reads.spreads));
    (shape.kv_heads * shape.head_dim * parts * size_of::<f32>() * engine.backend().config().layers) as u64
}
