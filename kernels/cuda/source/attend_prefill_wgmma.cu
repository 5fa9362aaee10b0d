// Prefill attention on the matrix units of Hopper (sm_90a), 16-bit queries, keys and values: what `attend_prefill` does, by warp groups. The first
// copies keys and values, KEYS of them at a time, STAGES deep, and lays them out as `wgmma` reads them; two others take 64 packed query rows
// each. While the products of a visit are made, the weights of the next are: its scores are a product that was begun before.
//
// HEAD_DIM (64 or 128), DTYPE, WARPS (8), FIRST_WARP (4), ROW_TILES (1), KEYS (64), STAGES are constants of the host.
#include "warpgroup.cuh"

static_assert(HEAD_DIM % 64 == 0 && KEYS == 64 && ROW_TILES == 1 && WARPS == 8 && FIRST_WARP == 4, "as the layouts below need it");
// Registers of a thread at the beginning, of one of the group that copies, and of the others. The host refuses code with another number at the
// beginning: of fewer in all, those who want more would wait for ever.
#define LAUNCH_REGISTERS 168
#define COPY_REGISTERS 40
#define REGISTERS 232
static_assert(32 * FIRST_WARP * COPY_REGISTERS + 32 * WARPS * REGISTERS <= THREADS * LAUNCH_REGISTERS, "registers that all groups have together");
// Visits whose copies are under way. Two stages more: the one that is read, and the one before it, whose values still are.
#define AHEAD (STAGES - 2)

#define BANDS (HEAD_DIM / 64)
#define BAND_BYTES (KEYS * 128)
#define TILE_BYTES (BANDS * BAND_BYTES)
#define STAGE_BYTES (2 * TILE_BYTES)

// Where a piece lies in bands of 128 bytes a row.
DEVICE u32 place(u32 row, u32 piece) { return piece / 8 * BAND_BYTES + row * 128 + (piece % 8 ^ row % 8) * 16; }

// Bands begin at multiples of 1024, wherever shared memory does: the host adds as much.
DEVICE u8* stages() { return shared_memory() + (0 - shared_address(shared_memory())) % 1024; }
DEVICE Marks* all_marks() { return reinterpret_cast<Marks*>(stages() + STAGES * STAGE_BYTES); }

DEVICE Stage stage_of(u32 index) {
    u8* at = stages() + index % STAGES * STAGE_BYTES;
    return {at, at + TILE_BYTES, all_marks() + index % STAGES};
}

// Ends of phases tell that a stage is full, and that nobody reads it any more.
struct Pipe {
    Barrier full[STAGES];
    Barrier empty[STAGES];
};
DEVICE Pipe& pipe() { return *reinterpret_cast<Pipe*>(all_marks() + STAGES); }
DEVICE Task& task() { return *reinterpret_cast<Task*>(&pipe() + 1); }

// Which time round a visit is of its stage: the phase of its barriers.
DEVICE u32 parity_of(u32 visit) { return visit / STAGES % 2; }

// One lane arrives for all of its warp.
DEVICE void arrive_warp(Barrier& barrier) {
    sync_warp();
    if (lane() == 0) arrive(barrier);
}

DEVICE void begin_pipe(const Item& item) {
    if (thread_index() != 0) return;
    // Groups without rows wait for nothing.
    u32 groups = (item.rows + 63) / 64;
    NO_UNROLL for (u32 stage = 0; stage < STAGES; stage++) {
        init_barrier(pipe().full[stage], FIRST_WARP);
        init_barrier(pipe().empty[stage], 4 * groups);
    }
}

// Copies every visit to its stage as soon as that is empty, and says so when it is there.
DEVICE void copy_visits(const Params& p) {
    u32 visits = task().item.visits;
    NO_UNROLL for (u32 visit = 0; visit < visits + AHEAD; visit++) {
        if (visit >= STAGES && visit < visits) wait_barrier(pipe().empty[visit % STAGES], parity_of(visit - STAGES));
        begin_visit(p, visit);
        commit_copies();
        if (visit < AHEAD) continue;
        wait_copies<AHEAD>();
        fence_async_proxy();
        arrive_warp(pipe().full[(visit - AHEAD) % STAGES]);
    }
}

// What the descriptors begin with.
struct Matrices {
    u64 keys, values;
};
DEVICE Matrices matrices() {
    return {matrix_descriptor(stage_of(0).keys, 16, 1024), matrix_descriptor(stage_of(0).values, BAND_BYTES, 1024)};
}

// The queries of a lane, rounded to the type of the keys, as the fragments that the product takes.
DEVICE void bring_queries(const Params& p, const Item& item, u32 (&queries)[DIM_STEPS][4]) {
    UNROLL for (u32 half = 0; half < 2; half++) {
        u32 row = row_of(0, half);
        u64 pair = row < item.rows ? pair_of(p, item.kv_head, item.first_row + row) : 0;
        const f32* from = reinterpret_cast<const f32*>(p.queries) + pair * HEAD_DIM + lane() % 4 * 2;
        UNROLL for (u32 i = 0; i < 2 * DIM_STEPS; i++) {
            Two two = {0, 0};
            if (row < item.rows) two = *reinterpret_cast<const Two*>(from + i * 8);
            queries[i / 2][i % 2 * 2 + half] = pack(within_range(two.low), within_range(two.high));
        }
    }
}

// Begins scores += Q Kᵀ.
DEVICE void begin_keys(f32 (&scores)[2 * KEY_STEPS][4], const u32 (&queries)[DIM_STEPS][4], const Matrices& of, u32 visit) {
    u64 keys = moved(of.keys, visit % STAGES * STAGE_BYTES);
    UNROLL for (u32 step = 0; step < DIM_STEPS; step++) {
        multiply_group<false>(scores, queries[step], moved(keys, step / 4 * BAND_BYTES + step % 4 * 32));
    }
    commit_products();
}

// Begins output += P V.
DEVICE void begin_values(f32 (&output)[2 * DIM_STEPS][4], const u32 (&weights)[KEY_STEPS][4], const Matrices& of, u32 visit) {
    u64 values = moved(of.values, visit % STAGES * STAGE_BYTES);
    UNROLL for (u32 step = 0; step < KEY_STEPS; step++) multiply_group<true>(output, weights[step], moved(values, step * 16 * 128));
    commit_products();
}

// Takes the maxima of new logits into the running ones; whether any of the warp grew, and then by how much what was summed shrinks.
DEVICE bool raise(State& state, f32 (&factors)[2], const f32 (&tops)[1][2]) {
    if (!any(tops[0][0] > state.top[0][0] || tops[0][1] > state.top[0][1])) return false;
    UNROLL for (u32 half = 0; half < 2; half++) {
        f32 top = fmaxf(state.top[0][half], tops[0][half]);
        factors[half] = exp2_approx(state.top[0][half] - finite(top));
        state.top[0][half] = top;
        state.sum[0][half] *= factors[half];
    }
    return true;
}

DEVICE void shrink(f32 (&output)[2 * DIM_STEPS][4], const f32 (&factors)[2]) {
    UNROLL for (u32 n = 0; n < 2 * DIM_STEPS; n++) {
        UNROLL for (u32 i = 0; i < 4; i++) output[n][i] *= factors[i / 2];
    }
}

// Scores become weights, which are summed; the sum of a row is spread over four lanes until the end. Of a visit that all rows of the warp may
// leave out they are 0: its values are multiplied with, since a branch around products would have the assembler make them one by one. The branch
// here keeps it from moving exponentials behind the next wait. Gives whether, and by how much, what was summed shrinks.
DEVICE bool weigh(const Params& p, State& state, f32 (&scores)[1][2 * KEY_STEPS][4], f32 (&factors)[2], const Marks& marks) {
    f32 tops[1][2], scale = from_bits(p.scale);
    row_tops(tops, scores, scale);
    if (marks.may_skip && all_skip(state, tops, from_bits(p.skip_below))) {
        UNROLL for (u32 n = 0; n < 2 * KEY_STEPS; n++) {
            UNROLL for (u32 i = 0; i < 4; i++) scores[0][n][i] = 0;
        }
        return false;
    }
    bool grew = raise(state, factors, tops);
    const f32 offsets[2] = {SHIFT - finite(state.top[0][0]), SHIFT - finite(state.top[0][1])};
    UNROLL for (u32 n = 0; n < 2 * KEY_STEPS; n++) {
        UNROLL for (u32 i = 0; i < 4; i++) {
            scores[0][n][i] = exp2_approx(fmaf(scores[0][n][i], scale, offsets[i / 2]));
            state.sum[0][i / 2] += scores[0][n][i];
        }
    }
    return grew;
}

// Rounded to the type of V, the weights of 16 keys are the fragments that the product takes.
DEVICE void round_weights(u32 (&weights)[KEY_STEPS][4], const f32 (&scores)[2 * KEY_STEPS][4]) {
    UNROLL for (u32 step = 0; step < KEY_STEPS; step++) {
        UNROLL for (u32 i = 0; i < 4; i++) {
            const f32(&from)[4] = scores[2 * step + i / 2];
            weights[step][i] = pack(from[i % 2 * 2], from[i % 2 * 2 + 1]);
        }
    }
}

DEVICE void attend(const Params& p) {
    State state;
    f32 scores[1][2 * KEY_STEPS][4], factors[2];
    u32 queries[DIM_STEPS][4], weights[KEY_STEPS][4], visits = task().item.visits;
    f32(&output)[2 * DIM_STEPS][4] = state.output[0];
    begin_state(p, task().item, state);
    bring_queries(p, task().item, queries);
    Matrices of = matrices();
    if (visits != 0) {
        wait_barrier(pipe().full[0], 0);
        begin_scores(scores, *stage_of(0).marks);
        fence_products(scores[0], queries);
        begin_keys(scores[0], queries, of, 0);
        wait_products<0>(scores[0], queries);
        if (weigh(p, state, scores, factors, *stage_of(0).marks)) shrink(output, factors);
        round_weights(weights, scores[0]);
    }
    NO_UNROLL for (u32 visit = 1; visit < visits; visit++) {
        wait_barrier(pipe().full[visit % STAGES], parity_of(visit));
        begin_scores(scores, *stage_of(visit).marks);
        fence_products(scores[0], queries, weights, output);
        begin_keys(scores[0], queries, of, visit);
        begin_values(output, weights, of, visit - 1);
        wait_products<1>(scores[0], queries);
        bool shrinks = weigh(p, state, scores, factors, *stage_of(visit).marks);
        wait_products<0>(weights, output);
        arrive_warp(pipe().empty[(visit - 1) % STAGES]);
        if (shrinks) shrink(output, factors);
        round_weights(weights, scores[0]);
    }
    if (visits != 0) {
        fence_products(weights, output);
        begin_values(output, weights, of, visits - 1);
        wait_products<0>(weights, output);
    }
    store(p, task().item, state);
}

KERNEL(attend_prefill_wgmma, THREADS, 1, Params) {
    begin_pipe(reinterpret_cast<const Item*>(p.items)[block_index_x()]);
    begin_task(p, reinterpret_cast<const Item*>(p.items)[block_index_x()]);
    sync_block();
    if (warp() < FIRST_WARP) {
        give_registers<COPY_REGISTERS>();
        copy_visits(p);
    } else {
        take_registers<REGISTERS>();
        if ((warp() - FIRST_WARP) / 4 * 64 < task().item.rows) attend(p);
    }
}
