// Prefill attention on matrix units, 16-bit queries, keys and values: a thread block takes ROWS packed query rows of one KV head past what
// their list names, KEYS keys at a time. K and V come by asynchronous copies, STAGES deep, into shared memory whose 16-byte pieces are
// exchanged so that `ldmatrix` meets no bank twice; each warp has ROW_TILES tiles of 16 rows, their scores and outputs in registers.
//
// HEAD_DIM, DTYPE, WARPS, ROW_TILES, KEYS, STAGES, BLOCKS (at once on a multiprocessor) are constants of the host.

#define TILE_BYTES (KEYS * ROW_BYTES)
#define STAGE_BYTES (2 * TILE_BYTES)

// Pieces of a row are exchanged within groups of so many.
#define CYCLE (PIECES % 8 == 0 ? 8 : PIECES % 4 == 0 ? 4 : 2)

// Where piece `piece` of a row lies in a tile: eight rows one after the other have the same piece in eight banks.
DEVICE u32 place(u32 row, u32 piece) { return (row * PIECES + (piece ^ (row / (8 / CYCLE) % CYCLE))) * 16; }

// Where the piece 2 `step` further lies, whose number differs in bits above the lowest: an exclusive or within the group, whole groups
// further. Rows 16 further have the same exchange.
DEVICE u32 further(u32 at, u32 rows, u32 step) {
    return (at ^ 2 * step % CYCLE * 16) + 2 * step / CYCLE * CYCLE * 16 + rows * ROW_BYTES;
}

DEVICE u8* query_tile() { return shared_memory(); }

DEVICE Stage stage_of(u32 index) {
    u8* at = shared_memory() + ROWS * ROW_BYTES + index % STAGES * STAGE_BYTES;
    u8* marks = shared_memory() + ROWS * ROW_BYTES + STAGES * STAGE_BYTES;
    return {at, at + TILE_BYTES, reinterpret_cast<Marks*>(marks) + index % STAGES};
}

DEVICE Task& task() {
    return *reinterpret_cast<Task*>(shared_memory() + ROWS * ROW_BYTES + STAGES * (STAGE_BYTES + sizeof(Marks)));
}

// 16 bytes of queries, rounded to the type of the keys.
DEVICE uint4x narrowed(const f32* from) {
    f32 x[8];
    UNROLL for (u32 half = 0; half < 2; half++) {
        uint4x four = load_global_once(from + 4 * half);
        const u32 bits[4] = {four.x, four.y, four.z, four.w};
        UNROLL for (u32 i = 0; i < 4; i++) x[4 * half + i] = within_range(from_bits(bits[i]));
    }
    return {pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7])};
}

DEVICE void bring_queries(const Params& p, const Item& item) {
    NO_UNROLL for (u32 at = thread_index(); at < ROWS * PIECES; at += THREADS) {
        u32 row = at / PIECES, piece = at % PIECES;
        uint4x value = {0, 0, 0, 0};
        if (row < item.rows) {
            u64 pair = pair_of(p, item.kv_head, item.first_row + row);
            value = narrowed(reinterpret_cast<const f32*>(p.queries) + pair * HEAD_DIM + piece * 8);
        }
        *reinterpret_cast<uint4x*>(query_tile() + place(row, piece)) = value;
    }
}

// scores += Q Kᵀ.
DEVICE void score(f32 (&scores)[ROW_TILES][2 * KEY_STEPS][4], const Stage& stage) {
    u32 thread = fresh_thread_index(), lane = thread % 32;
    u32 query_at = place(thread / 32 * ROW_TILES * 16 + lane % 16, lane / 16);
    u32 key_at = place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    UNROLL for (u32 step = 0; step < DIM_STEPS; step++) {
        u32 a[ROW_TILES][4];
        UNROLL for (u32 tile = 0; tile < ROW_TILES; tile++) {
            load_matrix_x4(a[tile], query_tile() + further(query_at, tile * 16, step));
        }
        UNROLL for (u32 n = 0; n < KEY_STEPS; n++) {
            u32 r[4];
            load_matrix_x4(r, stage.keys + further(key_at, n * 16, step));
            const u32 low[2] = {r[0], r[1]}, high[2] = {r[2], r[3]};
            UNROLL for (u32 tile = 0; tile < ROW_TILES; tile++) {
                multiply(scores[tile][2 * n], a[tile], low);
                multiply(scores[tile][2 * n + 1], a[tile], high);
            }
        }
    }
}

// Takes the maxima of new logits into the running ones and rescales what was summed.
DEVICE void raise(State& state, const f32 (&tops)[ROW_TILES][2]) {
    bool grew = false;
    UNROLL for (u32 tile = 0; tile < ROW_TILES; tile++) {
        UNROLL for (u32 half = 0; half < 2; half++) grew = grew || tops[tile][half] > state.top[tile][half];
    }
    if (!any(grew)) return;
    UNROLL for (u32 tile = 0; tile < ROW_TILES; tile++) {
        UNROLL for (u32 half = 0; half < 2; half++) {
            f32 top = fmaxf(state.top[tile][half], tops[tile][half]);
            f32 factor = exp2_approx(state.top[tile][half] - finite(top));
            state.top[tile][half] = top;
            state.sum[tile][half] *= factor;
            UNROLL for (u32 n = 0; n < 2 * DIM_STEPS; n++) {
                state.output[tile][n][half * 2] *= factor;
                state.output[tile][n][half * 2 + 1] *= factor;
            }
        }
    }
}

// Scores become weights, which are summed (the sum of a row is spread over four lanes until the end) and multiplied with V: output += P V. Rounded
// to the type of V, the weights of 16 keys are the fragments that the product takes.
DEVICE void add_values(State& state, const f32 (&scores)[ROW_TILES][2 * KEY_STEPS][4], const Stage& stage, f32 scale) {
    u32 lane = fresh_thread_index() % 32, value_at = place(lane % 16, lane / 16);
    UNROLL for (u32 step = 0; step < KEY_STEPS; step++) {
        u32 a[ROW_TILES][4];
        UNROLL for (u32 tile = 0; tile < ROW_TILES; tile++) {
            UNROLL for (u32 i = 0; i < 4; i++) {
                f32 offset = SHIFT - finite(state.top[tile][i % 2]);
                f32 low = exp2_approx(fmaf(scores[tile][2 * step + i / 2][i % 2 * 2], scale, offset));
                f32 high = exp2_approx(fmaf(scores[tile][2 * step + i / 2][i % 2 * 2 + 1], scale, offset));
                state.sum[tile][i % 2] += low + high;
                a[tile][i] = pack(low, high);
            }
        }
        UNROLL for (u32 n = 0; n < DIM_STEPS; n++) {
            u32 r[4];
            load_matrix_x4_transposed(r, stage.values + further(value_at, step * 16, n));
            const u32 low[2] = {r[0], r[1]}, high[2] = {r[2], r[3]};
            UNROLL for (u32 tile = 0; tile < ROW_TILES; tile++) {
                multiply(state.output[tile][2 * n], a[tile], low);
                multiply(state.output[tile][2 * n + 1], a[tile], high);
            }
        }
    }
}

DEVICE void fold(const Params& p, State& state, const Stage& stage) {
    f32 scores[ROW_TILES][2 * KEY_STEPS][4], tops[ROW_TILES][2];
    f32 scale = from_bits(p.scale);
    begin_scores(scores, *stage.marks);
    score(scores, stage);
    row_tops(tops, scores, scale);
    if (stage.marks->may_skip && all_skip(state, tops, from_bits(p.skip_below))) return;
    raise(state, tops);
    add_values(state, scores, stage, scale);
}

KERNEL(attend_prefill, THREADS, BLOCKS, Params) {
    begin_task(p, reinterpret_cast<const Item*>(p.items)[block_index_x()]);
    bring_queries(p, reinterpret_cast<const Item*>(p.items)[block_index_x()]);
    sync_block();
    NO_UNROLL for (u32 visit = 0; visit < STAGES - 1; visit++) {
        begin_visit(p, visit);
        commit_copies();
    }
    State state;
    begin_state(p, task().item, state);
    NO_UNROLL for (u32 visit = 0; visit < task().item.visits; visit++) {
        wait_copies<STAGES - 2>();
        // What was copied is there for all, and nobody reads the stage before any more.
        sync_block();
        begin_visit(p, visit + STAGES - 1);
        commit_copies();
        // Warps without rows only copy.
        if (warp() * ROW_TILES * 16 < task().item.rows) fold(p, state, stage_of(visit));
    }
    store(p, task().item, state);
}
