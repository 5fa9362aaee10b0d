// The emulator's half of ptx.cuh. A thread of a block is a fiber; warp-wide functions and barriers are places where fibers meet, and the
// last to come does the work for all. See threads.cpp.
#pragma once

#include <math.h>
#include <string.h>

namespace emulator {

// A launch as the Rust side passes it.
struct Launch {
    u32 grid[3];
    u32 threads;
    u32 shared_bytes;
    // Threads of the host that run thread blocks.
    u32 workers;
    const void* argument;
    u64 argument_bytes;
    // Counts pairs of rows that an ldmatrix reads from the same banks.
    u64* bank_conflicts;
};

// Where the lanes of a warp, or the threads of a block, meet.
enum class Meeting {
    None,
    SyncBlock,
    SyncWarp,
    Shuffle,
    ShuffleXor,
    Ballot,
    ReduceMax,
    ReduceMin,
    ReduceAdd,
    LoadMatrix,
    LoadMatrixTransposed,
    MmaF16,
    MmaBf16,
    MmaI8,
    // Of a warp group, see groups.cpp.
    Product,
    FenceProducts,
    CommitProducts,
    WaitProducts,
    ChangeRegisters,
    // Of one thread.
    WaitBarrier,
};

// What a lane brings to a function of one number and what it takes away.
struct Exchange {
    u32 value;
    u32 operand;
    u32 result;
};

// What a lane brings to a matrix instruction.
struct Matrices {
    void* d;
    const u32* a;
    const u32* b;
};

// What a lane brings to ldmatrix.
struct Rows {
    u32* registers;
    const void* row;
};

// What a thread knows of itself.
struct Here {
    u32 thread, threads;
    u32 block[3], grid[3];
    u8* shared;
};

const Here& here();
void meet(Meeting meeting, int line, void* brought);
void begin_copy(void* shared, const void* global, bool valid, int line);
void commit();
void wait(u32 groups);
// Ends the launch with an error.
[[noreturn]] void fail(const char* problem, int line);
// `tracked`: it is kept in mind who wrote and read what of shared memory, for kernels of warp groups.
const char* run(const Launch* launch, const char* kernel, u32 threads, u64 bytes, bool tracked, void (*thread)(const void*));

inline u32 exchange(Meeting meeting, u32 value, u32 operand, int line) {
    Exchange brought{value, operand, 0};
    meet(meeting, line, &brought);
    return brought.result;
}

}  // namespace emulator

#define DEVICE [[maybe_unused]] static inline
#define UNROLL
#define NO_UNROLL
#define TRACKED false
#define KERNEL(name, threads, blocks, Params)                                                               \
    static void name##_thread(const Params& p);                                                             \
    extern "C" const char* name(const emulator::Launch* launch) {                                           \
        static_assert((threads) % 32 == 0 && (threads) <= 1024 && (blocks) >= 1, "launch bounds of " #name); \
        return emulator::run(launch, #name, threads, sizeof(Params), TRACKED,                               \
                             [](const void* p) { name##_thread(*static_cast<const Params*>(p)); });         \
    }                                                                                                       \
    static void name##_thread(const Params& p)

// The line of the caller, which error messages name.
#define LINE int line = __builtin_LINE()

DEVICE u32 thread_index() { return emulator::here().thread; }
DEVICE u32 fresh_thread_index() { return thread_index(); }
DEVICE u32 block_threads() { return emulator::here().threads; }
DEVICE u32 block_index_x() { return emulator::here().block[0]; }
DEVICE u32 block_index_y() { return emulator::here().block[1]; }
DEVICE u32 block_index_z() { return emulator::here().block[2]; }
DEVICE u32 grid_blocks_x() { return emulator::here().grid[0]; }
DEVICE u32 grid_blocks_y() { return emulator::here().grid[1]; }
DEVICE u32 grid_blocks_z() { return emulator::here().grid[2]; }
DEVICE u8* shared_memory() { return emulator::here().shared; }

DEVICE void stop(const char* problem, LINE) { emulator::fail(problem, line); }

DEVICE void sync_block(LINE) { emulator::meet(emulator::Meeting::SyncBlock, line, nullptr); }
DEVICE void sync_warp(LINE) { emulator::meet(emulator::Meeting::SyncWarp, line, nullptr); }
DEVICE void fence_device() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
DEVICE u32 atomic_add_u32(u32* to, u32 x) { return __atomic_fetch_add(to, x, __ATOMIC_RELAXED); }

DEVICE u32 bits_of(f32 x) {
    u32 bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
DEVICE f32 from_bits(u32 bits) {
    f32 x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

DEVICE u32 shuffle_xor(u32 x, u32 mask, LINE) {
    return emulator::exchange(emulator::Meeting::ShuffleXor, x, mask, line);
}
DEVICE f32 shuffle_xor(f32 x, u32 mask, LINE) { return from_bits(shuffle_xor(bits_of(x), mask, line)); }
DEVICE u32 shuffle(u32 x, u32 from, LINE) {
    return emulator::exchange(emulator::Meeting::Shuffle, x, from, line);
}
DEVICE f32 shuffle(f32 x, u32 from, LINE) { return from_bits(shuffle(bits_of(x), from, line)); }
DEVICE u32 ballot(bool x, LINE) { return emulator::exchange(emulator::Meeting::Ballot, x, 0, line); }
DEVICE bool any(bool x, LINE) { return ballot(x, line) != 0; }
DEVICE u32 reduce_max(u32 x, LINE) { return emulator::exchange(emulator::Meeting::ReduceMax, x, 0, line); }
DEVICE u32 reduce_min(u32 x, LINE) { return emulator::exchange(emulator::Meeting::ReduceMin, x, 0, line); }
DEVICE u32 reduce_add(u32 x, LINE) { return emulator::exchange(emulator::Meeting::ReduceAdd, x, 0, line); }

DEVICE u32 popcount(u32 x) { return static_cast<u32>(__builtin_popcount(x)); }
DEVICE u32 popcount(u64 x) { return static_cast<u32>(__builtin_popcountll(x)); }
DEVICE u32 find_first(u32 x) { return static_cast<u32>(__builtin_ctz(x)); }
DEVICE u32 find_first(u64 x) { return static_cast<u32>(__builtin_ctzll(x)); }

DEVICE f32 f16_to_f32(u16 x) {
    _Float16 narrow;
    memcpy(&narrow, &x, sizeof narrow);
    return static_cast<f32>(narrow);
}
DEVICE u16 f32_to_f16(f32 x) {
    if (x != x) return 0x7fff;
    _Float16 narrow = static_cast<_Float16>(x);
    u16 bits;
    memcpy(&bits, &narrow, sizeof bits);
    return bits;
}
DEVICE f32 bf16_to_f32(u16 x) { return from_bits(static_cast<u32>(x) << 16); }
DEVICE u16 f32_to_bf16(f32 x) {
    if (x != x) return 0x7fff;
    u32 bits = bits_of(x);
    return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
DEVICE u32 pack_f16(f32 low, f32 high) { return f32_to_f16(low) | static_cast<u32>(f32_to_f16(high)) << 16; }
DEVICE u32 pack_bf16(f32 low, f32 high) { return f32_to_bf16(low) | static_cast<u32>(f32_to_bf16(high)) << 16; }

DEVICE f32 exp2_approx(f32 x) { return exp2f(x); }
DEVICE f32 log2_approx(f32 x) { return log2f(x); }

DEVICE void copy_async_16(void* shared, const void* global, bool valid, LINE) {
    emulator::begin_copy(shared, global, valid, line);
}
DEVICE void commit_copies() { emulator::commit(); }
template <int N>
DEVICE void wait_copies() {
    emulator::wait(N);
}
DEVICE uint4x load_global_once(const void* global, LINE) {
    if (reinterpret_cast<u64>(global) % 16 != 0) emulator::fail("load of 16 bytes is misaligned", line);
    uint4x value;
    memcpy(&value, global, sizeof value);
    return value;
}

DEVICE void load_matrix_x4(u32 (&r)[4], const void* shared, LINE) {
    emulator::Rows brought{r, shared};
    emulator::meet(emulator::Meeting::LoadMatrix, line, &brought);
}
DEVICE void load_matrix_x4_transposed(u32 (&r)[4], const void* shared, LINE) {
    emulator::Rows brought{r, shared};
    emulator::meet(emulator::Meeting::LoadMatrixTransposed, line, &brought);
}
DEVICE void mma_f16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2], LINE) {
    emulator::Matrices brought{d, a, b};
    emulator::meet(emulator::Meeting::MmaF16, line, &brought);
}
DEVICE void mma_bf16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2], LINE) {
    emulator::Matrices brought{d, a, b};
    emulator::meet(emulator::Meeting::MmaBf16, line, &brought);
}
DEVICE void mma_i8(i32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2], LINE) {
    emulator::Matrices brought{d, a, b};
    emulator::meet(emulator::Meeting::MmaI8, line, &brought);
}
