// Attention of few query rows over a paged KV, split along keys: partials (m, l, o) of base 2. A thread block takes ROWS packed rows of
// one KV head over the keys of one item; its warps take 16 keys each in turn, with copies of their own, so that nothing but the end of
// the item waits for other warps. Row r of a KV head is position r / group and query head kv_head · group + r % group.
//
// Matrices have keys (and, for the output, elements) on the 16-wide side and rows on the 8-wide: Sᵀ = K Qᵀ, Oᵀ = Vᵀ Pᵀ, so that groups of up
// to 8 waste nothing. 8-bit elements become f16 in registers: the scale of a key goes into its logit, that of a value into P.
//
// Parts, in this order: attend_decode.cuh, attend_decode_f32.cuh (DTYPE 0), attend_decode_mma.cuh (others), attend_decode.cu.
//
// DTYPE: of the pages, 0 to 4. HEAD_DIM. WARPS. STAGES: chunks of a warp that are under way, 2 or more. ROW_TILES: 8 rows each. RESIDENT: thread
// blocks that a multiprocessor holds.

// Keys of one sequence, all heads, and who asks for them.
struct Item {
    u64 first_position;  // of query row 0
    u64 first_key;       // position of the first key
    u64 output;          // f32 [rows][query heads][2 + HEAD_DIM]
    u32 query;           // first row among the queries
    u32 rows;
    u32 page;            // first entry in the page table
    u32 page_stride;     // entries from one KV head's to the next's; 0: all heads visit the same pages
    u32 keys;
    u32 unused;
};

struct Params {
    u64 queries;  // f32 [rows][query heads][HEAD_DIM]
    u64 pages;    // u64 addresses
    u64 items;    // Item [items]
    u32 kv_heads;
    u32 group;
    u32 token_bits;  // log2 of the tokens of a page, which are 16 or more
    f32 scale;       // of logits, base 2
};

const u32 ROWS = 8 * ROW_TILES;
const u32 KEYS = 16;
#if DTYPE == DTYPE_F32
const u32 ELEMENT_BYTES = 4;
#elif DTYPE == DTYPE_F16 || DTYPE == DTYPE_BF16
const u32 ELEMENT_BYTES = 2;
#else
const u32 ELEMENT_BYTES = 1;
#endif
const bool SCALED = ELEMENT_BYTES == 1;
const u32 ROW_BYTES = HEAD_DIM * ELEMENT_BYTES;
const u32 VECTORS = ROW_BYTES / 16;
// An odd number of vectors: eight rows lie in different banks.
const u32 PITCH = (VECTORS | 1) * 16;
const u32 STAGE_BYTES = 2 * KEYS * PITCH + (SCALED ? 2 * KEYS * 4 : 0);
// Elements of the output of a row in shared memory.
const u32 OUTPUT_PITCH = HEAD_DIM + 4;

// The chunks of 16 keys of a warp.
struct Chunks {
    const u64* pages;  // of the KV head
    u64 head;          // offset of the KV head in a page
    u32 keys;
    u32 token_bits;
};

DEVICE u64 page_of(const Chunks& chunks, u32 chunk) {
    return chunk * KEYS < chunks.keys ? chunks.pages[chunk * KEYS >> chunks.token_bits] : 0;
}

// Begins to copy a chunk; keys past the last become zeros. `page` is what page_of gave for it.
DEVICE void load_chunk(const Chunks& chunks, u32 chunk, u64 page, u8* stage) {
    if (chunk * KEYS < chunks.keys) {
        u32 tokens = 1u << chunks.token_bits, offset = chunk * KEYS & (tokens - 1), left = chunks.keys - chunk * KEYS;
        const u8* k = reinterpret_cast<const u8*>(page + chunks.head + u64(offset) * ROW_BYTES);
        const u8* v = k + u64(tokens) * ROW_BYTES;
        UNROLL for (u32 index = lane(); index < KEYS * VECTORS; index += 32) {
            u32 to = index / VECTORS * PITCH + index % VECTORS * 16;
            bool valid = index / VECTORS < left;
            copy_async_16(stage + to, k + index * 16, valid);
            copy_async_16(stage + KEYS * PITCH + to, v + index * 16, valid);
        }
        if (SCALED && lane() < 8) {
            const u8* scales = reinterpret_cast<const u8*>(page + chunks.head + 2 * u64(tokens) * ROW_BYTES);
            u64 at = (lane() / 4 * u64(tokens) + offset + lane() % 4 * 4) * 4;
            copy_async_16(stage + 2 * KEYS * PITCH + lane() * 16, scales + at, true);
        }
    }
    commit_copies();
}

// Packed rows of a thread block.
struct Rows {
    u32 first;
    u32 count;  // that exist, up to ROWS
    u32 query_heads;
};

DEVICE const f32* query_row(const Params& p, const Item& item, const Rows& rows, u32 row) {
    u32 packed = rows.first + row;
    u64 record = u64(item.query + packed / p.group) * rows.query_heads + block_index_y() * p.group + packed % p.group;
    return reinterpret_cast<const f32*>(p.queries) + record * HEAD_DIM;
}

// How many keys of the item a row sees.
DEVICE u32 keys_seen(const Params& p, const Item& item, const Rows& rows, u32 row) {
    if (row >= rows.count) return item.keys;
    u64 end = item.first_position + (rows.first + row) / p.group + 1;
    u64 seen = end > item.first_key ? end - item.first_key : 0;
    return seen < item.keys ? static_cast<u32>(seen) : item.keys;
}
