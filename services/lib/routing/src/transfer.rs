//! Whether queries travel to KV or KV to queries.

#[cfg(test)]
mod tests;

/// Shapes that decide how many bytes a layer's attention over a remote prefix moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransferShape {
    /// Query heads of a layer.
    pub query_heads: u32,
    /// Elements of one head.
    pub head_dim: u32,
    /// Blocks of a stripe.
    pub stripe_blocks: u32,
    /// Bytes of K and V of one block in one layer, scales included.
    pub tile_bytes: u64,
}

/// What moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Queries go to the shards and partials come back.
    Ship,
    /// Tiles of the prefix come here, and attention is local.
    Fetch,
}

impl TransferShape {
    /// Bytes per layer when queries are shipped: every row goes out once as f32, and a partial (m, l, o) of every row comes back
    /// once per stripe, since a stripe's partial must not depend on who owns the next stripe:
    /// `rows · query_heads · (d + stripes · (d + 2)) · 4`.
    pub fn ship_bytes(&self, rows: u64, prefix_blocks: u64) -> u64 {
        let stripes = u128::from(prefix_blocks.div_ceil(u64::from(self.stripe_blocks.max(1))));
        if stripes == 0 {
            return 0;
        }
        let d = u128::from(self.head_dim);
        narrow((u128::from(rows) * u128::from(self.query_heads)).saturating_mul((d + stripes * (d + 2)) * 4))
    }

    /// Bytes per layer when the prefix is fetched: `prefix_blocks · tile_bytes`, however many rows then use it.
    pub fn fetch_bytes(&self, prefix_blocks: u64) -> u64 {
        prefix_blocks.saturating_mul(self.tile_bytes)
    }
}

/// The cheaper way to attend from `rows` query positions to a prefix of `prefix_blocks` remote blocks, by bytes per layer.
/// `rows` counts every position that will attend to this prefix, over all chunks of the prompt: fetched tiles stay, shipped
/// queries are new each time. Equal bytes ship, because that takes no memory here.
///
/// With heads of 64 elements, 9 query heads over 3 KV heads, f16 and stripes of 32 blocks of 64 tokens, a stripe costs 1.5 MiB
/// to fetch and 4.6 KiB a row to ship: fetching wins from about 340 rows on.
pub fn ship_or_fetch(rows: u64, prefix_blocks: u64, shape: &TransferShape) -> Choice {
    if shape.fetch_bytes(prefix_blocks) < shape.ship_bytes(rows, prefix_blocks) {
        Choice::Fetch
    } else {
        Choice::Ship
    }
}

fn narrow(bytes: u128) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}
