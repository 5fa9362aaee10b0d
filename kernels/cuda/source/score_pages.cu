// What the pages of a sequence may weigh for a query row, by their mean keys or by the bounds of their keys' elements (Quest): the largest
// over the query heads of a KV head, or the sum. Four lanes share a page, a warp takes 8 pages at a time.
//
// SUMMARY: element type of the summaries, 0 to 2. HEAD_DIM.
#include "ptx.cuh"

struct Item {
    u64 first;   // SUMMARY [kv_heads][capacity][HEAD_DIM]: mean keys, or least elements
    u64 second;  // the same: largest elements; 0 with means
    u32 pages;
    u32 query;   // row among the queries
    u32 capacity;
    u32 unused;
};

struct Params {
    u64 queries;  // f32 [rows][query heads][HEAD_DIM]
    u64 items;    // Item [items]
    u64 scores;   // f32 [kv_heads][items][stride]
    u32 kv_heads;
    u32 group;    // up to 8
    u32 stride;
    u32 sum;      // 1: sums over the group
    u32 sink;     // first pages whose score is +∞
    u32 local;    // last pages whose score is +∞
};

const u32 PAGES = 128;
const u32 GROUP = 8;
const u32 ELEMENTS = SUMMARY == DTYPE_F32 ? 4 : 8;
const u32 VECTORS = HEAD_DIM / ELEMENTS;

DEVICE void unpack(const uint4x& vector, f32 (&x)[ELEMENTS]) {
    const u32 words[4] = {vector.x, vector.y, vector.z, vector.w};
    UNROLL for (u32 i = 0; i < 4; ++i) {
#if SUMMARY == DTYPE_F32
        x[i] = from_bits(words[i]);
#elif SUMMARY == DTYPE_F16
        unpack_f16(words[i], x[2 * i], x[2 * i + 1]);
#else
        unpack_bf16(words[i], x[2 * i], x[2 * i + 1]);
#endif
    }
}

// Adds a vector's share to the scores of the heads; q [group][HEAD_DIM].
DEVICE void add_vector(const uint4x* first, const uint4x* second, u32 part, const f32* q, u32 group, f32 (&scores)[GROUP]) {
    f32 x[ELEMENTS], y[ELEMENTS];
    unpack(first[part], x);
    unpack(second[part], y);
    UNROLL for (u32 head = 0; head < GROUP; ++head) {
        if (head >= group) continue;
        const f32* own = q + head * HEAD_DIM + part * ELEMENTS;
        UNROLL for (u32 i = 0; i < ELEMENTS; ++i) scores[head] += fmaxf(own[i] * x[i], own[i] * y[i]);
    }
}

DEVICE f32 combine(const Params& p, f32 (&scores)[GROUP]) {
    f32 most = negative_infinity(), sum = 0.0f;
    UNROLL for (u32 head = 0; head < GROUP; ++head) {
        f32 x = scores[head];
        x += shuffle_xor(x, 1);
        x += shuffle_xor(x, 2);
        if (head >= p.group) continue;
        most = fmaxf(most, x);
        sum += x;
    }
    return p.sum ? sum : most;
}

// Grid: (most pages of an item / PAGES, rounded up; KV heads; items).
KERNEL(score_pages, 128, 8, Params) {
    Item item = reinterpret_cast<const Item*>(p.items)[block_index_z()];
    u32 begin = block_index_x() * PAGES;
    if (begin >= item.pages) return;
    f32* q = reinterpret_cast<f32*>(shared_memory());
    u64 query = (u64(item.query) * p.kv_heads + block_index_y()) * p.group * HEAD_DIM;
    for (u32 index = thread_index(); index < p.group * HEAD_DIM; index += block_threads()) {
        q[index] = reinterpret_cast<const f32*>(p.queries)[query + index];
    }
    sync_block();
    u64 head = u64(block_index_y()) * item.capacity;
    f32* to = reinterpret_cast<f32*>(p.scores) + (u64(block_index_y()) * grid_blocks_z() + block_index_z()) * p.stride;
    u64 second = item.second ? item.second : item.first;
    for (u32 strip = 0; strip < PAGES / 32; ++strip) {
        u32 page = begin + strip * 32 + warp() * 8 + lane() / 4;
        f32 scores[GROUP] = {};
        if (page < item.pages) {
            const uint4x* least = reinterpret_cast<const uint4x*>(item.first) + (head + page) * VECTORS;
            const uint4x* most = reinterpret_cast<const uint4x*>(second) + (head + page) * VECTORS;
            for (u32 part = lane() % 4; part < VECTORS; part += 4) add_vector(least, most, part, q, p.group, scores);
        }
        f32 score = combine(p, scores);
        bool is_kept = page < p.sink || page + p.local >= item.pages;
        if (lane() % 4 == 0 && page < item.pages) to[page] = is_kept ? from_bits(0x7f800000u) : score;
    }
}
