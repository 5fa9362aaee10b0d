// From bits to lists: where each list begins, and the numbers of its blocks, ascending; or the addresses of their pages.
#include "sums.cuh"

struct Params {
    u64 counts;   // u32 [lists]
    u64 offsets;  // u64 [lists + 1]: where each list begins, and where the last ends
    u64 bits;     // u32 [lists][words]
    u64 output;   // u32 or, of pages, u64
    u64 pages;    // u64 addresses of all pages
    u64 firsts;   // u32 [tiles]: place of a tile's first page among them
    u32 lists;
    u32 words;
    u32 tiles;    // list l is of tile l % tiles
    u32 room;     // of pages: entries of each list; the output is [lists][room]
};

// Grid: (1).
KERNEL(scan_counts, 1024, 1, Params) {
    u32* sums = reinterpret_cast<u32*>(shared_memory());
    const u32* counts = reinterpret_cast<const u32*>(p.counts);
    u64* offsets = reinterpret_cast<u64*>(p.offsets);
    u64 total = 0;
    for (u32 first = 0; first < p.lists; first += 1024) {
        u32 list = first + thread_index();
        u32 count = list < p.lists ? counts[list] : 0, before = sum_before(count);
        if (lane() == 31) sums[warp()] = before + count;
        sync_block();
        u32 all = sums[lane()], of_warps = sum_before(all);
        u32 until = shuffle(of_warps, warp());
        if (list < p.lists) offsets[list] = total + until + before;
        total += shuffle(of_warps + all, 31);
        sync_block();
    }
    if (thread_index() == 0) offsets[p.lists] = total;
}

// Calls `take` (place, block) for each bit of a list, by one warp.
template <class Take>
DEVICE void for_each_block(const Params& p, u32 list, Take take) {
    const u32* bits = reinterpret_cast<const u32*>(p.bits) + u64(list) * p.words;
    u32 place = 0;
    for (u32 first = 0; first < p.words; first += 32) {
        u32 word = first + lane() < p.words ? bits[first + lane()] : 0;
        u32 count = popcount(word), before = sum_before(count);
        u32 own = place + before;
        place += shuffle(before + count, 31);
        for (; word; word &= word - 1) take(own++, (first + lane()) * 32 + find_first(word));
    }
}

// Grid: (lists / 4, rounded up).
KERNEL(expand_blocks, 128, 8, Params) {
    u32 list = block_index_x() * 4 + warp();
    if (list >= p.lists) return;
    u32* output = reinterpret_cast<u32*>(p.output) + reinterpret_cast<const u64*>(p.offsets)[list];
    for_each_block(p, list, [&](u32 place, u32 block) { output[place] = block; });
}

// Grid: (lists / 4, rounded up). Entries that a list does not fill stay as they are; blocks past its room are left out.
KERNEL(expand_pages, 128, 8, Params) {
    u32 list = block_index_x() * 4 + warp();
    if (list >= p.lists) return;
    const u64* pages = reinterpret_cast<const u64*>(p.pages) + reinterpret_cast<const u32*>(p.firsts)[list % p.tiles];
    u64* output = reinterpret_cast<u64*>(p.output) + u64(list) * p.room;
    u32 room = p.room;
    for_each_block(p, list, [&](u32 place, u32 block) {
        if (place < room) output[place] = pages[block];
    });
}
