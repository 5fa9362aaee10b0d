// What both kernels of prefill attention on matrix units do alike: which lane has which rows, queries as they are read, marks of keys, softmax,
// results. Each warp has ROW_TILES tiles of 16 rows of a KV head, their scores and outputs in registers: those of the fragments of
// `mma.m16n8k16`, which `wgmma.m64nNk16` has too, 16 rows a warp.
//
// HEAD_DIM, DTYPE, KEYS, ROW_TILES, WARPS (that compute) and FIRST_WARP (of them) are constants of the host.

#if !defined(FIRST_WARP)
#define FIRST_WARP 0
#endif

#define ROWS (16 * ROW_TILES * WARPS)
#define THREADS (32 * (FIRST_WARP + WARPS))
// The first threads bring keys and values: those of the warps before FIRST_WARP, or all.
#define COPY_THREADS (FIRST_WARP == 0 ? THREADS : 32 * FIRST_WARP)
// 16-byte pieces of a row.
#define PIECES (HEAD_DIM / 8)
#define DIM_STEPS (HEAD_DIM / 16)
#define KEY_STEPS (KEYS / 16)

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

// What is known of the keys of a stage beside K and V.
struct Marks {
    u32 first_seen[KEYS];
    f32 bias[KEYS];
    u32 plain;
    u32 may_skip;
    u32 unused[2];
};

// What is needed seldom and has no room in registers.
struct Task {
    Item item;
    // Position of the first row.
    u64 position;
    // Positions of the rows, counted from the first.
    u32 rows[ROWS];
};

// A stage of the copies.
struct Stage {
    u8* keys;
    u8* values;
    Marks* marks;
};

// Where they lie in shared memory, and piece `piece` of a row in a tile of keys or values: each kernel's own.
DEVICE Task& task();
DEVICE Stage stage_of(u32 index);
DEVICE u32 place(u32 row, u32 piece);

// Notes what is done and where its rows are.
DEVICE void begin_task(const Params& p, const Item& item) {
    NO_UNROLL for (u32 row = thread_index(); row < ROWS; row += THREADS) {
        task().rows[row] = (item.first_row + row) / p.group - item.first_row / p.group;
    }
    if (thread_index() == 0) {
        task().item = item;
        task().position = p.first_position + item.first_row / p.group;
    }
}

// What is beyond the range of f16 becomes the largest number.
DEVICE f32 within_range(f32 x) { return DTYPE == DTYPE_F16 ? (x > 65504 ? 65504 : x < -65504 ? -65504 : x) : x; }

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
    UNROLL for (u32 turn = 0; turn < (KEYS * PIECES + COPY_THREADS - 1) / COPY_THREADS; turn++) {
        u32 at = turn * COPY_THREADS + thread_index(), key = at / PIECES;
        if (KEYS * PIECES % COPY_THREADS != 0 && key >= KEYS) break;
        begin_row(stage, key, at % PIECES, first + at * 16, to_value, counts(visit, key));
    }
}

// Keys from anywhere.
DEVICE void begin_rows(const Params& p, const Visit& visit, u32 kv_head, const Stage& stage) {
    u64 to_value = value_offset(p, visit);
    NO_UNROLL for (u32 at = thread_index(); at < KEYS * PIECES; at += COPY_THREADS) {
        u32 key = at / PIECES, piece = at % PIECES;
        u64 row = key_row(p, visit, kv_head, key);
        bool valid = row != 0;
        begin_row(stage, key, piece, valid ? row + piece * 16 : p.queries, valid ? to_value : 0, valid);
    }
}

// Begins to bring a visit into its stage, with what is known of its keys, unless there is none left.
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
}

// Scores, running sums and outputs of one lane: of rows `lane / 4` and 8 further of each tile of 16.
struct State {
    f32 top[ROW_TILES][2];
    f32 sum[ROW_TILES][2];
    f32 output[ROW_TILES][2 * DIM_STEPS][4];
};

// Row of the item that this lane has in a half of a tile.
DEVICE u32 row_of(u32 tile, u32 half) { return ((warp() - FIRST_WARP) * ROW_TILES + tile) * 16 + lane() / 4 + half * 8; }

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
