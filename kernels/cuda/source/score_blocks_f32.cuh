#if DTYPE == DTYPE_F32
// Scores by fused multiply-adds over the elements in order, as on the CPU: a lane has one block and 8 rows.

// Blocks that a warp scores together.
const u32 BLOCKS = 32;
const u32 ROWS_AT_ONCE = 8;

DEVICE u32 query_bytes(u32 rows) { return rows * HEAD_DIM * 4; }

DEVICE void load_queries(const Params& p, const Tile& tile, u8* shared) {
    for (u32 index = thread_index(); index < tile.rows * HEAD_DIM; index += block_threads()) {
        const f32* from = reinterpret_cast<const f32*>(p.queries) + query_at(p, tile, index / HEAD_DIM);
        reinterpret_cast<f32*>(shared)[index] = from[index % HEAD_DIM];
    }
}

// Scores of rows [first, first + 8) against the block of each lane.
struct Scores {
    f32 t[ROWS_AT_ONCE];

    DEVICE_MEMBER void multiply(const f32* mean, const f32* q, f32 scale) {
        UNROLL for (u32 i = 0; i < ROWS_AT_ONCE; ++i) t[i] = 0.0f;
        for (u32 element = 0; element < HEAD_DIM; element += 4) {
            uint4x k = *reinterpret_cast<const uint4x*>(mean + element);
            UNROLL for (u32 i = 0; i < ROWS_AT_ONCE; ++i) {
                uint4x x = *reinterpret_cast<const uint4x*>(q + i * HEAD_DIM + element);
                t[i] = fmaf(from_bits(x.x), from_bits(k.x), t[i]);
                t[i] = fmaf(from_bits(x.y), from_bits(k.y), t[i]);
                t[i] = fmaf(from_bits(x.z), from_bits(k.z), t[i]);
                t[i] = fmaf(from_bits(x.w), from_bits(k.w), t[i]);
            }
        }
        UNROLL for (u32 i = 0; i < ROWS_AT_ONCE; ++i) t[i] *= scale;
    }
};

DEVICE const f32* mean_of(const Params& p, const Tile& tile, u32 block) {
    u32 exists = block < tile.scored ? block : 0;
    return reinterpret_cast<const f32*>(mean_at(p, tile, exists, 4));
}

// Adds the blocks from `first` on to the sums of the rows, `sums` [rows] of the warp.
DEVICE void add_rows(const Params& p, const Tile& tile, u32 first, const u8* shared, LogSum* sums) {
    const f32* mean = mean_of(p, tile, first + lane());
    bool exists = first + lane() < tile.scored;
    for (u32 row = 0; row < tile.rows; row += ROWS_AT_ONCE) {
        Scores scores;
        scores.multiply(mean, reinterpret_cast<const f32*>(shared) + row * HEAD_DIM, p.scale);
        for (u32 i = 0; i < ROWS_AT_ONCE; ++i) {
            f32 t = exists ? scores.t[i] : negative_infinity(), top = reduce_max(t);
            f32 sum = reduce_add(exp2_approx(t - (top == negative_infinity() ? 0.0f : top)));
            if (lane() == 0) sums[row + i].add(top, sum);
        }
    }
}

DEVICE void score(const Params& p, const Tile& tile, u32 first, const u8* shared, const f32* offsets) {
    const f32* mean = mean_of(p, tile, first + lane());
    LogSum energy;
    energy.clear();
    for (u32 row = 0; row < tile.rows; row += ROWS_AT_ONCE) {
        Scores scores;
        scores.multiply(mean, reinterpret_cast<const f32*>(shared) + row * HEAD_DIM, p.scale);
        UNROLL for (u32 i = 0; i < ROWS_AT_ONCE; ++i) energy.add(scores.t[i] - offsets[row + i], 1.0f);
    }
    store(p, tile, first + lane(), energy);
}
#endif
