// What the kernels of prefill attention visit, and where it lies. Stands in front of each of them. A partial is a record f32
// (m, l, o[HEAD_DIM]), as it travels.
#include "visits.cuh"

#define ROW_BYTES (HEAD_DIM * ELEMENT_BYTES)
#define ELEMENT_BYTES (DTYPE == DTYPE_F32 ? 4 : 2)

// A gathered key.
struct Column {
    // Address of its K of KV head 0; the rest lies as far behind as in a page.
    u64 row;
    u64 position;
};

#define WHOLE 0xffffffffu
// Visits are those of all keys in order: number v is KEYS keys from v × KEYS on.
#define ITEM_DENSE 1
// Its keys are the first of these rows: the earlier partial is folded in.
#define ITEM_BEGINS 2

#define RECORD (2 + HEAD_DIM)

struct Params {
    // f32 [rows][query heads][HEAD_DIM], rotated.
    u64 queries;
    // Tables of addresses of pages of keys and values, and of means.
    u64 pages;
    u64 means;
    u64 items;
    u64 visits;
    u64 columns;
    // f32, added to the logit of each column; 0: nothing.
    u64 column_bias;
    // Records of earlier keys [rows][query heads]; 0: none.
    u64 earlier;
    // Records [rows][query heads], or, `divided`, f32 [rows][query heads][HEAD_DIM].
    u64 output;
    // Records of the parts of lists.
    u64 parts;
    // Of query row 0, and of key 0 of dense items.
    u64 first_position;
    u64 dense_position;
    // Keys of dense items.
    u64 dense_keys;
    // Bits of f32: scale × log2(e), above 0; log2 of the keys that a mean stands for; how far below the running maximum a block is left out.
    u32 scale;
    u32 mean_bias;
    u32 skip_below;
    u32 kv_heads;
    u32 group;
    // log2 of the keys of a page.
    u32 page_shift;
    u32 mean_page_shift;
    // 1: the output is o / l, 0 where there is no key.
    u32 divided;
};

DEVICE Visit visit_of(const Params& p, const Item& item, u32 index) {
    if (item.flags & ITEM_DENSE) {
        u64 first = (item.first_visit + index) * KEYS, rest = p.dense_keys - first;
        u32 count = rest < KEYS ? static_cast<u32>(rest) : KEYS;
        return {VISIT_BLOCK << 16 | count, static_cast<u32>(first), p.dense_position + first};
    }
    return reinterpret_cast<const Visit*>(p.visits)[item.first_visit + index];
}

DEVICE u32 kind_of(const Visit& visit) { return visit.what >> 16; }
DEVICE u32 keys_of(const Visit& visit) { return visit.what & 0xffff; }

// Bytes from the K of a key to its V.
DEVICE u64 value_offset(const Params& p, const Visit& visit) {
    return static_cast<u64>(ROW_BYTES) << (kind_of(visit) == VISIT_MEANS ? p.mean_page_shift : p.page_shift);
}

// Bytes from a row of KV head 0 to that of another.
DEVICE u64 head_offset(u32 shift, u32 kv_head) { return (static_cast<u64>(kv_head) << (shift + 1)) * ROW_BYTES; }

// Address of row `key` of a table of pages.
DEVICE u64 paged_row(u64 pages, u32 shift, u32 kv_head, u32 key) {
    u64 page = reinterpret_cast<const u64*>(pages)[key >> shift];
    return page + head_offset(shift, kv_head) + static_cast<u64>(key & ((1u << shift) - 1)) * ROW_BYTES;
}

// Address of a row of a block or of means.
DEVICE u64 visited_row(const Params& p, const Visit& visit, u32 kv_head, u32 key) {
    if (kind_of(visit) == VISIT_MEANS) return paged_row(p.means, p.mean_page_shift, kv_head, visit.first + key);
    return paged_row(p.pages, p.page_shift, kv_head, visit.first + key);
}

// Whether there is such a key.
DEVICE bool counts(const Visit& visit, u32 key) {
    return key < keys_of(visit) && (kind_of(visit) != VISIT_MEANS || (visit.keys >> key & 1));
}

// Address of the K of a key of the visit; 0 when there is no such key.
DEVICE u64 key_row(const Params& p, const Visit& visit, u32 kv_head, u32 key) {
    if (!counts(visit, key)) return 0;
    if (kind_of(visit) != VISIT_COLUMNS) return visited_row(p, visit, kv_head, key);
    return reinterpret_cast<const Column*>(p.columns)[visit.first + key].row + head_offset(p.page_shift, kv_head);
}

// Whether its rows lie one after the other.
DEVICE bool is_in_one_page(const Params& p, const Visit& visit) {
    u32 shift = kind_of(visit) == VISIT_MEANS ? p.mean_page_shift : p.page_shift;
    return kind_of(visit) != VISIT_COLUMNS && visit.first >> shift == (visit.first + keys_of(visit) - 1) >> shift;
}

#define NOBODY 0xffffffffu
// The first row that sees a key, counted from the position `row_position`; NOBODY when no row does.
DEVICE u32 first_seen(const Params& p, const Visit& visit, u32 key, u64 row_position) {
    if (!counts(visit, key)) return NOBODY;
    u64 position = visit.keys + key;
    if (kind_of(visit) == VISIT_MEANS) return 0;
    if (kind_of(visit) == VISIT_COLUMNS) position = reinterpret_cast<const Column*>(p.columns)[visit.first + key].position;
    if (position <= row_position) return 0;
    return position - row_position < NOBODY ? static_cast<u32>(position - row_position) : NOBODY;
}

// What is added to the logit of a key.
DEVICE f32 bias_of(const Params& p, const Visit& visit, u32 key) {
    if (kind_of(visit) == VISIT_MEANS) return from_bits(p.mean_bias);
    if (kind_of(visit) != VISIT_COLUMNS || p.column_bias == 0 || key >= keys_of(visit)) return 0;
    return reinterpret_cast<const f32*>(p.column_bias)[visit.first + key];
}

// Whether every row of an item sees all KEYS keys of the visit, without bias.
DEVICE bool is_plain(const Visit& visit, u64 row_position) {
    return visit.what == (VISIT_BLOCK << 16 | KEYS) && visit.keys + KEYS - 1 <= row_position;
}

// Number of the (row, query head) pair of a packed row.
DEVICE u64 pair_of(const Params& p, u32 kv_head, u32 packed) {
    u64 heads = static_cast<u64>(p.kv_heads) * p.group;
    return packed / p.group * heads + kv_head * p.group + packed % p.group;
}
