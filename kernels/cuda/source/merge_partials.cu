// Merges partials of the same rows in the order of their list, with the bits of the CPU's `Partials::merge`, and divides if asked to.
// A partial is a record f32 (m, l, o[head_dim]), as it travels. A warp merges one record of all sources, lanes share out the output.
//
// OUTPUT: element type of divided outputs (0, 1 or 2).
#include "ptx.cuh"

struct Item {
    u64 output;        // f32 records, or OUTPUT [records][head_dim] when divided
    u32 first_source;  // in the sources
    u32 sources;
    u32 records;
    u32 unused;
};

struct Params {
    u64 items;    // Item [items]
    u64 sources;  // u64 addresses of f32 [records][2 + head_dim]
    u32 head_dim;
    u32 divide;   // 1: the output is o / l, 0 where there is no key
};

// Most elements of a record that a lane takes: head sizes up to 256.
const u32 EACH = 8;

// 2^x for x ≤ 127, −∞ and NaN included: the CPU's `exp2`, operation by operation.
DEVICE f32 exp2_exact(f32 x) {
    const f32 round = 12582912.0f;
    f32 shifted = x + round;
    f32 rest = x - (shifted - round);
    f32 power = 1.5353362e-4f;
    power = fmaf(power, rest, 1.3398875e-3f);
    power = fmaf(power, rest, 9.618437e-3f);
    power = fmaf(power, rest, 5.5503324e-2f);
    power = fmaf(power, rest, 2.4022648e-1f);
    power = fmaf(power, rest, 0.69314718f);
    power = fmaf(power, rest, 1.0f);
    f32 scale = from_bits((bits_of(shifted) << 23) + bits_of(1.0f));
    return x < -126.0f ? 0.0f : multiply_rounded(power, scale);
}

DEVICE void store(const Params& p, const Item& item, u64 record, f32 m, f32 l, const f32 (&o)[EACH]) {
    if (!p.divide) {
        f32* to = reinterpret_cast<f32*>(item.output) + record * (2 + p.head_dim);
        if (lane() == 0) to[0] = m;
        if (lane() == 1) to[1] = l;
        UNROLL for (u32 i = 0; i < EACH; ++i) {
            u32 index = i * 32 + lane();
            if (index < p.head_dim) to[2 + index] = o[i];
        }
        return;
    }
    UNROLL for (u32 i = 0; i < EACH; ++i) {
        u32 index = i * 32 + lane();
        if (index >= p.head_dim) continue;
        f32 x = l == 0.0f ? 0.0f : o[i] / l;
        u64 at = record * p.head_dim + index;
#if OUTPUT == DTYPE_F32
        reinterpret_cast<f32*>(item.output)[at] = x;
#elif OUTPUT == DTYPE_F16
        reinterpret_cast<u16*>(item.output)[at] = f32_to_f16(x);
#else
        reinterpret_cast<u16*>(item.output)[at] = f32_to_bf16(x);
#endif
    }
}

DEVICE void merge(const Params& p, const Item& item, u64 record) {
    const u64* sources = reinterpret_cast<const u64*>(p.sources) + item.first_source;
    f32 m = negative_infinity(), l = 0.0f, o[EACH];
    UNROLL for (u32 i = 0; i < EACH; ++i) o[i] = 0.0f;
    _Pragma("unroll 4") for (u32 source = 0; source < item.sources; ++source) {
        const f32* from = reinterpret_cast<const f32*>(sources[source]) + record * (2 + p.head_dim);
        f32 later_m = from[0], later_l = from[1], later_o[EACH];
        UNROLL for (u32 i = 0; i < EACH; ++i) {
            u32 index = i * 32 + lane();
            later_o[i] = index < p.head_dim ? from[2 + index] : 0.0f;
        }
        if (later_m == negative_infinity()) continue;
        if (m == negative_infinity()) {
            m = later_m;
            l = later_l;
            UNROLL for (u32 i = 0; i < EACH; ++i) o[i] = later_o[i];
            continue;
        }
        f32 top = later_m > m ? later_m : m;
        f32 earlier = exp2_exact(m - top), later = exp2_exact(later_m - top);
        m = top;
        l = fmaf(later, later_l, multiply_rounded(earlier, l));
        UNROLL for (u32 i = 0; i < EACH; ++i) o[i] = fmaf(later, later_o[i], multiply_rounded(earlier, o[i]));
    }
    store(p, item, record, m, l, o);
}

// Grid: (warps of records, items); records past an item's are left out.
KERNEL(merge_partials, 128, 4, Params) {
    Item item = reinterpret_cast<const Item*>(p.items)[block_index_y()];
    u64 record = u64(block_index_x()) * (block_threads() / 32) + warp();
    if (record < item.records) merge(p, item, record);
}
