// Kernels with one fault each.

struct Params {
    u64 buffer;
    u32 n;
    u32 unused;
};

KERNEL(half_a_block_at_a_barrier, 64, 1, Params) {
    if (thread_index() < 32 + p.n) sync_block();
}

KERNEL(a_lane_misses_a_shuffle, 32, 1, Params) {
    u32* out = reinterpret_cast<u32*>(p.buffer);
    if (lane() != p.n) out[lane()] = shuffle_xor(lane(), 1);
    sync_block();
}

KERNEL(lanes_in_different_functions, 32, 1, Params) {
    u32* out = reinterpret_cast<u32*>(p.buffer);
    if (lane() == p.n) {
        out[lane()] = ballot(true);
    } else {
        out[lane()] = shuffle(lane(), 0);
    }
}

KERNEL(write_shared, 32, 1, Params) {
    if (thread_index() == 0) shared_memory()[static_cast<i32>(p.n)] = 1;
}

KERNEL(read_shared, 32, 1, Params) {
    u8* out = reinterpret_cast<u8*>(p.buffer);
    out[thread_index()] = shared_memory()[p.n + thread_index()];
}

KERNEL(copy_to_misaligned, 32, 1, Params) {
    copy_async_16(shared_memory() + p.n, reinterpret_cast<const u8*>(p.buffer), true);
    commit_copies();
    wait_copies<0>();
}

KERNEL(copy_from_misaligned, 32, 1, Params) {
    copy_async_16(shared_memory(), reinterpret_cast<const u8*>(p.buffer) + p.n, true);
    commit_copies();
    wait_copies<0>();
}

KERNEL(load_misaligned_once, 32, 1, Params) {
    u32* out = reinterpret_cast<u32*>(p.buffer);
    uint4x value = load_global_once(reinterpret_cast<const u8*>(p.buffer) + p.n);
    if (thread_index() == 0) out[0] = value.x;
}

KERNEL(load_misaligned, 32, 1, Params) {
    u32* out = reinterpret_cast<u32*>(p.buffer);
    u32 value = *reinterpret_cast<const u32*>(p.buffer + p.n);
    if (thread_index() == 0) out[0] = value;
}

// Waits for all but n / 2 of two copies of 16 bytes and takes both; n % 2 says whether anything is committed.
KERNEL(copy_and_read, 32, 1, Params) {
    u32* data = reinterpret_cast<u32*>(p.buffer);
    u32* shared = reinterpret_cast<u32*>(shared_memory());
    if (thread_index() != 0) return;
    for (u32 copy = 0; copy < 2; copy++) {
        copy_async_16(shared + 4 * copy, data + 4 * copy, copy == 0 || p.n < 4);
        if (p.n % 2 == 0) commit_copies();
    }
    if (p.n / 2 == 1) {
        wait_copies<1>();
    } else {
        wait_copies<0>();
    }
    for (u32 i = 0; i < 8; i++) data[8 + i] = shared[i];
}

KERNEL(write_buffer, 32, 1, Params) {
    u32* out = reinterpret_cast<u32*>(p.buffer);
    if (thread_index() == 31) out[static_cast<i32>(p.n)] = 7;
}

KERNEL(write_local_array, 32, 1, Params) {
    u32* out = reinterpret_cast<u32*>(p.buffer);
    u32 array[4] = {};
    array[p.n] = thread_index();
    out[thread_index()] = array[0] + array[3];
}

// Every block adds to a counter; the last has seen what the others wrote.
KERNEL(count, 64, 1, Params) {
    u32* counter = reinterpret_cast<u32*>(p.buffer);
    u32* shared = reinterpret_cast<u32*>(shared_memory());
    u32 block = (block_index_z() * grid_blocks_y() + block_index_y()) * grid_blocks_x() + block_index_x();
    if (thread_index() == 0) counter[1 + block] = block;
    fence_device();
    sync_block();
    if (thread_index() == 0) shared[0] = atomic_add_u32(counter, 1);
    sync_block();
    u32 blocks = grid_blocks_x() * grid_blocks_y() * grid_blocks_z();
    if (shared[0] + 1 == blocks && thread_index() == 63) {
        u32 sum = 0;
        for (u32 i = 0; i < blocks; i++) sum += counter[1 + i];
        counter[1 + blocks] = sum;
    }
}
