// Products of a warp group over matrices as they lie in memory, and a pipe of stages with one fault at a time.
#include "warpgroup.cuh"

struct Params {
    // A matrix as it lies in shared memory.
    u64 image;
    // Fragments by lane: A, u32 [128][4], and D, f32 [128][COLUMNS / 2].
    u64 a;
    u64 d;
    // Of a descriptor, all but the address.
    u64 descriptor;
    u32 image_bytes;
    // Which fault, or 0.
    u32 fault;
    // Which block does it: warps of odd ones take turns the other way round.
    u32 block;
    u32 unused;
};

#define COLUMN_GROUPS (COLUMNS / 8)

DEVICE u8* aligned_memory() { return shared_memory() + (0 - shared_address(shared_memory())) % 1024; }

DEVICE void bring(const Params& p, u32 (&a)[1][4], f32 (&d)[COLUMN_GROUPS][4]) {
    u32 thread = thread_index() % 128;
    for (u32 i = 0; i < 4; i++) a[0][i] = reinterpret_cast<const u32*>(p.a)[thread * 4 + i];
    for (u32 i = 0; i < COLUMNS / 2; i++) d[i / 4][i % 4] = reinterpret_cast<const f32*>(p.d)[thread * (COLUMNS / 2) + i];
}

DEVICE void take(const Params& p, const f32 (&d)[COLUMN_GROUPS][4]) {
    f32* to = reinterpret_cast<f32*>(p.d) + thread_index() % 128 * (COLUMNS / 2);
    for (u32 i = 0; i < COLUMNS / 2; i++) to[i] = d[i / 4][i % 4];
}

KERNEL(multiply, 128, 1, Params) {
    for (u32 at = thread_index() * 16; at < p.image_bytes; at += 128 * 16) {
        copy_async_16(aligned_memory() + at, reinterpret_cast<const u8*>(p.image) + at, true);
    }
    commit_copies();
    if (p.fault != 25) wait_copies<0>();
    fence_async_proxy();
    sync_block();
    u32 a[1][4];
    f32 d[COLUMN_GROUPS][4];
    bring(p, a, d);
    fence_products(a, d);
    multiply_group<MATRIX_ACROSS>(d, a[0], p.descriptor + (shared_address(aligned_memory()) >> 4));
    commit_products();
    wait_products<0>(a, d);
    take(p, d);
}

#define STAGES 2
#define VISITS 5
#define STAGE_BYTES (COLUMNS * 128)

struct Pipe {
    Barrier full[STAGES];
    Barrier empty[STAGES];
};
DEVICE Pipe& pipe() { return *reinterpret_cast<Pipe*>(aligned_memory() + STAGES * STAGE_BYTES); }
DEVICE u8* stage_of(u32 visit) { return aligned_memory() + visit % STAGES * STAGE_BYTES; }

DEVICE void arrive_warp(Barrier& barrier) {
    sync_warp();
    if (lane() == 0) arrive(barrier);
}

// Brings the same image for each visit.
DEVICE void copy_visits(const Params& p) {
    for (u32 visit = 0; visit < VISITS; visit++) {
        if (visit >= STAGES && p.fault != 1) wait_barrier(pipe().empty[visit % STAGES], visit / STAGES % 2 ^ 1);
        for (u32 at = thread_index() * 16; at < STAGE_BYTES; at += 128 * 16) {
            copy_async_16(stage_of(visit) + at, reinterpret_cast<const u8*>(p.image) + at, true);
        }
        commit_copies();
        if (p.fault == 2) arrive_warp(pipe().full[visit % STAGES]);
        wait_copies<0>();
        if (p.fault == 3) arrive_warp(pipe().full[visit % STAGES]);
        if (p.fault != 4 && (p.fault != 5 || thread_index() != 73)) fence_async_proxy();
        if (p.fault != 2 && p.fault != 3) arrive_warp(pipe().full[visit % STAGES]);
    }
}

DEVICE void multiply_visits(const Params& p) {
    u32 a[1][4];
    f32 d[COLUMN_GROUPS][4], read = 0;
    bring(p, a, d);
    for (u32 visit = 0; visit < VISITS; visit++) {
        if (p.fault != 6) wait_barrier(pipe().full[visit % STAGES], (visit / STAGES + (p.fault == 26)) % 2);
        if (p.fault == 7 && visit == 0) stage_of(0)[8] = 1;
        if (p.fault != 8) fence_products(a, d);
        if (p.fault == 9 && thread_index() == 137) d[3][2] += 1;
        if (p.fault == 10 && thread_index() == 137) a[0][1] += 1;
        u64 matrix = matrix_descriptor(stage_of(visit), 16, 1024);
        if (p.fault == 11) matrix |= 1ull << 49;
        if (p.fault == 12 && lane() == 3) matrix = moved(matrix, 32);
        if (p.fault == 13 && warp() == 6) matrix = moved(matrix, 32);
        if (p.fault == 14) matrix = moved(matrix, 65536);
        multiply_group<false>(d, a[0], matrix);
        if (p.fault != 15 || visit + 1 < VISITS) commit_products();
        if (p.fault == 16) read = d[0][0];
        if (p.fault == 17) d[5][1] = 0;
        if (p.fault == 18) a[0][2] = 0;
        if (p.fault == 19) arrive_warp(pipe().empty[visit % STAGES]);
        if (p.fault == 20 && visit == 0) stage_of(0)[8] = 1;
        if (p.fault == 21 && warp() == 5 && visit + 1 == VISITS) return;
        if (p.fault == 30) {
            wait_products<0>(a);
        } else {
            wait_products<0>(a, d);
        }
        if (p.fault == 16) d[0][0] = read;
        if (p.fault != 19) arrive_warp(pipe().empty[visit % STAGES]);
    }
    take(p, d);
}

KERNEL(pass, 256, 1, Params) {
    if (block_index_x() != p.block) return;
    if (thread_index() == 0) {
        for (u32 stage = 0; stage < STAGES; stage++) {
            init_barrier(pipe().full[stage], p.fault == 22 ? 5 : 4);
            init_barrier(pipe().empty[stage], 4);
        }
        if (p.fault == 23) pipe().full[1].state = 0;
    }
    if (p.fault != 24) sync_block();
    if (warp() < 4) {
        if (p.fault == 27) {
            give_registers<248>();
        } else if (p.fault == 28) {
            take_registers<40>();
        } else {
            give_registers<40>();
        }
        copy_visits(p);
    } else {
        if (p.fault == 27) {
            take_registers<256>();
        } else if (p.fault == 29) {
            give_registers<256>();
        } else {
            take_registers<248>();
        }
        multiply_visits(p);
    }
}
