// Work on rows between linear layers: RMSNorm, narrowing, gates, choice of rows.
//
// DTYPE is that of `out`; 16-bit rows are what linear layers take: `out_stride` is a multiple of 128, elements past `width` are zero, and
// finite numbers beyond the range of f16 become its largest.
#include "ptx.cuh"

struct Rows {
    // f32 `[…, width]`; swiglu: f32 `[rows, out_stride of the product]`, see there.
    u64 x;
    // norm: f32 `[width]`.
    u64 weight;
    // DTYPE `[rows, out_stride]`.
    u64 out;
    // u32 `[rows]`: which rows of `x`; 0 is all of them in order.
    u64 chosen;
    u32 rows, width, x_stride, out_stride;
    f32 eps;
    u32 reserved;
};

DEVICE void store(const Rows& p, u32 row, u32 column, f32 x) {
    const u64 at = static_cast<u64>(row) * p.out_stride + column;
#if DTYPE == DTYPE_F32
    reinterpret_cast<f32*>(p.out)[at] = x;
#elif DTYPE == DTYPE_F16
    reinterpret_cast<u16*>(p.out)[at] = f32_to_finite_f16(x);
#else
    reinterpret_cast<u16*>(p.out)[at] = f32_to_bf16(x);
#endif
}

DEVICE const f32* row_of(const Rows& p, u32 row) {
    const u32 from = p.chosen == 0 ? row : reinterpret_cast<const u32*>(p.chosen)[row];
    return reinterpret_cast<const f32*>(p.x) + static_cast<u64>(from) * p.x_stride;
}

// Sum over a block of 256, in a fixed order.
DEVICE f32 block_sum(f32 x) {
    f32* sums = reinterpret_cast<f32*>(shared_memory());
    x = reduce_add(x);
    if (lane() == 0) sums[warp()] = x;
    sync_block();
    f32 total = 0.0f;
    for (u32 i = 0; i < 8; i++) total += sums[i];
    return total;
}

// A block is one row: x / sqrt(mean(x²) + eps) · weight, the mean in f32.
KERNEL(norm_rows, 256, 4, Rows) {
    const u32 row = block_index_x();
    const f32 *x = row_of(p, row), *weight = reinterpret_cast<const f32*>(p.weight);
    f32 squares = 0.0f;
    for (u32 i = thread_index(); i < p.width; i += 256) squares = fmaf(x[i], x[i], squares);
    const f32 scale = 1.0f / sqrtf(block_sum(squares) / static_cast<f32>(p.width) + p.eps);
    for (u32 i = thread_index(); i < p.out_stride; i += 256) store(p, row, i, i < p.width ? x[i] * scale * weight[i] : 0.0f);
}

// A block is one row, as it is.
KERNEL(narrow_rows, 256, 4, Rows) {
    const u32 row = block_index_x();
    const f32* x = row_of(p, row);
    for (u32 i = thread_index(); i < p.out_stride; i += 256) store(p, row, i, i < p.width ? x[i] : 0.0f);
}

// A block is one row of gates and ups, eight of each in turn: silu(gate) · up.
KERNEL(swiglu_rows, 256, 4, Rows) {
    const u32 row = block_index_x();
    const f32* x = row_of(p, row);
    for (u32 i = thread_index(); i < p.out_stride; i += 256) {
        f32 gated = 0.0f;
        if (i < p.width) {
            const f32 gate = x[i / 8 * 16 + i % 8], up = x[i / 8 * 16 + i % 8 + 8];
            gated = gate / (1.0f + expf(-gate)) * up;
        }
        store(p, row, i, gated);
    }
}

// A block is one row of an f32 table: the embedding of a token (`chosen`).
KERNEL(copy_rows, 256, 4, Rows) {
    const u32 row = block_index_x();
    const f32* x = row_of(p, row);
    f32* out = reinterpret_cast<f32*>(p.out) + static_cast<u64>(row) * p.out_stride;
    for (u32 i = thread_index(); i < p.width; i += 256) out[i] = x[i];
}

struct Memory {
    u64 out, words;
};

// Clears 32-bit words.
KERNEL(clear_words, 256, 4, Memory) {
    u32* out = reinterpret_cast<u32*>(p.out);
    const u64 stride = static_cast<u64>(grid_blocks_x()) * 256;
    for (u64 i = static_cast<u64>(block_index_x()) * 256 + thread_index(); i < p.words; i += stride) out[i] = 0;
}
