// Between the product that makes queries, keys and values and attention: biases, q/k norms, rotation, and the append of keys and values to
// pages (layout: docs/cuda.md), with what shapes them or later.
//
// Constants: DTYPE, the element type of pages.
#include "ptx.cuh"

// Warps of a block; each has one head of one row.
#define WARPS 4

#define INTERLEAVED 0

struct Heads {
    // f32 `[rows, query_heads + 2 kv_heads, head_dim]`: queries, keys, values.
    u64 x;
    // f32, one row of `x`; 0 for none.
    u64 bias;
    // f32 `[head_dim]`; 0 for none.
    u64 q_norm, k_norm;
    // f32 `[rows, 2, rope_dim / 2]`: cosines and sines of each row's position.
    u64 rotations;
    // f32 `[rows, query_heads, head_dim]`.
    u64 q;
    // f32 `[rows, kv_heads, head_dim]`; not used where there are pages.
    u64 k, v;
    // u64 `[…]`: addresses of pages; 0 for none.
    u64 pages;
    // u64 `[rows]`: where a row's key and value go, in tokens from the start of the first page.
    u64 places;
    u32 rows, query_heads, kv_heads, head_dim, rope_dim, style, block_tokens;
    f32 eps;
};

// Keys and values that are shaped.
struct Rows {
    // f32 `[rows, kv_heads, head_dim]`.
    u64 k, v;
    // As above; behind those of the rows come the places of blanks, which become zeros.
    u64 pages, places;
    u32 rows, blanks, kv_heads, head_dim, block_tokens, reserved;
};

// Bytes of the keys of a head in a page, and as many of the values.
template <typename P>
DEVICE u64 plane_bytes(const P& p) {
    const u32 element = DTYPE == DTYPE_F32 ? 4 : DTYPE == DTYPE_INT8 ? 1 : 2;
    return static_cast<u64>(p.block_tokens) * p.head_dim * element;
}

// Finite numbers beyond the range, and infinities, become the largest finite number, as in the CPU's tiles.
#if DTYPE == DTYPE_F16
DEVICE u16 narrow(f32 x) { return f32_to_finite_f16(x); }
#elif DTYPE == DTYPE_BF16
DEVICE u16 narrow(f32 x) {
    const u16 narrow = f32_to_bf16(x);
    return (narrow & 0x7fff) == 0x7f80 ? static_cast<u16>(narrow - 1) : narrow;
}
#elif DTYPE == DTYPE_INT8
// Scale of a head of a token: the largest magnitude / 127; NaN where an element is NaN.
DEVICE f32 scale_of(u32 head_dim, const f32* head) {
    f32 largest = 0.0f;
    bool nan = false;
    for (u32 i = lane(); i < head_dim; i += 32) {
        largest = fmaxf(largest, fabsf(head[i]));
        nan = nan || head[i] != head[i];
    }
    largest = fminf(reduce_max(largest), from_bits(0x7f7fffffu));
    return any(nan) ? from_bits(0x7fffffffu) : largest / 127.0f;
}

DEVICE i8 quant_of(f32 x, f32 scale) {
    if (scale != scale || scale == 0.0f) return 0;
    return static_cast<i8>(fminf(fmaxf(rintf(x / scale), -127.0f), 127.0f));
}
#endif

// Writes a head to its place in a page; `values` says which half.
template <typename P>
DEVICE void append(const P& p, u32 row, u32 kv_head, bool values, const f32* head) {
    const u64 place = reinterpret_cast<const u64*>(p.places)[row];
    const u64 page = reinterpret_cast<const u64*>(p.pages)[place / p.block_tokens];
    const u32 token = static_cast<u32>(place % p.block_tokens);
    const u64 plane = plane_bytes(p), scales = DTYPE == DTYPE_INT8 ? p.block_tokens * 4 : 0;
    u8* body = reinterpret_cast<u8*>(page) + kv_head * 2 * (plane + scales);
    u8* elements = body + (values ? plane : 0);
    const u32 first = token * p.head_dim;
#if DTYPE == DTYPE_INT8
    const f32 scale = scale_of(p.head_dim, head);
    if (lane() == 0) reinterpret_cast<f32*>(body + 2 * plane + (values ? scales : 0))[token] = scale;
    for (u32 i = lane(); i < p.head_dim; i += 32) reinterpret_cast<i8*>(elements)[first + i] = quant_of(head[i], scale);
#else
    for (u32 i = lane(); i < p.head_dim; i += 32) {
#if DTYPE == DTYPE_F32
        reinterpret_cast<f32*>(elements)[first + i] = head[i];
#else
        reinterpret_cast<u16*>(elements)[first + i] = narrow(head[i]);
#endif
    }
#endif
}

// Rotates the first `rope_dim` elements of a head by the angles of its row.
DEVICE void rotate(const Heads& p, u32 row, f32* head) {
    const u32 half = p.rope_dim / 2;
    const f32* cos = reinterpret_cast<const f32*>(p.rotations) + static_cast<u64>(row) * 2 * half;
    const f32* sin = cos + half;
    for (u32 i = lane(); i < half; i += 32) {
        const u32 first = p.style == INTERLEAVED ? 2 * i : i, second = p.style == INTERLEAVED ? 2 * i + 1 : i + half;
        const f32 a = head[first], b = head[second];
        head[first] = a * cos[i] - b * sin[i];
        head[second] = a * sin[i] + b * cos[i];
    }
}

// Brings a head into shared memory, with its bias and under its norm.
DEVICE void bring(const Heads& p, u32 row, u32 index, u64 norm, f32* head) {
    const u64 heads = p.query_heads + 2 * p.kv_heads;
    const f32* x = reinterpret_cast<const f32*>(p.x) + (row * heads + index) * p.head_dim;
    const f32* bias = reinterpret_cast<const f32*>(p.bias) + index * p.head_dim;
    f32 squares = 0.0f;
    for (u32 i = lane(); i < p.head_dim; i += 32) {
        head[i] = p.bias == 0 ? x[i] : x[i] + bias[i];
        squares = fmaf(head[i], head[i], squares);
    }
    if (norm != 0) {
        const f32 scale = 1.0f / sqrtf(reduce_add(squares) / static_cast<f32>(p.head_dim) + p.eps);
        for (u32 i = lane(); i < p.head_dim; i += 32) head[i] = head[i] * scale * reinterpret_cast<const f32*>(norm)[i];
    }
}

// A warp is one head of one row; heads of a row are queries, keys, values.
KERNEL(shape_heads, 32 * WARPS, 8, Heads) {
    f32* head = reinterpret_cast<f32*>(shared_memory()) + warp() * p.head_dim;
    const u32 heads = p.query_heads + 2 * p.kv_heads;
    const u64 unit = static_cast<u64>(block_index_x()) * WARPS + warp();
    const u32 row = static_cast<u32>(unit / heads), index = static_cast<u32>(unit % heads);
    if (row >= p.rows) return;
    const bool query = index < p.query_heads, value = index >= p.query_heads + p.kv_heads;
    bring(p, row, index, query ? p.q_norm : value ? 0 : p.k_norm, head);
    sync_warp();
    if (!value) rotate(p, row, head);
    sync_warp();
    const u32 kv_head = value ? index - p.query_heads - p.kv_heads : index - p.query_heads;
    if (!query && p.pages != 0) {
        append(p, row, kv_head, value, head);
        return;
    }
    f32* out = reinterpret_cast<f32*>(query ? p.q : value ? p.v : p.k);
    const u64 at = query ? static_cast<u64>(row) * p.query_heads + index : static_cast<u64>(row) * p.kv_heads + kv_head;
    for (u32 i = lane(); i < p.head_dim; i += 32) out[at * p.head_dim + i] = head[i];
}

// A warp is one head of one row, or of one blank; heads of a row are keys, values.
KERNEL(append_rows, 32 * WARPS, 8, Rows) {
    f32* blank = reinterpret_cast<f32*>(shared_memory()) + warp() * p.head_dim;
    const u32 heads = 2 * p.kv_heads;
    const u64 unit = static_cast<u64>(block_index_x()) * WARPS + warp();
    const u32 row = static_cast<u32>(unit / heads), index = static_cast<u32>(unit % heads);
    if (row >= p.rows + p.blanks) return;
    const bool value = index >= p.kv_heads;
    const u32 kv_head = value ? index - p.kv_heads : index;
    const u64 at = (static_cast<u64>(row) * p.kv_heads + kv_head) * p.head_dim;
    if (row < p.rows) {
        append(p, row, kv_head, value, reinterpret_cast<const f32*>(value ? p.v : p.k) + at);
        return;
    }
    for (u32 i = lane(); i < p.head_dim; i += 32) blank[i] = 0.0f;
    sync_warp();
    append(p, row, kv_head, value, blank);
}
