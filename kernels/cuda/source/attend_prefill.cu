// Prefill attention on matrix units, 16-bit queries, keys and values: a thread block takes ROWS packed query rows of one KV head past what
// their list names, KEYS keys at a time. K and V come by asynchronous copies, STAGES deep, into shared memory whose 16-byte pieces are
// exchanged so that `ldmatrix` meets no bank twice; each warp has ROW_TILES tiles of 16 rows, their scores and outputs in registers.
//
// HEAD_DIM, DTYPE, WARPS, ROW_TILES, KEYS, STAGES, BLOCKS (at once on a multiprocessor) are constants of the host.

#define ROWS (16 * ROW_TILES * WARPS)
#define THREADS (32 * WARPS)
// 16-byte pieces of a row.
#define PIECES (HEAD_DIM / 8)
#define DIM_STEPS (HEAD_DIM / 16)
#define KEY_STEPS (KEYS / 16)
#define TILE_BYTES (KEYS * ROW_BYTES)
#define STAGE_BYTES (2 * TILE_BYTES)

// Weights are at most 1; 2^SHIFT of them use the range of f16.
#if DTYPE == DTYPE_F16
#define SHIFT 15.0f
#else
#define SHIFT 0.0f
#endif

DEVICE u32 pack(f32 low, f32 high) {
#if DTYPE == DTYPE_F16
    return pack_f16(low, high);
#else
    return pack_bf16(low, high);
#endif
}

// Pieces of a row are exchanged within groups of so many.
#define CYCLE (PIECES % 8 == 0 ? 8 : PIECES % 4 == 0 ? 4 : 2)

// Where piece `piece` of a row lies in a tile: eight rows one after the other have the same piece in eight banks.
DEVICE u32 place(u32 row, u32 piece) { return (row * PIECES + (piece ^ (row / (8 / CYCLE) % CYCLE))) * 16; }

// Where the piece 2 `step` further lies, whose number differs in bits above the lowest: an exclusive or within the group, whole groups
// further. Rows 16 further have the same exchange.
DEVICE u32 further(u32 at, u32 rows, u32 step) {
    return (at ^ 2 * step % CYCLE * 16) + 2 * step / CYCLE * CYCLE * 16 + rows * ROW_BYTES;
}

// What is known of the keys of a stage beside K and V.
struct Marks {
    u32 first_seen[KEYS];
    f32 bias[KEYS];
    u32 plain;
    u32 may_skip;
    u32 unused[2];
};

struct Stage {
    u8* keys;
    u8* values;
    Marks* marks;
};

DEVICE u8* query_tile() { return shared_memory(); }

DEVICE Stage stage_of(u32 index) {
    u8* at = shared_memory() + ROWS * ROW_BYTES + index % STAGES * STAGE_BYTES;
    u8* marks = shared_memory() + ROWS * ROW_BYTES + STAGES * STAGE_BYTES;
    return {at, at + TILE_BYTES, reinterpret_cast<Marks*>(marks) + index % STAGES};
}

// What is needed seldom and has no room in registers.
struct Task {
    Item item;
    // Position of the first row.
    u64 position;
    // Positions of the rows, counted from the first.
    u32 rows[ROWS];
};
DEVICE Task& task() {
    return *reinterpret_cast<Task*>(shared_memory() + ROWS * ROW_BYTES + STAGES * (STAGE_BYTES + sizeof(Marks)));
}

// 16 bytes of queries; what is beyond the range of f16 becomes the largest number.
DEVICE uint4x narrowed(const f32* from) {
    f32 x[8];
    UNROLL for (u32 half = 0; half < 2; half++) {
        uint4x four = load_global_once(from + 4 * half);
        const u32 bits[4] = {four.x, four.y, four.z, four.w};
        UNROLL for (u32 i = 0; i < 4; i++) {
            f32 wide = from_bits(bits[i]);
            x[4 * half + i] = DTYPE == DTYPE_F16 ? (wide > 65504 ? 65504 : wide < -65504 ? -65504 : wide) : wide;
        }
    }
    return {pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7])};
}

// Brings the queries, rounded to the type of the keys, and notes where the rows are.
DEVICE void bring_queries(const Params& p, const Item& item) {
    NO_UNROLL for (u32 row = thread_index(); row < ROWS; row += THREADS) {
        task().rows[row] = (item.first_row + row) / p.group - item.first_row / p.group;
    }
    if (thread_index() == 0) {
        task().item = item;
        task().position = p.first_position + item.first_row / p.group;
    }
    NO_UNROLL for (u32 at = thread_index(); at < ROWS * PIECES; at += THREADS) {
        u32 row = at / PIECES, piece = at % PIECES;
        uint4x value = {0, 0, 0, 0};
        if (row < item.rows) {
            u64 pair = pair_of(p, item.kv_head, item.first_row + row);
            value = narrowed(reinterpret_cast<const f32*>(p.queries) + pair * HEAD_DIM + piece * 8);
        }
        *reinterpret_cast<uint4x*>(query_tile() + place(row, piece)) = value;
    }
    sync_block();
}

DEVICE void mark(const Params& p, const Visit& visit, Marks& marks) {
    u64 row_position = task().position;
    bool plain = is_plain(visit, row_position);
    if (thread_index() == 0) {
        marks.plain = plain;
        marks.may_skip = kind_of(visit) == VISIT_BLOCK && visit.keys + keys_of(visit) - 1 < row_position;
    }
    if (plain) return;
    NO_UNROLL for (u32 key = thread_index(); key < KEYS; key += THREADS) {
        marks.first_seen[key] = first_seen(p, visit, key, row_position);
        marks.bias[key] = bias_of(p, visit, key) / from_bits(p.scale);
    }
}

DEVICE void begin_row(const Stage& stage, u32 key, u32 piece, u64 from, u64 to_value, bool valid) {
    copy_async_16(stage.keys + place(key, piece), reinterpret_cast<const void*>(from), valid);
    copy_async_16(stage.values + place(key, piece), reinterpret_cast<const void*>(from + to_value), valid);
}

// Keys that lie one after the other.
DEVICE void begin_run(const Params& p, const Visit& visit, u32 kv_head, const Stage& stage) {
    u64 first = visited_row(p, visit, kv_head, 0), to_value = value_offset(p, visit);
    UNROLL for (u32 turn = 0; turn < (KEYS * PIECES + THREADS - 1) / THREADS; turn++) {
        u32 at = turn * THREADS + thread_index(), key = at / PIECES;
        if (KEYS * PIECES % THREADS != 0 && key >= KEYS) break;
        begin_row(stage, key, at % PIECES, first + at * 16, to_value, counts(visit, key));
    }
}

// Keys from anywhere.
DEVICE void begin_rows(const Params& p, const Visit& visit, u32 kv_head, const Stage& stage) {
    u64 to_value = value_offset(p, visit);
    NO_UNROLL for (u32 at = thread_index(); at < KEYS * PIECES; at += THREADS) {
        u32 key = at / PIECES, piece = at % PIECES;
        u64 row = key_row(p, visit, kv_head, key);
        bool valid = row != 0;
        begin_row(stage, key, piece, valid ? row + piece * 16 : p.queries, valid ? to_value : 0, valid);
    }
}

// Begins to bring a visit into its stage, unless there is none left; closes a group of copies either way.
DEVICE void begin_visit(const Params& p, u32 index) {
    const Item& item = task().item;
    if (index < item.visits) {
        Visit visit = visit_of(p, item, index);
        Stage stage = stage_of(index);
        if (is_in_one_page(p, visit)) {
            begin_run(p, visit, item.kv_head, stage);
        } else {
            begin_rows(p, visit, item.kv_head, stage);
        }
        mark(p, visit, *stage.marks);
    }
    commit_copies();
}

// Scores, running sums and outputs of one lane: of rows `lane / 4` and 8 further of each tile of 16.
struct State {
    f32 top[ROW_TILES][2];
    f32 sum[ROW_TILES][2];
    f32 output[ROW_TILES][2 * DIM_STEPS][4];
};

// Row of the item that this lane has in a half of a tile.
DEVICE u32 row_of(u32 tile, u32 half) { return (warp() * ROW_TILES + tile) * 16 + lane() / 4 + half * 8; }

// What the products are added to: 0, or the bias of a key in units of scores, or −∞ where the row does not see it.
DEVICE void begin_scores(f32 (&scores)[ROW_TILES][2 * KEY_STEPS][4], const Marks& marks) {
    if (marks.plain) {
        UNROLL for (u32 tile = 0; tile < ROW_TILES; tile++) {
            UNROLL for (u32 n = 0; n < 2 * KEY_STEPS; n++) {
                UNROLL for (u32 i = 0; i < 4; i++) scores[tile][n][i] = 0;
            }
        }
        return;
    }
    u32 rows[ROW_TILES][2];
    UNROLL for (u32 tile = 0; tile < ROW_TILES; tile++) {
        UNROLL for (u32 half = 0; half < 2; half++) rows[tile][half] = task().rows[row_of(tile, half)];
    }
    UNROLL for (u32 n = 0; n < 2 * KEY_STEPS; n++) {
        UNROLL for (u32 column = 0; column < 2; column++) {
            u32 key = n * 8 + lane() % 4 * 2 + column, seen = marks.first_seen[key];
            f32 bias = marks.bias[key];
            UNROLL for (u32 tile = 0; tile < ROW_TILES; tile++) {
                UNROLL for (u32 half = 0; half < 2; half++) {
                    scores[tile][n][half * 2 + column] = rows[tile][half] >= seen ? bias : negative_infinity();
                }
            }
        }
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

// The largest logit of each row.
DEVICE void row_tops(f32 (&tops)[ROW_TILES][2], const f32 (&scores)[ROW_TILES][2 * KEY_STEPS][4], f32 scale) {
    UNROLL for (u32 tile = 0; tile < ROW_TILES; tile++) {
        UNROLL for (u32 half = 0; half < 2; half++) {
            f32 top = negative_infinity();
            UNROLL for (u32 n = 0; n < 2 * KEY_STEPS; n++) {
                top = fmaxf(top, fmaxf(scores[tile][n][half * 2], scores[tile][n][half * 2 + 1]));
            }
            top = fmaxf(top, shuffle_xor(top, 1));
            tops[tile][half] = fmaxf(top, shuffle_xor(top, 2)) * scale;
        }
    }
}

// Of rows that have seen nothing, 0: no −∞ is subtracted from another.
DEVICE f32 finite(f32 top) { return top == negative_infinity() ? 0 : top; }

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

// Whether all rows of the warp may leave out a block whose logits have these maxima.
DEVICE bool all_skip(const State& state, const f32 (&tops)[ROW_TILES][2], f32 skip_below) {
    bool some = false;
    UNROLL for (u32 tile = 0; tile < ROW_TILES; tile++) {
        UNROLL for (u32 half = 0; half < 2; half++) {
            some = some || !(tops[tile][half] < state.top[tile][half] - skip_below);
        }
    }
    return !any(some);
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

// Two numbers that lie side by side.
struct alignas(8) Two {
    f32 low, high;
};

// The state before the first visit: nothing, or the partial of earlier keys.
DEVICE void begin_state(const Params& p, const Item& item, State& state) {
    bool all = p.earlier != 0 && (item.flags & ITEM_BEGINS);
    UNROLL for (u32 tile = 0; tile < ROW_TILES; tile++) {
        UNROLL for (u32 half = 0; half < 2; half++) {
            u32 row = row_of(tile, half);
            bool goes_on = all && row < item.rows;
            u64 pair = goes_on ? pair_of(p, item.kv_head, item.first_row + row) : 0;
            const f32* record = reinterpret_cast<const f32*>(p.earlier) + pair * RECORD;
            state.top[tile][half] = goes_on ? record[0] : negative_infinity();
            // One of the four lanes of a row brings its sum.
            state.sum[tile][half] = goes_on && lane() % 4 == 0 ? record[1] * exp2_approx(SHIFT) : 0;
            UNROLL for (u32 n = 0; n < 2 * DIM_STEPS; n++) {
                Two two = {0, 0};
                if (goes_on) two = *reinterpret_cast<const Two*>(record + 2 + n * 8 + lane() % 4 * 2);
                state.output[tile][n][half * 2] = two.low * exp2_approx(SHIFT);
                state.output[tile][n][half * 2 + 1] = two.high * exp2_approx(SHIFT);
            }
        }
    }
}

// Writes a row: its record, or its output divided by the sum.
DEVICE void store_row(const Params& p, const Item& item, const State& state, u32 tile, u32 half, f32 sum) {
    u32 row = row_of(tile, half);
    bool whole = item.part == WHOLE, divided = whole && p.divided != 0;
    u64 pair = pair_of(p, item.kv_head, item.first_row + row);
    f32 factor = divided ? (sum == 0 ? 0.0f : 1 / sum) : exp2_approx(-SHIFT);
    f32* output = reinterpret_cast<f32*>(p.output) + pair * HEAD_DIM;
    if (!divided) {
        f32* record = reinterpret_cast<f32*>(p.output) + pair * RECORD;
        if (!whole) record = reinterpret_cast<f32*>(p.parts) + (static_cast<u64>(item.part) + row) * RECORD;
        if (lane() % 4 == 0) *reinterpret_cast<Two*>(record) = {state.top[tile][half], sum * factor};
        output = record + 2;
    }
    UNROLL for (u32 n = 0; n < 2 * DIM_STEPS; n++) {
        Two two = {state.output[tile][n][half * 2] * factor, state.output[tile][n][half * 2 + 1] * factor};
        *reinterpret_cast<Two*>(output + n * 8 + lane() % 4 * 2) = two;
    }
}

DEVICE void store(const Params& p, const Item& item, const State& state) {
    UNROLL for (u32 tile = 0; tile < ROW_TILES; tile++) {
        UNROLL for (u32 half = 0; half < 2; half++) {
            f32 sum = state.sum[tile][half];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            if (row_of(tile, half) < item.rows) store_row(p, item, state, tile, half, sum);
        }
    }
}

KERNEL(attend_prefill, THREADS, BLOCKS, Params) {
    bring_queries(p, reinterpret_cast<const Item*>(p.items)[block_index_x()]);
    NO_UNROLL for (u32 visit = 0; visit < STAGES - 1; visit++) begin_visit(p, visit);
    State state;
    begin_state(p, task().item, state);
    NO_UNROLL for (u32 visit = 0; visit < task().item.visits; visit++) {
        wait_copies<STAGES - 2>();
        // What was copied is there for all, and nobody reads the stage before any more.
        sync_block();
        begin_visit(p, visit + STAGES - 1);
        // Warps without rows only copy.
        if (warp() * ROW_TILES * 16 < task().item.rows) fold(p, state, stage_of(visit));
    }
    store(p, task().item, state);
}
