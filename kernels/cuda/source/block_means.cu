// Summaries of full blocks from their pages: mean key and value, spread of the keys, their mean cosine with the mean, and the bounds of
// each element of the keys (Quest). Means, spreads and cosines have the bits of the CPU's `Mean`: each sum has its order, products that
// are rounded by themselves are written so. A thread block makes one KV head of one block.
//
// DTYPE: of the pages. HEAD_DIM. SUMMARY: element type of the rounded means and of the bounds (0, 1 or 2).
#include "ptx.cuh"

struct Params {
    u64 pages;        // u64 addresses, one of each block
    u64 key;          // f32 [kv_heads][capacity][HEAD_DIM]; this and the others: 0 where it is not wanted
    u64 value;        // the same
    u64 spread;       // the same
    u64 cosines;      // f32 [kv_heads][capacity]
    u64 key_rounded;  // SUMMARY [kv_heads][capacity][HEAD_DIM]
    u64 value_rounded;
    u64 key_least;
    u64 key_most;
    u32 first;        // place of the first block
    u32 capacity;     // places from one KV head to the next: 1 where each block has those of its heads side by side
    u32 tokens;
    u32 stride;       // places from one block to the next: 1, or KV heads
};

#if DTYPE == DTYPE_F32
const u32 ELEMENT_BYTES = 4;
#elif DTYPE == DTYPE_F16 || DTYPE == DTYPE_BF16
const u32 ELEMENT_BYTES = 2;
#else
const u32 ELEMENT_BYTES = 1;
#endif
const bool SCALED = ELEMENT_BYTES == 1;

// One KV head of a page.
struct Head {
    const u8* k;
    const u8* v;
    const f32* k_scales;
    const f32* v_scales;
};

DEVICE Head head_of(const Params& p) {
    u64 side = u64(p.tokens) * HEAD_DIM * ELEMENT_BYTES;
    u64 size = 2 * side + (SCALED ? u64(8) * p.tokens : 0);
    u64 at = reinterpret_cast<const u64*>(p.pages)[block_index_x()] + block_index_y() * size;
    Head head;
    head.k = reinterpret_cast<const u8*>(at);
    head.v = head.k + side;
    head.k_scales = reinterpret_cast<const f32*>(head.v + side);
    head.v_scales = head.k_scales + p.tokens;
    return head;
}

// Element `index` of a token, as it counts.
DEVICE f32 element(const u8* rows, [[maybe_unused]] const f32* scales, u32 token, u32 index) {
    u64 at = u64(token) * HEAD_DIM + index;
#if DTYPE == DTYPE_F32
    return reinterpret_cast<const f32*>(rows)[at];
#elif DTYPE == DTYPE_F16
    return f16_to_f32(reinterpret_cast<const u16*>(rows)[at]);
#elif DTYPE == DTYPE_BF16
    return bf16_to_f32(reinterpret_cast<const u16*>(rows)[at]);
#elif DTYPE == DTYPE_INT8
    return multiply_rounded(static_cast<f32>(reinterpret_cast<const i8*>(rows)[at]), scales[token]);
#else
    return multiply_rounded(e4m3_to_f32(rows[at]), scales[token]);
#endif
}

// Stores `x` as a SUMMARY element.
DEVICE void store_rounded(u64 to, u64 at, f32 x) {
    if (!to) return;
#if SUMMARY == DTYPE_F32
    reinterpret_cast<f32*>(to)[at] = x;
#elif SUMMARY == DTYPE_F16
    reinterpret_cast<u16*>(to)[at] = f32_to_f16(fminf(fmaxf(x, -65504.0f), 65504.0f));
#else
    reinterpret_cast<u16*>(to)[at] = f32_to_bf16(x);
#endif
}

DEVICE void store(u64 to, u64 at, f32 x) {
    if (to) reinterpret_cast<f32*>(to)[at] = x;
}

DEVICE void key_element(const Params& p, const Head& head, u64 at, u32 index, f32* means) {
    f32 sum = 0.0f, least = from_bits(0x7f800000u), most = negative_infinity();
    _Pragma("unroll 8") for (u32 token = 0; token < p.tokens; ++token) {
        f32 x = element(head.k, head.k_scales, token, index);
        sum += x;
        least = fminf(least, x);
        most = fmaxf(most, x);
    }
    f32 share = 1.0f / static_cast<f32>(p.tokens), mean = multiply_rounded(sum, share);
    means[index] = mean;
    store(p.key, at + index, mean);
    store_rounded(p.key_rounded, at + index, mean);
    store_rounded(p.key_least, at + index, least);
    store_rounded(p.key_most, at + index, most);
    if (!p.spread) return;
    f32 squares = 0.0f;
    _Pragma("unroll 8") for (u32 token = 0; token < p.tokens; ++token) {
        f32 off = element(head.k, head.k_scales, token, index) - mean;
        squares = fmaf(off, off, squares);
    }
    store(p.spread, at + index, multiply_rounded(squares, share));
}

DEVICE void value_element(const Params& p, const Head& head, u64 at, u32 index) {
    f32 sum = 0.0f;
    _Pragma("unroll 8") for (u32 token = 0; token < p.tokens; ++token) {
        sum += element(head.v, head.v_scales, token, index);
    }
    f32 mean = multiply_rounded(sum, 1.0f / static_cast<f32>(p.tokens));
    store(p.value, at + index, mean);
    store_rounded(p.value_rounded, at + index, mean);
}

DEVICE f32 cosine(const Head& head, u32 token, const f32* means, f32 length) {
    f32 products = 0.0f, squares = 0.0f;
    for (u32 index = 0; index < HEAD_DIM; ++index) {
        f32 key = element(head.k, head.k_scales, token, index);
        products = fmaf(key, means[index], products);
        squares = fmaf(key, key, squares);
    }
    f32 cosine = products / multiply_rounded(sqrtf(squares), length);
    // Zero where it is no number.
    return fabsf(cosine) < from_bits(0x7f800000u) ? cosine : 0.0f;
}

// Grid: (blocks, KV heads). Shared memory: (HEAD_DIM + tokens + 1) f32.
KERNEL(block_means, 256, 4, Params) {
    Head head = head_of(p);
    u64 place = u64(block_index_y()) * p.capacity + u64(p.first + block_index_x()) * p.stride;
    f32* means = reinterpret_cast<f32*>(shared_memory());
    f32* cosines = means + HEAD_DIM;
    for (u32 index = thread_index(); index < 2 * HEAD_DIM; index += block_threads()) {
        if (index < HEAD_DIM) key_element(p, head, place * HEAD_DIM, index, means);
        else value_element(p, head, place * HEAD_DIM, index - HEAD_DIM);
    }
    sync_block();
    if (!p.cosines) return;
    if (thread_index() == 0) {
        f32 squares = 0.0f;
        for (u32 index = 0; index < HEAD_DIM; ++index) squares = fmaf(means[index], means[index], squares);
        cosines[p.tokens] = sqrtf(squares);
    }
    sync_block();
    for (u32 token = thread_index(); token < p.tokens; token += block_threads()) {
        cosines[token] = cosine(head, token, means, cosines[p.tokens]);
    }
    sync_block();
    if (thread_index() > 0) return;
    f32 sum = 0.0f;
    for (u32 token = 0; token < p.tokens; ++token) sum += cosines[token];
    store(p.cosines, place, multiply_rounded(sum, 1.0f / static_cast<f32>(p.tokens)));
}
