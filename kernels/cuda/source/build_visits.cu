// From the bits of blocks to the visits of prefill attention, without the host: how many each list has, the visits, and which thread block
// takes which of them. `scan_counts` says in between where each list begins.
#include "sums.cuh"
#include "visits.cuh"

struct Params {
    u64 bits;      // u32 [lists][words]: block 32 w + b in bit b of word w; of a list, those of its own tile are set
    u64 ends;      // u32 [tiles][2]: blocks of which means stand for those that are not visited, and blocks of the list
    u64 row_ends;  // u32 [tiles]: position behind the last row
    u64 counts;    // u32 [lists]
    u64 offsets;   // u64 [lists + 1]
    u64 output;    // Visit [room]
    u64 room;
    u32 lists;
    u32 words;
    u32 tiles;          // list l is of tile l % tiles
    u32 block_shift;    // log2 of the positions of a block
    u32 keys;           // of a visit, at most: a power of two from 16 to 64
    u32 stripe_blocks;  // means of a stripe lie in a page of their own
    u32 mean_shift;     // log2 of the means that such a page has room for
    u32 means;          // whether means stand for what is not visited
};

// Calls `take` (first key, number of keys) for the pieces of the blocks of a word, as far as the last row sees them. Blocks that are
// shorter than a visit share one where they follow each other within as many as it has room for.
template <class Take>
DEVICE void for_each_piece(const Params& p, u32 word, u32 index, u32 end, Take take) {
    u32 room = p.keys >> p.block_shift, together = room > 1 ? room : 1;
    while (word) {
        u32 first = find_first(word), count = 1;
        while ((first + count) % together && (word >> (first + count) & 1)) ++count;
        word &= ~(((1u << count) - 1) << first);
        u32 key = (index * 32 + first) << p.block_shift, keys = count << p.block_shift;
        if (key + keys > end) keys = end - key;
        for (u32 at = 0; at < keys; at += p.keys) take(key + at, keys - at < p.keys ? keys - at : p.keys);
    }
}

// The means from place `first` on, up to `keys` of them, that stand for blocks which are not visited; `count` is where the last of them ends.
DEVICE u64 unvisited(const Params& p, const u32* bits, u32 scored, u32 first, u32& count) {
    u64 mask = 0;
    count = 0;
    for (u32 i = 0; i < p.keys; ++i) {
        u32 place = first + i, within = place & ((1u << p.mean_shift) - 1);
        u32 block = (place >> p.mean_shift) * p.stripe_blocks + within;
        if (within >= p.stripe_blocks || block >= scored || (bits[block / 32] >> block % 32 & 1)) continue;
        mask |= u64(1) << i;
        count = i + 1;
    }
    return mask;
}

// Calls `take` (place in the list, visit) for all visits of a list, by one warp: blocks, then means. How many there are.
template <class Take>
DEVICE u32 for_each_visit(const Params& p, u32 list, Take take) {
    const u32* bits = reinterpret_cast<const u32*>(p.bits) + u64(list) * p.words;
    u32 tile = list % p.tiles, end = reinterpret_cast<const u32*>(p.row_ends)[tile];
    u32 scored = reinterpret_cast<const u32*>(p.ends)[2 * tile], total = 0;
    for (u32 first = 0; first < p.words; first += 32) {
        u32 index = first + lane(), word = index < p.words ? bits[index] : 0, count = 0;
        for_each_piece(p, word, index, end, [&](u32, u32) { ++count; });
        u32 before = sum_before(count), place = total + before;
        for_each_piece(p, word, index, end, [&](u32 key, u32 keys) { take(place++, Visit{VISIT_BLOCK << 16 | keys, key, key}); });
        total += shuffle(before + count, 31);
    }
    u32 stripes = p.means ? (scored + p.stripe_blocks - 1) / p.stripe_blocks : 0, places = stripes << p.mean_shift;
    for (u32 window = 0; window < places; window += 32 * p.keys) {
        u32 first = window + lane() * p.keys, count;
        u64 mask = unvisited(p, bits, first < places ? scored : 0, first, count);
        u32 own = mask != 0 ? 1 : 0, before = sum_before(own);
        if (own) take(total + before, Visit{VISIT_MEANS << 16 | count, first, mask});
        total += shuffle(before + own, 31);
    }
    return total;
}

// Grid: (lists / 4, rounded up).
KERNEL(count_visits, 128, 8, Params) {
    u32 list = block_index_x() * 4 + warp();
    if (list >= p.lists) return;
    u32 total = for_each_visit(p, list, [](u32, const Visit&) {});
    if (lane() == 0) reinterpret_cast<u32*>(p.counts)[list] = total;
}

// Grid: (lists / 4, rounded up).
KERNEL(expand_visits, 128, 8, Params) {
    u32 list = block_index_x() * 4 + warp();
    if (list >= p.lists) return;
    u64 first = reinterpret_cast<const u64*>(p.offsets)[list];
    for_each_visit(p, list, [&](u32 place, const Visit& visit) {
        if (first + place >= p.room) stop("visits have no room");
        reinterpret_cast<Visit*>(p.output)[first + place] = visit;
    });
}

struct Items {
    u64 offsets;  // u64 [lists + 1]
    u64 items;    // Item [count]
    u32 count;
    u32 unused;
};

// Puts the visits of its part of the list into each item, whose first visit is the number of the list before, and its visits the part (upper
// half) of so many. Grid: (items / 128, rounded up).
KERNEL(place_items, 128, 8, Items) {
    u32 index = block_index_x() * 128 + thread_index();
    if (index >= p.count) return;
    Item& item = reinterpret_cast<Item*>(p.items)[index];
    const u64* offsets = reinterpret_cast<const u64*>(p.offsets) + item.first_visit;
    u64 first = offsets[0], visits = offsets[1] - first;
    u32 part = item.visits >> 16, parts = item.visits & 0xffff;
    u64 begin = visits * part / parts, end = visits * (part + 1) / parts;
    item.first_visit = first + begin;
    item.visits = static_cast<u32>(end - begin);
}
