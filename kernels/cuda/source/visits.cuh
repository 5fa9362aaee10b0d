// What attention over lists visits, and what a thread block does of it: as the host and `build_visits.cu` write it and kernels read it.
#pragma once
#include "ptx.cuh"

// Up to KEYS keys that are visited at once.
struct Visit {
    // Kind in the upper half, number of keys in the lower.
    u32 what;
    // Blocks and means: number of the first key, counted through the page table. Columns: number of the first column.
    u32 first;
    // Blocks: position of the first key; the others follow. Means: which keys count.
    u64 keys;
};
#define VISIT_BLOCK 0u
#define VISIT_COLUMNS 1u
#define VISIT_MEANS 2u

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
