// What only Hopper has (sm_90a): products of a warp group, barriers in shared memory, registers that move between warp groups. As in ptx.cuh
// the first half is for the device, the other for the emulator.
//
// Sources of what is said here: PTX ISA 9.0, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions" (9.7.15), there above all
// "Register Fragments and Shared Memory Matrix Layouts" (9.7.15.5.1) with "Canonical Layouts" and "Matrix Descriptor Format"; "mbarrier"; "setmaxnreg";
// "Async proxy". Never run on a GPU.
#pragma once
#include "ptx.cuh"

// A barrier in shared memory: phases, each of which ends when as many have arrived as were named at the beginning.
struct alignas(8) Barrier {
    u64 state;
};

// How a matrix of 16-bit elements lies in shared memory, for the products below: in bands of 128 bytes, whose 16-byte pieces are exchanged:
// bits 4 to 6 of an address are those of the number of the piece, exclusive or bits 7 to 9. Bands begin at multiples of 1024.
//   Along the sum (K-major, "((8,m),(T,2k)):((8T,SBO),(1,T))"): a row of 128 bytes is 64 elements of the sum of one column of B; 8 columns
//   lie one after the other, the next 8 `stride` bytes further. `leading` is not used.
//   Across it (MN-major, "((T,8,m),(8,k)):((1,T,LBO),(8T,SBO))"): a row of 128 bytes is one element of the sum of 64 columns of B; 8 of the sum lie
//   one after the other, the next 8 `stride` bytes further; the next 64 columns `leading` bytes further.
// Further elements of the sum within a band are named by the address at which they would lie were nothing exchanged.
#define MATRIX_SWIZZLE_128 (1ull << 62)

#if defined(LONGSHORE_EMULATOR)
#include "emulator_group.h"
#else

// One thread, before a barrier of the block that all others wait at.
DEVICE void init_barrier(Barrier& barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
// What this thread did before is seen by who waits for the phase.
DEVICE void arrive(Barrier& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(shared_address(&barrier)) : "memory");
}
// A wait that never ends would hang the device: after so many tries, each of which takes its time, the kernel ends with a fault.
#define WAIT_TRIES (1u << 22)
// All lanes of a warp wait until the current phase, whose number is even (0) or odd (1), or the one before it, if that is, has ended.
DEVICE void wait_barrier(Barrier& barrier, u32 parity) {
    u32 at = shared_address(&barrier), over = 0;
    NO_UNROLL for (u32 tries = 0; tries < WAIT_TRIES && !over; tries++) {
        asm volatile(
            "{ .reg .pred over; mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2; selp.u32 %0, 1, 0, over; }"
            : "=r"(over)
            : "r"(at), "r"(parity)
            : "memory");
    }
    if (!over) __trap();
    // What follows may need all lanes at once.
    sync_warp();
}

// What this thread wrote to shared memory is seen by products of warp groups, whose accesses go another way than others, once a barrier
// has told that it is there.
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

// The threads of this warp group give registers back, or take some and wait for them: they have N from now on.
template <u32 N>
DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(N));
}
template <u32 N>
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(N));
}

// The compiler keeps accesses to these registers on their side of what comes before and after.
template <u32 N>
DEVICE void settle(f32 (&registers)[N][4]) {
    UNROLL for (u32 n = 0; n < N; n++) {
        UNROLL for (u32 i = 0; i < 4; i++) asm volatile("" : "+f"(registers[n][i]) : : "memory");
    }
}
template <u32 N>
DEVICE void settle(u32 (&registers)[N][4]) {
    UNROLL for (u32 n = 0; n < N; n++) {
        UNROLL for (u32 i = 0; i < 4; i++) asm volatile("" : "+r"(registers[n][i]) : : "memory");
    }
}

// Before products: all registers that they use, and that were touched since the last were waited for.
template <typename... Registers>
DEVICE void fence_products(Registers&... registers) {
    (settle(registers), ...);
    asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
}
// Closes a group of the products that this warp group began.
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }
// Waits until at most N of the newest groups are under way. Until then nobody touches the registers of a product, which are named here, and
// nobody writes what it reads of shared memory.
template <u32 N, typename... Registers>
DEVICE void wait_products(Registers&... registers) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(N) : "memory");
    (settle(registers), ...);
}

DEVICE u64 matrix_descriptor(const void* shared, u32 leading, u32 stride) {
    return MATRIX_SWIZZLE_128 | static_cast<u64>(stride >> 4) << 32 | static_cast<u64>(leading >> 4) << 16 |
           (shared_address(shared) & 0x3ffff) >> 4;
}

#define OPERANDS_64 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define OPERANDS_128 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define EIGHT(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define REGISTERS_64 EIGHT(0), EIGHT(1), EIGHT(2), EIGHT(3), EIGHT(4), EIGHT(5), EIGHT(6), EIGHT(7)
#define REGISTERS_128 \
    REGISTERS_64, EIGHT(8), EIGHT(9), EIGHT(10), EIGHT(11), EIGHT(12), EIGHT(13), EIGHT(14), EIGHT(15)

// d += a b, 64×16 by 16×N, N 64 or 128, asynchronously. Warp w of the group has rows 16 w and the next 15 of a and d: each lane of a what it has of
// `mma_f16`, of d the same N / 8 times side by side (figures "WGMMA .m64nNk16 register fragment layout for matrix A", "… for accumulator matrix D").
// `ACROSS`: b lies across the sum in shared memory, else along it.
template <bool ACROSS>
DEVICE void wgmma_f16(f32 (&d)[8][4], const u32 (&a)[4], u64 b) {
    asm volatile("{ .reg .pred add; setp.ne.b32 add, 1, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " OPERANDS_64
                 ", {%32, %33, %34, %35}, %36, add, 1, 1, %37; }"
                 : REGISTERS_64
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ACROSS ? 1 : 0));
}
template <bool ACROSS>
DEVICE void wgmma_f16(f32 (&d)[16][4], const u32 (&a)[4], u64 b) {
    asm volatile("{ .reg .pred add; setp.ne.b32 add, 1, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " OPERANDS_128
                 ", {%64, %65, %66, %67}, %68, add, 1, 1, %69; }"
                 : REGISTERS_128
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ACROSS ? 1 : 0));
}
template <bool ACROSS>
DEVICE void wgmma_bf16(f32 (&d)[8][4], const u32 (&a)[4], u64 b) {
    asm volatile("{ .reg .pred add; setp.ne.b32 add, 1, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " OPERANDS_64
                 ", {%32, %33, %34, %35}, %36, add, 1, 1, %37; }"
                 : REGISTERS_64
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ACROSS ? 1 : 0));
}
template <bool ACROSS>
DEVICE void wgmma_bf16(f32 (&d)[16][4], const u32 (&a)[4], u64 b) {
    asm volatile("{ .reg .pred add; setp.ne.b32 add, 1, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " OPERANDS_128
                 ", {%64, %65, %66, %67}, %68, add, 1, 1, %69; }"
                 : REGISTERS_128
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ACROSS ? 1 : 0));
}

// The product in the type of the source: bf16, else f16.
template <bool ACROSS, u32 N>
DEVICE void multiply_group(f32 (&d)[N][4], const u32 (&a)[4], u64 b) {
#if DTYPE == DTYPE_BF16
    wgmma_bf16<ACROSS>(d, a, b);
#else
    wgmma_f16<ACROSS>(d, a, b);
#endif
}

#endif

// What follows is the same in both.

// The descriptor of what lies `bytes`, a multiple of 16, further.
DEVICE u64 moved(u64 descriptor, u32 bytes) { return descriptor + (bytes >> 4); }
