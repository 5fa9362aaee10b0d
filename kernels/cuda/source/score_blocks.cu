// The entry of score_blocks.cuh.

// log2 of the sum of each row, from those of the warps in their order.
DEVICE void merge_rows(const Tile& tile, const LogSum* sums, f32* offsets) {
    for (u32 row = thread_index(); row < tile.rows; row += block_threads()) {
        LogSum all;
        all.clear();
        UNROLL for (u32 part = 0; part < WARPS; ++part) all.add(sums[part * tile.rows + row].top, sums[part * tile.rows + row].sum);
        offsets[row] = all.log();
    }
}

// Grid: (query tiles, KV heads). Shared memory: queries, an offset of each row, and for `normalise` a LogSum of each warp and row.
KERNEL(score_blocks, WARPS * 32, 2, Params) {
    Tile tile = tile_of(p);
    u8* shared = shared_memory();
    f32* offsets = reinterpret_cast<f32*>(shared + query_bytes(tile.rows));
    load_queries(p, tile, shared);
    for (u32 row = thread_index(); row < tile.rows; row += block_threads()) offsets[row] = 0.0f;
    if (p.normalise) {
        LogSum* sums = reinterpret_cast<LogSum*>(offsets + tile.rows);
        for (u32 index = thread_index(); index < WARPS * tile.rows; index += block_threads()) sums[index].clear();
        sync_block();
        LogSum* own = sums + warp() * tile.rows;
        for (u32 first = warp() * BLOCKS; first < tile.scored; first += WARPS * BLOCKS) add_rows(p, tile, first, shared, own);
        sync_block();
        merge_rows(tile, sums, offsets);
    }
    sync_block();
    for (u32 first = warp() * BLOCKS; first < tile.scored; first += WARPS * BLOCKS) score(p, tile, first, shared, offsets);
}
