#if DTYPE != DTYPE_F32
// Scores by matrix instructions. Which elements a lane has of a step is free, as long as both operands have the same: eight in a row of
// every 32, so that means come straight from global memory, 16 bytes a lane, and queries from shared memory likewise.

// Blocks that a warp scores together.
const u32 BLOCKS = 16 * BLOCK_TILES;
// Groups of 32 elements, the last filled up with zeros.
const u32 STEPS = (HEAD_DIM + 31) / 32;
const u32 VECTORS = HEAD_DIM / 8;
// Vectors of 16 bytes from row to row, 4 more than a multiple of 8: two rows of four lie in different banks.
const u32 PITCH = (STEPS * 4 + 3) / 8 * 8 + 4;
// Rows of 8 that are multiplied together: those of one query head.
const u32 ROW_TILES = TILE / 8;

DEVICE u32 query_bytes(u32 rows) { return rows * PITCH * 16; }

DEVICE void load_queries(const Params& p, const Tile& tile, u8* shared) {
    for (u32 index = thread_index(); index < tile.rows * STEPS * 4; index += block_threads()) {
        u32 row = index / (STEPS * 4), part = index % (STEPS * 4);
        const u16* from = reinterpret_cast<const u16*>(p.queries) + query_at(p, tile, row);
        uint4x vector = {0, 0, 0, 0};
        if (part < VECTORS) vector = reinterpret_cast<const uint4x*>(from)[part];
        reinterpret_cast<uint4x*>(shared)[row * PITCH + part] = vector;
    }
}

// Means of BLOCKS blocks: with g = lane / 4, a lane has parts of blocks g and g + 8 of each 16. Loaded word by word, into the registers in
// which matrix instructions want them: vectors would have to be taken apart for every query head.
struct Means {
    u32 a[BLOCK_TILES][2 * STEPS][4];

    DEVICE_MEMBER void load(const Params& p, const Tile& tile, u32 first) {
        UNROLL for (u32 i = 0; i < BLOCK_TILES; ++i) {
            UNROLL for (u32 half = 0; half < 2; ++half) {
                u32 block = first + i * 16 + half * 8 + lane() / 4;
                const u32* from = reinterpret_cast<const u32*>(mean_at(p, tile, block < tile.scored ? block : 0, 2));
                UNROLL for (u32 word = 0; word < 4 * STEPS; ++word) {
                    u32 part = word / 4 * 4 + lane() % 4;
                    bool exists = block < tile.scored && part < VECTORS;
                    a[i][word / 2][half + word % 2 * 2] = exists ? from[part * 4 + word % 4] : 0;
                }
            }
        }
    }
};

// Logits of the rows of a query head: with c = lane % 4, rows 8 n + 2c and the next against blocks g (twice), then g + 8, of each 16.
struct Scores {
    f32 t[BLOCK_TILES][ROW_TILES][4];

    DEVICE_MEMBER void multiply_head(const Means& means, const u8* shared, u32 head, f32 scale) {
        const uint4x* q = reinterpret_cast<const uint4x*>(shared) + (head * TILE + lane() / 4) * PITCH + lane() % 4;
        UNROLL for (u32 n = 0; n < ROW_TILES; ++n) {
            UNROLL for (u32 i = 0; i < BLOCK_TILES; ++i) {
                UNROLL for (u32 j = 0; j < 4; ++j) t[i][n][j] = 0.0f;
            }
            UNROLL for (u32 step = 0; step < STEPS; ++step) {
                uint4x x = q[n * 8 * PITCH + step * 4];
                const u32 b[2] = {x.x, x.y}, b_next[2] = {x.z, x.w};
                UNROLL for (u32 i = 0; i < BLOCK_TILES; ++i) {
                    multiply(t[i][n], means.a[i][2 * step], b);
                    multiply(t[i][n], means.a[i][2 * step + 1], b_next);
                }
            }
            UNROLL for (u32 i = 0; i < BLOCK_TILES; ++i) {
                UNROLL for (u32 j = 0; j < 4; ++j) t[i][n][j] *= scale;
            }
        }
    }
};

// Adds the blocks from `first` on to the sums of the rows, `sums` [rows] of the warp.
DEVICE void add_rows(const Params& p, const Tile& tile, u32 first, const u8* shared, LogSum* sums) {
    Means means;
    means.load(p, tile, first);
    for (u32 head = 0; head < p.group; ++head) {
        Scores scores;
        scores.multiply_head(means, shared, head, p.scale);
        UNROLL for (u32 n = 0; n < ROW_TILES; ++n) {
            UNROLL for (u32 column = 0; column < 2; ++column) {
                f32 top = negative_infinity(), sum = 0.0f;
                UNROLL for (u32 i = 0; i < 2 * BLOCK_TILES; ++i) {
                    bool exists = first + i * 8 + lane() / 4 < tile.scored;
                    f32& t = scores.t[i / 2][n][i % 2 * 2 + column];
                    t = exists ? t : negative_infinity();
                    top = fmaxf(top, t);
                }
                UNROLL for (u32 mask = 4; mask < 32; mask *= 2) top = fmaxf(top, shuffle_xor(top, mask));
                f32 base = top == negative_infinity() ? 0.0f : top;
                UNROLL for (u32 i = 0; i < 2 * BLOCK_TILES; ++i) {
                    sum += exp2_approx(scores.t[i / 2][n][i % 2 * 2 + column] - base);
                }
                UNROLL for (u32 mask = 4; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
                if (lane() < 4) sums[head * TILE + n * 8 + 2 * lane() + column].add(top, sum);
            }
        }
    }
}

DEVICE void score(const Params& p, const Tile& tile, u32 first, const u8* shared, const f32* offsets) {
    Means means;
    means.load(p, tile, first);
    LogSum energies[2 * BLOCK_TILES];
    UNROLL for (u32 i = 0; i < 2 * BLOCK_TILES; ++i) energies[i].clear();
    for (u32 head = 0; head < p.group; ++head) {
        Scores scores;
        scores.multiply_head(means, shared, head, p.scale);
        UNROLL for (u32 i = 0; i < 2 * BLOCK_TILES; ++i) {
            f32 top = negative_infinity(), sum = 0.0f;
            UNROLL for (u32 j = 0; j < 2 * ROW_TILES; ++j) {
                f32& t = scores.t[i / 2][j / 2][i % 2 * 2 + j % 2];
                t -= offsets[head * TILE + j / 2 * 8 + 2 * (lane() % 4) + j % 2];
                top = fmaxf(top, t);
            }
            f32 base = top == negative_infinity() ? 0.0f : top;
            UNROLL for (u32 j = 0; j < 2 * ROW_TILES; ++j) {
                sum += exp2_approx(scores.t[i / 2][j / 2][i % 2 * 2 + j % 2] - base);
            }
            energies[i].add(top, sum);
        }
    }
    UNROLL for (u32 i = 0; i < 2 * BLOCK_TILES; ++i) {
        UNROLL for (u32 mask = 1; mask < 4; mask *= 2) {
            f32 top = shuffle_xor(energies[i].top, mask), sum = shuffle_xor(energies[i].sum, mask);
            energies[i].add(top, sum);
        }
        if (lane() % 4 == 0) store(p, tile, first + i * 8 + lane() / 4, energies[i]);
    }
}
#endif
