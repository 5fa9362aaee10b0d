// Tiles between the layout in which they travel (CPU panels) and that of pages (rows), without loss. A thread block moves 16 tokens of
// one KV head.
//
// ELEMENT_BYTES: 1, 2 or 4.
#include "ptx.cuh"

struct Params {
    u64 from;      // u64 addresses of tiles
    u64 to;        // u64 addresses of tiles
    u32 kv_heads;
    u32 tokens;    // of a tile, a multiple of 16
    u32 head_dim;  // a multiple of 16
    u32 scaled;    // 1 where each head has scales behind its values
};

const u32 LANES = 16;
const u32 VECTOR = 16 / ELEMENT_BYTES;
// Words of 16 tokens of one element in shared memory; odd, so that 16 tokens by 8 elements lie in different banks.
const u32 PITCH = LANES * ELEMENT_BYTES / 4 + 1;

#if ELEMENT_BYTES == 1
typedef u8 Element;
#elif ELEMENT_BYTES == 2
typedef u16 Element;
#else
typedef u32 Element;
#endif

// Where a thread block works.
struct Place {
    u8* panels;  // K panel of the 16 tokens
    u8* rows;    // first of the 16 K rows
    u8* v_panels;
    u8* v_rows;
    u64 scales;  // offset of the 16 scales of K from the beginning of a tile
};

DEVICE u64 head_bytes(const Params& p) {
    u64 elements = u64(2) * p.tokens * p.head_dim;
    return elements * ELEMENT_BYTES + (p.scaled ? u64(8) * p.tokens : 0);
}

DEVICE u64 address(u64 table, u32 index) { return reinterpret_cast<const u64*>(table)[index]; }

DEVICE Place place(const Params& p, u64 panels, u64 rows, u32 strip) {
    u64 head = block_index_y() * head_bytes(p);
    u64 k = u64(strip) * LANES * p.head_dim * ELEMENT_BYTES;
    u64 v = u64(p.tokens) * p.head_dim * ELEMENT_BYTES;
    Place place;
    place.panels = reinterpret_cast<u8*>(panels + head + k);
    place.rows = reinterpret_cast<u8*>(rows + head + k);
    place.v_panels = reinterpret_cast<u8*>(panels + head + v + u64(strip) * LANES * LANES * ELEMENT_BYTES);
    place.v_rows = reinterpret_cast<u8*>(rows + head + v + k);
    place.scales = head + 2 * v + u64(strip) * LANES * 4;
    return place;
}

// The vector of 16 bytes of a row that thread `index` takes: eight tokens by 64 bytes a warp, whole sectors and no bank conflict.
DEVICE void row_vector(u32 index, u32& token, u32& part) {
    token = index % 8 + index / 32 % 2 * 8;
    part = index / 8 % 4 + index / 64 * 4;
}

DEVICE u32 row_vectors(const Params& p) { return p.head_dim * ELEMENT_BYTES / 16; }

DEVICE void copy_scales(const Params& p, u64 from, u64 to, u64 scales) {
    u32 index = thread_index();
    if (!p.scaled || index >= 2 * LANES) return;
    u64 at = scales + index / LANES * u64(4) * p.tokens + index % LANES * 4;
    *reinterpret_cast<u32*>(to + at) = *reinterpret_cast<const u32*>(from + at);
}

// Values: a panel has 16 columns of each token, which lie side by side in a row as well.
template <bool TO_ROWS>
DEVICE void copy_values(const Params& p, const Place& place) {
    u32 vectors = LANES * row_vectors(p);
    for (u32 index = thread_index(); index < vectors; index += block_threads()) {
        u32 part = index % ELEMENT_BYTES, token = index / ELEMENT_BYTES % LANES, panel = index / (ELEMENT_BYTES * LANES);
        u64 in_panels = (u64(panel) * p.tokens + token) * LANES * ELEMENT_BYTES + part * 16;
        u64 in_rows = (u64(token) * p.head_dim + panel * LANES) * ELEMENT_BYTES + part * 16;
        uint4x* panels = reinterpret_cast<uint4x*>(place.v_panels + in_panels);
        uint4x* rows = reinterpret_cast<uint4x*>(place.v_rows + in_rows);
        if (TO_ROWS) *rows = *panels;
        else *panels = *rows;
    }
}

// Grid: (tiles × strips of 16 tokens, KV heads).
KERNEL(panels_to_rows, 128, 8, Params) {
    u32 strips = p.tokens / LANES, tile = block_index_x() / strips;
    u64 from = address(p.from, tile), to = address(p.to, tile);
    Place at = place(p, from, to, block_index_x() % strips);
    u32* words = reinterpret_cast<u32*>(shared_memory());
    for (u32 index = thread_index(); index < p.head_dim * ELEMENT_BYTES; index += block_threads()) {
        uint4x vector = reinterpret_cast<const uint4x*>(at.panels)[index];
        u32* to_words = words + index / ELEMENT_BYTES * PITCH + index % ELEMENT_BYTES * 4;
        to_words[0] = vector.x;
        to_words[1] = vector.y;
        to_words[2] = vector.z;
        to_words[3] = vector.w;
    }
    copy_values<true>(p, at);
    copy_scales(p, from, to, at.scales);
    sync_block();
    const Element* elements = reinterpret_cast<const Element*>(words);
    u32 vectors = (row_vectors(p) + 3) / 4 * 4 * LANES;
    for (u32 index = thread_index(); index < vectors; index += block_threads()) {
        u32 token, part;
        row_vector(index, token, part);
        if (part >= row_vectors(p)) continue;
        union {
            uint4x vector;
            Element elements[VECTOR];
        } row;
        UNROLL for (u32 i = 0; i < VECTOR; ++i) {
            row.elements[i] = elements[(part * VECTOR + i) * (PITCH * 4 / ELEMENT_BYTES) + token];
        }
        *reinterpret_cast<uint4x*>(at.rows + u64(token) * p.head_dim * ELEMENT_BYTES + part * 16) = row.vector;
    }
}

// Grid: (tiles × strips of 16 tokens, KV heads).
KERNEL(rows_to_panels, 128, 8, Params) {
    u32 strips = p.tokens / LANES, tile = block_index_x() / strips;
    u64 from = address(p.from, tile), to = address(p.to, tile);
    Place at = place(p, to, from, block_index_x() % strips);
    u32* words = reinterpret_cast<u32*>(shared_memory());
    Element* elements = reinterpret_cast<Element*>(words);
    u32 vectors = (row_vectors(p) + 3) / 4 * 4 * LANES;
    for (u32 index = thread_index(); index < vectors; index += block_threads()) {
        u32 token, part;
        row_vector(index, token, part);
        if (part >= row_vectors(p)) continue;
        union {
            uint4x vector;
            Element elements[VECTOR];
        } row;
        row.vector = *reinterpret_cast<const uint4x*>(at.rows + u64(token) * p.head_dim * ELEMENT_BYTES + part * 16);
        UNROLL for (u32 i = 0; i < VECTOR; ++i) {
            elements[(part * VECTOR + i) * (PITCH * 4 / ELEMENT_BYTES) + token] = row.elements[i];
        }
    }
    copy_values<false>(p, at);
    copy_scales(p, from, to, at.scales);
    sync_block();
    for (u32 index = thread_index(); index < p.head_dim * ELEMENT_BYTES; index += block_threads()) {
        const u32* from_words = words + index / ELEMENT_BYTES * PITCH + index % ELEMENT_BYTES * 4;
        reinterpret_cast<uint4x*>(at.panels)[index] = uint4x{from_words[0], from_words[1], from_words[2], from_words[3]};
    }
}
