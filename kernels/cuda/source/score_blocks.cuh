// What the blocks before a query tile weigh in it, judged by their mean keys: log2 of the sum over the tile's rows of 2^(logit − what the
// row takes off). With `normalise`, a row takes off log2 of its own sum over the scored blocks, which a first pass finds. A thread block
// scores all blocks of one KV head for one query tile. Matrices have blocks on the 16-wide side, rows on the 8-wide.
//
// Parts, in this order: score_blocks.cuh, score_blocks_f32.cuh (DTYPE 0), score_blocks_mma.cuh (DTYPE 1 and 2), score_blocks.cu.
//
// DTYPE: of queries and means, 0 to 2. HEAD_DIM. WARPS. BLOCK_TILES: 16 blocks each that a warp scores together.

struct Params {
    u64 queries;         // DTYPE [rows][query heads][HEAD_DIM]
    u64 means;           // u64 addresses of pages of DTYPE, whose K are the mean keys of the blocks of a stripe
    u64 energies;        // f32 [kv_heads][tiles][stride]
    u64 peaks;           // the same: log2 of the largest share that a row gives; or 0
    u64 first_position;  // of tile 0
    u32 first_row;       // of tile 0 among the queries
    u32 kv_heads;
    u32 group;
    u32 stripe_blocks;
    u32 page_keys;       // of a page of means
    u32 stride;
    u32 tokens;          // of a block
    f32 scale;           // of logits, base 2
    u32 normalise;
    u32 unused;
};

// Positions of a query tile.
const u32 TILE = 32;

// log2 of a sum of powers, as it grows.
struct LogSum {
    f32 top;
    f32 sum;

    DEVICE_MEMBER void clear() {
        top = negative_infinity();
        sum = 0.0f;
    }
    // Takes in a sum of powers relative to `later_top`.
    DEVICE_MEMBER void add(f32 later_top, f32 later_sum) {
        f32 most = fmaxf(top, later_top), base = most == negative_infinity() ? 0.0f : most;
        sum = fmaf(sum, exp2_approx(top - base), later_sum * exp2_approx(later_top - base));
        top = most;
    }
    DEVICE_MEMBER f32 log() const { return top + log2_approx(sum); }
};

// A query tile of one KV head.
struct Tile {
    u32 index;
    u32 kv_head;
    u32 scored;  // blocks that end before it
    u32 rows;    // group × TILE: row r is query head r / TILE of the group, position r % TILE
};

DEVICE Tile tile_of(const Params& p) {
    Tile tile;
    // The last tiles have the most before them: they come first.
    tile.index = grid_blocks_x() - 1 - block_index_x();
    tile.kv_head = block_index_y();
    tile.scored = static_cast<u32>((p.first_position + u64(tile.index) * TILE) / p.tokens);
    tile.rows = p.group * TILE;
    return tile;
}

// First element of a row among the queries.
DEVICE u64 query_at(const Params& p, const Tile& tile, u32 row) {
    u64 position = p.first_row + u64(tile.index) * TILE + row % TILE;
    return (position * p.kv_heads * p.group + tile.kv_head * p.group + row / TILE) * HEAD_DIM;
}

// First byte of the mean key of a block that is scored: a page has the K and V of one KV head after the other.
DEVICE u64 mean_at(const Params& p, const Tile& tile, u32 block, u32 element_bytes) {
    u64 page = reinterpret_cast<const u64*>(p.means)[block / p.stripe_blocks];
    u32 row = tile.kv_head * 2 * p.page_keys + block % p.stripe_blocks;
    return page + u64(row) * (HEAD_DIM * element_bytes);
}

DEVICE void store(const Params& p, const Tile& tile, u32 block, const LogSum& energy) {
    if (block >= tile.scored) return;
    u64 at = (u64(tile.kv_head) * grid_blocks_x() + tile.index) * p.stride + block;
    reinterpret_cast<f32*>(p.energies)[at] = energy.log();
    if (p.peaks) reinterpret_cast<f32*>(p.peaks)[at] = energy.top;
}
