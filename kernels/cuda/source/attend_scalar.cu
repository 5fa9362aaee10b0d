// Prefill attention without matrix units, for f32 and as the reference of the other: a warp takes one row at a time, a lane one key at
// a time for the logits and every 32nd element for the output. All arithmetic is f32.

#define WARPS 4
#define THREADS (32 * WARPS)
#define PARTS ((HEAD_DIM + 31) / 32)

DEVICE f32 element(u64 row, u32 index) {
#if DTYPE == DTYPE_F32
    return reinterpret_cast<const f32*>(row)[index];
#elif DTYPE == DTYPE_F16
    return f16_to_f32(reinterpret_cast<const u16*>(row)[index]);
#else
    return bf16_to_f32(reinterpret_cast<const u16*>(row)[index]);
#endif
}

struct State {
    f32 top, sum;
    f32 output[PARTS];
};

// The logit of this lane's key, −∞ where the row does not see it.
DEVICE f32 logit(const Params& p, const Visit& visit, const f32* query, u32 key, u64 row, u64 position) {
    if (row == 0 || first_seen(p, visit, key, position) != 0) return negative_infinity();
    f32 sum = 0;
    for (u32 index = 0; index < HEAD_DIM; index++) sum = fmaf(query[index], element(row, index), sum);
    return fmaf(sum, from_bits(p.scale), bias_of(p, visit, key));
}

// What a warp shares: its query row and the weights of 32 keys.
struct Shared {
    f32 query[HEAD_DIM];
    f32 weights[32];
};

// Folds the keys [32 turn, 32 turn + 32) of a visit.
DEVICE void fold(const Params& p, const Item& item, const Visit& visit, Shared& shared, u32 turn, u64 position, State& state) {
    u32 key = turn * 32 + lane();
    f32 own = logit(p, visit, shared.query, key, key_row(p, visit, item.kv_head, key), position);
    f32 top = fmaxf(state.top, reduce_max(own));
    if (top == negative_infinity()) return;
    f32 weight = exp2_approx(own - top), factor = exp2_approx(state.top - top);
    state.top = top;
    state.sum = fmaf(state.sum, factor, reduce_add(weight));
    for (u32 part = 0; part < PARTS; part++) state.output[part] *= factor;
    shared.weights[lane()] = weight;
    sync_warp();
    u64 to_value = value_offset(p, visit);
    for (u32 from = 0; from < 32; from++) {
        f32 of = shared.weights[from];
        // Also of keys that there are not.
        if (of == 0) continue;
        u64 value = key_row(p, visit, item.kv_head, turn * 32 + from) + to_value;
        for (u32 part = 0; part < PARTS; part++) {
            u32 index = part * 32 + lane();
            if (index < HEAD_DIM) state.output[part] = fmaf(of, element(value, index), state.output[part]);
        }
    }
    sync_warp();
}

DEVICE void begin(const Params& p, const Item& item, u64 pair, State& state) {
    bool goes_on = p.earlier != 0 && (item.flags & ITEM_BEGINS);
    const f32* earlier = reinterpret_cast<const f32*>(p.earlier) + pair * RECORD;
    state.top = goes_on ? earlier[0] : negative_infinity();
    state.sum = goes_on ? earlier[1] : 0;
    for (u32 part = 0; part < PARTS; part++) {
        u32 index = part * 32 + lane();
        state.output[part] = goes_on && index < HEAD_DIM ? earlier[2 + index] : 0;
    }
}

DEVICE void store(const Params& p, const Item& item, u32 row, u64 pair, const State& state) {
    bool whole = item.part == WHOLE, divided = whole && p.divided != 0;
    f32* output = reinterpret_cast<f32*>(p.output) + pair * HEAD_DIM;
    if (!divided) {
        f32* record = reinterpret_cast<f32*>(p.output) + pair * RECORD;
        if (!whole) record = reinterpret_cast<f32*>(p.parts) + (static_cast<u64>(item.part) + row) * RECORD;
        if (lane() == 0) record[0] = state.top;
        if (lane() == 1) record[1] = state.sum;
        output = record + 2;
    }
    for (u32 part = 0; part < PARTS; part++) {
        u32 index = part * 32 + lane();
        if (index >= HEAD_DIM) continue;
        output[index] = !divided ? state.output[part] : state.sum == 0 ? 0 : state.output[part] / state.sum;
    }
}

KERNEL(attend_scalar, THREADS, 1, Params) {
    Shared& shared = reinterpret_cast<Shared*>(shared_memory())[warp()];
    const Item& item = reinterpret_cast<const Item*>(p.items)[block_index_x()];
    for (u32 row = warp(); row < item.rows; row += WARPS) {
        u64 pair = pair_of(p, item.kv_head, item.first_row + row);
        u64 position = p.first_position + (item.first_row + row) / p.group;
        for (u32 index = lane(); index < HEAD_DIM; index += 32) {
            shared.query[index] = reinterpret_cast<const f32*>(p.queries)[pair * HEAD_DIM + index];
        }
        sync_warp();
        State state;
        begin(p, item, pair, state);
        for (u32 number = 0; number < item.visits; number++) {
            Visit visit = visit_of(p, item, number);
            for (u32 turn = 0; turn * 32 < keys_of(visit); turn++) fold(p, item, visit, shared, turn, position, state);
        }
        sync_warp();
        store(p, item, row, pair, state);
    }
}
