// What the kernels of prefill attention visit, and where it lies. Included in front of each of them.

#define ROW_BYTES (HEAD_DIM * ELEMENT_BYTES)
#define ELEMENT_BYTES (DTYPE == DTYPE_F32 ? 4 : 2)

// Up to KEYS keys that are visited at once.
struct Visit {
    // Kind in the upper half, number of keys in the lower.
    u32 what;
    // Blocks and means: number of the first key, counted through the page table. Columns: number of the first column.
    u32 first;
    // Blocks: position of the first key; the others follow. Means: which keys count.
    u64 keys;
};
#define VISIT_BLOCK 0
#define VISIT_COLUMNS 1
#define VISIT_MEANS 2

// A gathered key.
struct Column {
    // Address of its K; its V lies as far behind as in a page.
    u64 row;
    u64 position;
};

// Packed query rows [first_row, first_row + rows) of a KV head, and what they visit. Packed row r is position r / group, query head r % group
// of the KV head.
struct Item {
    u64 first_visit;
    u32 visits;
    u32 first_row;
    u32 rows;
    u32 kv_head;
    // Where the result goes: row of the parts, or WHOLE.
    u32 part;
    // Sum of the ITEM_ bits.
    u32 flags;
};
#define WHOLE 0xffffffffu
// Visits are those of all keys in order: number v is KEYS keys from v × KEYS on.
#define ITEM_DENSE 1
// Its keys are the first of these rows: the earlier partial is folded in.
#define ITEM_BEGINS 2

struct Params {
    // [rows][query heads][HEAD_DIM], rotated.
    u64 queries;
    // Addresses of pages of keys and values, and of means.
    u64 pages;
    u64 means;
    u64 items;
    u64 visits;
    u64 columns;
    // f32, added to the logit of each column; 0: nothing.
    u64 column_bias;
    // Partial of earlier keys, [rows][query heads] of (m, l) and of o, f32; 0: none.
    u64 earlier_sums;
    u64 earlier_output;
    // The same of the result. With `normalised` only the output, in the type of the queries.
    u64 sums;
    u64 output;
    // Results of the parts of lists, by rows of parts.
    u64 part_sums;
    u64 part_output;
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
    u32 normalised;
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

// Address of row `key` of a table of pages.
DEVICE u64 paged_row(u64 pages, u32 shift, u32 kv_head, u32 key) {
    u64 page = reinterpret_cast<const u64*>(pages)[key >> shift];
    return page + ((static_cast<u64>(kv_head) << (shift + 1)) + (key & ((1u << shift) - 1))) * ROW_BYTES;
}

// Address of the K of a key of the visit; 0 when there is no such key.
DEVICE u64 key_row(const Params& p, const Visit& visit, u32 kv_head, u32 key) {
    if (key >= keys_of(visit)) return 0;
    if (kind_of(visit) == VISIT_COLUMNS) return reinterpret_cast<const Column*>(p.columns)[visit.first + key].row;
    if (kind_of(visit) == VISIT_BLOCK) return paged_row(p.pages, p.page_shift, kv_head, visit.first + key);
    return visit.keys >> key & 1 ? paged_row(p.means, p.mean_page_shift, kv_head, visit.first + key) : 0;
}

// Whether KEYS rows from the first on lie one after the other.
DEVICE bool is_in_one_page(const Params& p, const Visit& visit) {
    u32 last = visit.first + KEYS - 1;
    return kind_of(visit) == VISIT_BLOCK && visit.first >> p.page_shift == last >> p.page_shift;
}

// The first row that sees a key, counted from the position `row_position`; NOBODY when no row does.
DEVICE u32 first_seen(const Params& p, const Visit& visit, u32 key, u64 row_position) {
    if (key >= keys_of(visit)) return 0xffffffffu;
    u64 position = visit.keys + key;
    if (kind_of(visit) == VISIT_MEANS) return visit.keys >> key & 1 ? 0 : 0xffffffffu;
    if (kind_of(visit) == VISIT_COLUMNS) position = reinterpret_cast<const Column*>(p.columns)[visit.first + key].position;
    if (position <= row_position) return 0;
    return position - row_position < 0xffffffffu ? static_cast<u32>(position - row_position) : 0xffffffffu;
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

// Writes a row whose output is spread over a warp: its sums and output, or, when it is whole and the output is to be normalised, that
// divided by the sum, in the type of the queries.
DEVICE void store_row(const Params& p, f32 top, f32 sum, const f32* own, u64 at, bool whole) {
    bool normalised = whole && p.normalised != 0;
    f32* output = reinterpret_cast<f32*>(whole ? p.output : p.part_output) + at * HEAD_DIM;
    for (u32 index = lane(), part = 0; index < HEAD_DIM; index += 32, part++) {
        f32 value = normalised ? (sum == 0 ? 0 : own[part] / sum) : own[part];
#if DTYPE != DTYPE_F32
        u16* narrow = reinterpret_cast<u16*>(p.output) + at * HEAD_DIM;
        if (normalised) {
            narrow[index] = DTYPE == DTYPE_F16 ? f32_to_f16(value) : f32_to_bf16(value);
            continue;
        }
#endif
        output[index] = value;
    }
    if (normalised || lane() != 0) return;
    f32* sums = reinterpret_cast<f32*>(whole ? p.sums : p.part_sums) + 2 * at;
    sums[0] = top;
    sums[1] = sum;
}
