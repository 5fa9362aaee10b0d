// Pages of floats to pages of 8-bit elements with a scale for each token, KV head and side: int8 by the rule of the CPU's `Tile::write`
// (the same bits), e4m3 by the same rule with 448 in place of 127. A warp takes one side of one token at a time.
//
// DTYPE: of the source, 0 to 2. TO: 3 (int8) or 4 (e4m3). HEAD_DIM.
#include "ptx.cuh"

struct Params {
    u64 from;  // u64 addresses of pages
    u64 to;    // u64 addresses of pages
    u32 kv_heads;
    u32 tokens;  // of a page
};

const u32 EACH = (HEAD_DIM + 31) / 32;
const u32 SOURCE_BYTES = DTYPE == DTYPE_F32 ? 4 : 2;

DEVICE f32 element(const u8* row, u32 index) {
#if DTYPE == DTYPE_F32
    return reinterpret_cast<const f32*>(row)[index];
#elif DTYPE == DTYPE_F16
    return f16_to_f32(reinterpret_cast<const u16*>(row)[index]);
#else
    return bf16_to_f32(reinterpret_cast<const u16*>(row)[index]);
#endif
}

// Rounded to the nearest even multiple of the scale; beyond the range the largest.
DEVICE u8 narrow(f32 x, f32 scale) {
    f32 steps = scale == 0.0f ? 0.0f : x / scale;
#if TO == DTYPE_INT8
    return static_cast<u8>(static_cast<i8>(fminf(fmaxf(rintf(steps), -127.0f), 127.0f)));
#else
    return f32_to_e4m3(steps);
#endif
}

DEVICE void quantise(const u8* from, u8* to, f32* scale_to) {
    f32 x[EACH];
    f32 largest = 0.0f;
    bool is_number = true;
    UNROLL for (u32 i = 0; i < EACH; ++i) {
        u32 index = i * 32 + lane();
        x[i] = index < HEAD_DIM ? element(from, index) : 0.0f;
        is_number = is_number && x[i] == x[i];
        largest = fmaxf(largest, fabsf(x[i]));
    }
    bool has_nan = any(!is_number);
    const f32 most = TO == DTYPE_INT8 ? 127.0f : 448.0f;
    f32 scale = fminf(reduce_max(largest), from_bits(0x7f7fffffu)) / most;
    UNROLL for (u32 i = 0; i < EACH; ++i) {
        u32 index = i * 32 + lane();
        if (index < HEAD_DIM) to[index] = has_nan ? 0 : narrow(x[i], scale);
    }
    if (lane() == 0) *scale_to = has_nan ? from_bits(0x7fc00000u) : scale;
}

// Grid: (pages, KV heads).
KERNEL(quantise_pages, 256, 4, Params) {
    u64 side = u64(p.tokens) * HEAD_DIM;
    u64 from = reinterpret_cast<const u64*>(p.from)[block_index_x()] + block_index_y() * 2 * side * SOURCE_BYTES;
    u64 to = reinterpret_cast<const u64*>(p.to)[block_index_x()] + block_index_y() * (2 * side + u64(8) * p.tokens);
    f32* scales = reinterpret_cast<f32*>(to + 2 * side);
    // Row r of K and V together has its scale at place r.
    for (u32 row = warp(); row < 2 * p.tokens; row += block_threads() / 32) {
        const u8* elements = reinterpret_cast<const u8*>(from) + u64(row) * HEAD_DIM * SOURCE_BYTES;
        quantise(elements, reinterpret_cast<u8*>(to) + u64(row) * HEAD_DIM, scales + row);
    }
}
