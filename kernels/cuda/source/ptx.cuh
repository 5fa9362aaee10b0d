// What kernels are written with: special registers, warp-wide functions, copies, matrix instructions. The first half is for
// the device (NVRTC, no header of the toolkit), the other for the emulator of the tests, by the same names. Nothing else contains `asm`.
//
// Lane layouts of matrix fragments are those of the PTX manual. Both compilers also know fmaf, fmaxf, fminf, fabsf, sqrtf, rintf,
// expf, logf, sinf, cosf.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef short i16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef long long i64;
typedef float f32;

// 16 bytes that are moved at once.
struct alignas(16) uint4x {
    u32 x, y, z, w;
};

// Element types of K and V (DTYPE).
#define DTYPE_F32 0
#define DTYPE_F16 1
#define DTYPE_BF16 2
#define DTYPE_INT8 3
#define DTYPE_E4M3 4

#if defined(LONGSHORE_EMULATOR)
#include "emulator.h"
#else

#define DEVICE [[maybe_unused]] static __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
// The entry `name`: `threads` of a block, at least `blocks` blocks at once on a multiprocessor, one argument `p`.
#define KERNEL(name, threads, blocks, Params) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Params p)

DEVICE u32 thread_index() { return threadIdx.x; }
// The same, read again: what is computed from it is not kept in registers from one turn of a loop to the next.
DEVICE u32 fresh_thread_index() {
    u32 index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}
DEVICE u32 block_threads() { return blockDim.x; }
DEVICE u32 block_index_x() { return blockIdx.x; }
DEVICE u32 block_index_y() { return blockIdx.y; }
DEVICE u32 block_index_z() { return blockIdx.z; }
DEVICE u32 grid_blocks_x() { return gridDim.x; }
DEVICE u32 grid_blocks_y() { return gridDim.y; }
DEVICE u32 grid_blocks_z() { return gridDim.z; }

// The shared memory that the launch asked for, 16-byte aligned.
DEVICE u8* shared_memory() {
    extern __shared__ uint4x longshore_shared[];
    return reinterpret_cast<u8*>(longshore_shared);
}

DEVICE u32 shared_address(const void* shared) { return static_cast<u32>(__cvta_generic_to_shared(shared)); }

// Ends the launch with a fault; the emulator tells the problem.
DEVICE void stop(const char*) { __trap(); }

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
// Writes before it are seen by other thread blocks before writes after it.
DEVICE void fence_device() { __threadfence(); }
// Counters only: the order of additions is not fixed. Gives what was there.
DEVICE u32 atomic_add_u32(u32* to, u32 x) { return atomicAdd(to, x); }

DEVICE u32 shuffle_xor(u32 x, u32 mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE f32 shuffle_xor(f32 x, u32 mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE u32 shuffle(u32 x, u32 from) { return __shfl_sync(0xffffffffu, x, from); }
DEVICE f32 shuffle(f32 x, u32 from) { return __shfl_sync(0xffffffffu, x, from); }
DEVICE u32 ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
DEVICE bool any(bool x) { return __any_sync(0xffffffffu, x); }
DEVICE u32 reduce_max(u32 x) { return __reduce_max_sync(0xffffffffu, x); }
DEVICE u32 reduce_min(u32 x) { return __reduce_min_sync(0xffffffffu, x); }
DEVICE u32 reduce_add(u32 x) { return __reduce_add_sync(0xffffffffu, x); }

DEVICE u32 popcount(u32 x) { return __popc(x); }
DEVICE u32 popcount(u64 x) { return __popcll(x); }
// Number of the lowest set bit; `x` is not 0.
DEVICE u32 find_first(u32 x) { return __ffs(x) - 1; }
DEVICE u32 find_first(u64 x) { return __ffsll(x) - 1; }

DEVICE u32 bits_of(f32 x) { return __float_as_uint(x); }
DEVICE f32 from_bits(u32 x) { return __uint_as_float(x); }

DEVICE f32 f16_to_f32(u16 x) {
    f32 wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
    return wide;
}
// Rounded to nearest even; what is beyond the range becomes infinite, NaN becomes 0x7fff.
DEVICE u16 f32_to_f16(f32 x) {
    u16 narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow) : "f"(x));
    return narrow;
}
DEVICE f32 bf16_to_f32(u16 x) { return __uint_as_float(static_cast<u32>(x) << 16); }
DEVICE u16 f32_to_bf16(f32 x) {
    u16 narrow;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow) : "f"(x));
    return narrow;
}
// Two numbers, `low` in the lower half; rounded as above.
DEVICE u32 pack_f16(f32 low, f32 high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
DEVICE u32 pack_bf16(f32 low, f32 high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// 2^x, to 2 ulp; 0 for −∞.
DEVICE f32 exp2_approx(f32 x) {
    f32 power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}
// log2(x); −∞ for 0.
DEVICE f32 log2_approx(f32 x) {
    f32 log;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log) : "f"(x));
    return log;
}

// Begins to copy 16 bytes, or zeros when not `valid`; both addresses are multiples of 16. They are there after wait_copies, for
// other threads after a barrier that follows it.
DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
// Closes a group of the copies that this thread began.
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }
// Waits until at most N of this thread's newest groups are under way.
template <int N>
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}

// Loads 16 bytes of global memory that are read once and that nobody writes meanwhile.
DEVICE uint4x load_global_once(const void* global) {
    uint4x value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(global));
    return value;
}

// Four 8×8 matrices of 16-bit elements: lane l brings the address of row l % 8 of matrix l / 8, 16 bytes; register j of lane l
// gets elements 2 (l % 4) and the next of row l / 4 of matrix j.
DEVICE void load_matrix_x4(u32 (&r)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
}
// The same of the matrices transposed.
DEVICE void load_matrix_x4_transposed(u32 (&r)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

// d += a b, 16×16 by 16×8. With g = lane / 4, t = lane % 4: a[0], a[1] are columns 2t and the next of rows g and g + 8, a[2], a[3]
// those 8 further; b[0] are rows 2t and the next of column g, b[1] those 8 further; d[0], d[1] are columns 2t and the next of row
// g, d[2], d[3] of row g + 8.
DEVICE void mma_f16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_bf16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same of 8-bit integers, 16×32 by 32×8: four elements a register, 4t and the next three, those of the second half 16 further.
DEVICE void mma_i8(i32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

// What follows is the same in both.

DEVICE u32 lane() { return thread_index() % 32; }
DEVICE u32 warp() { return thread_index() / 32; }

DEVICE f32 negative_infinity() { return from_bits(0xff800000u); }

DEVICE void unpack_f16(u32 both, f32& low, f32& high) {
    low = f16_to_f32(static_cast<u16>(both & 0xffff));
    high = f16_to_f32(static_cast<u16>(both >> 16));
}
DEVICE void unpack_bf16(u32 both, f32& low, f32& high) {
    low = from_bits(both << 16);
    high = from_bits(both & 0xffff0000u);
}

// Largest and sum over the lanes of a warp, in a fixed order.
DEVICE f32 reduce_max(f32 x) {
    for (u32 mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}
DEVICE f32 reduce_add(f32 x) {
    for (u32 mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

// Sums and products of two f16 at once, each rounded once.
#if defined(LONGSHORE_EMULATOR)
DEVICE u32 add_f16x2(u32 a, u32 b) {
    f32 a_low, a_high, b_low, b_high;
    unpack_f16(a, a_low, a_high);
    unpack_f16(b, b_low, b_high);
    return pack_f16(a_low + b_low, a_high + b_high);
}
// The sum is exact in double precision but for terms that lie 2^30 and more apart.
DEVICE u16 fma_f16(f32 a, f32 b, f32 c) {
    const _Float16 sum = static_cast<_Float16>(static_cast<double>(a) * b + c);
    u16 bits;
    memcpy(&bits, &sum, sizeof bits);
    return bits;
}
DEVICE u32 fma_f16x2(u32 a, u32 b, u32 c) {
    f32 a_low, a_high, b_low, b_high, c_low, c_high;
    unpack_f16(a, a_low, a_high);
    unpack_f16(b, b_low, b_high);
    unpack_f16(c, c_low, c_high);
    return fma_f16(a_low, b_low, c_low) | static_cast<u32>(fma_f16(a_high, b_high, c_high)) << 16;
}
#else
DEVICE u32 add_f16x2(u32 a, u32 b) {
    u32 sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}
DEVICE u32 fma_f16x2(u32 a, u32 b, u32 c) {
    u32 sum;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}
#endif

// Member functions.
#if defined(LONGSHORE_EMULATOR)
#define DEVICE_MEMBER inline
#else
#define DEVICE_MEMBER __device__ __forceinline__
#endif

// a · b, rounded by itself: never fused with an addition that follows.
DEVICE f32 multiply_rounded(f32 a, f32 b) {
#if defined(LONGSHORE_EMULATOR)
    volatile f32 product = a * b;
    return product;
#else
    return __fmul_rn(a, b);
#endif
}

// An 8×8 matrix of 16-bit elements turned round: in and out, a lane has elements 2 (lane % 4) and the next of row lane / 4.
DEVICE u32 transpose_8x8(u32 x) {
#if defined(LONGSHORE_EMULATOR)
    u32 from = lane() % 4 * 8 + lane() / 8, shift = lane() / 4 % 2 * 16;
    u32 low = shuffle(x, from), high = shuffle(x, from + 4);
    return (low >> shift & 0xffff) | (high >> shift & 0xffff) << 16;
#else
    u32 turned;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(x));
    return turned;
#endif
}

// Bytes of `a` (0 to 3) and `b` (4 to 7), by the nibbles of `selector`, the lowest first.
DEVICE u32 permute_bytes(u32 a, u32 b, u32 selector) {
#if defined(LONGSHORE_EMULATOR)
    u64 bytes = a | static_cast<u64>(b) << 32;
    u32 permuted = 0;
    for (u32 i = 0; i < 4; ++i) permuted |= static_cast<u32>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return permuted;
#else
    return __byte_perm(a, b, selector);
#endif
}

// Differences of the f16 in both halves.
DEVICE u32 subtract_f16x2(u32 a, u32 b) {
#if defined(LONGSHORE_EMULATOR)
    f32 a_low, a_high, b_low, b_high;
    unpack_f16(a, a_low, a_high);
    unpack_f16(b, b_low, b_high);
    return pack_f16(a_low - b_low, a_high - b_high);
#else
    u32 difference;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
    return difference;
#endif
}

// Bytes I and J of a word, int8, as f16, exactly: a byte plus 128 behind the exponent of 1024 is 1152 too much.
template <u32 I, u32 J>
DEVICE u32 int8_to_f16(u32 word) {
    return subtract_f16x2(permute_bytes(word ^ 0x80808080u, 0x64646464u, I | 4 << 4 | J << 8 | 4 << 12), 0x64806480u);
}

// Bytes I and J of a word, e4m3, as f16 that are 256 times smaller, exactly. NaN becomes ±480 / 256.
template <u32 I, u32 J>
DEVICE u32 e4m3_to_f16(u32 word) {
    u32 high = permute_bytes(word, 0, 4 | I << 4 | 4 << 8 | J << 12);
    return (high & 0x80008000u) | (high & 0x7f007f00u) >> 1;
}

DEVICE f32 e4m3_to_f32(u8 x) {
    if ((x & 0x7f) == 0x7f) return from_bits(0x7fc00000u);
    return f16_to_f32(static_cast<u16>((x & 0x80) << 8 | (x & 0x7f) << 7)) * 256.0f;
}

// Rounded to nearest even; what is beyond the range becomes the largest, 448.
DEVICE u8 f32_to_e4m3(f32 x) {
    u32 bits = bits_of(x), sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
    if (size > 0x7f800000u) return static_cast<u8>(sign | 0x7f);
    if (size >= 0x43e00000u) return static_cast<u8>(sign | 0x7e);
    if (size < 0x3c800000u) {
        // Below 2^−6 elements are multiples of 2^−9, which are those of f32 beside 2^14.
        f32 shifted = from_bits(size) + 16384.0f;
        return static_cast<u8>(sign | (bits_of(shifted) - 0x46800000u));
    }
    u32 rounded = size + 0x7ffff + (size >> 20 & 1);
    return static_cast<u8>(sign | ((rounded >> 20) - (120 << 3)));
}

typedef double f64;

// Sums of integers are the same in any order.
DEVICE void atomic_add_u64(u64* to, u64 x) {
#if defined(LONGSHORE_EMULATOR)
    __atomic_fetch_add(to, x, __ATOMIC_RELAXED);
#else
    atomicAdd(to, x);
#endif
}

// The nearest f16; finite numbers beyond the range, and infinities, become the largest finite number, as in the CPU's tiles.
DEVICE u16 f32_to_finite_f16(f32 x) { return f32_to_f16(x != x ? x : fminf(fmaxf(x, -65504.0f), 65504.0f)); }

#if defined(DTYPE)
// The product in the type of the source: bf16, else f16, which 8-bit elements become.
DEVICE void multiply(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if DTYPE == DTYPE_BF16
    mma_bf16(d, a, b);
#else
    mma_f16(d, a, b);
#endif
}
#endif
