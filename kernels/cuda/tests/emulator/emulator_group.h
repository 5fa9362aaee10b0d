// The emulator's half of warpgroup.cuh. See groups.cpp and products.cpp.
#pragma once

namespace emulator {

// What a lane brings to a product of its warp group.
struct Product {
    f32* d;
    const u32* a;
    u64 b;
    u32 columns;
    bool across;
    bool bf16;
};

u32 shared_address(const void* shared);
void init_barrier(Barrier& barrier, u32 arrivals, int line);
void arrive(Barrier& barrier, int line);
void wait_barrier(Barrier& barrier, u32 parity, int line);
void fence_async_proxy();
// These registers are as they are now at the fence that follows.
void settle(const void* registers, u64 bytes);
// The wait that follows names these registers.
void name_registers(const void* registers, u64 bytes);

}  // namespace emulator

#undef TRACKED
#define TRACKED true

DEVICE u32 shared_address(const void* shared) { return emulator::shared_address(shared); }
DEVICE void init_barrier(Barrier& barrier, u32 arrivals, LINE) { emulator::init_barrier(barrier, arrivals, line); }
DEVICE void arrive(Barrier& barrier, LINE) { emulator::arrive(barrier, line); }
DEVICE void wait_barrier(Barrier& barrier, u32 parity, LINE) {
    emulator::wait_barrier(barrier, parity, line);
    sync_warp(line);
}
DEVICE void fence_async_proxy() { emulator::fence_async_proxy(); }

template <u32 N>
DEVICE void give_registers(LINE) {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256, "registers of a thread");
    emulator::exchange(emulator::Meeting::ChangeRegisters, N, 0, line);
}
template <u32 N>
DEVICE void take_registers(LINE) {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256, "registers of a thread");
    emulator::exchange(emulator::Meeting::ChangeRegisters, N, 1, line);
}

// No function can have both a list of any length and the line of its caller.
struct Products {
    int line;
    template <typename... Registers>
    void fence(Registers&... registers) const {
        (emulator::settle(&registers, sizeof registers), ...);
        emulator::meet(emulator::Meeting::FenceProducts, line, nullptr);
    }
    template <typename... Registers>
    void wait(u32 groups, Registers&... registers) const {
        (emulator::name_registers(&registers, sizeof registers), ...);
        emulator::meet(emulator::Meeting::WaitProducts, line, &groups);
    }
};
#define fence_products(...) Products{__LINE__}.fence(__VA_ARGS__)
DEVICE void commit_products(LINE) { emulator::meet(emulator::Meeting::CommitProducts, line, nullptr); }
template <u32 N, typename A>
DEVICE void wait_products(A& a, LINE) {
    Products{line}.wait(N, a);
}
template <u32 N, typename A, typename B>
DEVICE void wait_products(A& a, B& b, LINE) {
    Products{line}.wait(N, a, b);
}

DEVICE u64 matrix_descriptor(const void* shared, u32 leading, u32 stride) {
    return MATRIX_SWIZZLE_128 | static_cast<u64>(stride >> 4) << 32 | static_cast<u64>(leading >> 4) << 16 |
           (shared_address(shared) & 0x3ffff) >> 4;
}

#if defined(DTYPE)
template <bool ACROSS, u32 N>
DEVICE void multiply_group(f32 (&d)[N][4], const u32 (&a)[4], u64 b, LINE) {
    static_assert(N == 8 || N == 16, "64 or 128 columns");
    emulator::Product brought{&d[0][0], a, b, 8 * N, ACROSS, DTYPE == DTYPE_BF16};
    emulator::meet(emulator::Meeting::Product, line, &brought);
}
#endif
