// The entry of attend_decode.cuh: pipeline of copies, merge of the warps.

// Merges what the warps have, in their order: [warp] {m [ROWS], l [ROWS], o [ROWS][OUTPUT_PITCH]}.
DEVICE void store(const Params& p, const Item& item, const Rows& rows, const f32* parts) {
    const u32 size = ROWS * (2 + OUTPUT_PITCH);
    for (u32 index = thread_index(); index < rows.count * HEAD_DIM; index += block_threads()) {
        u32 row = index / HEAD_DIM, element = index % HEAD_DIM;
        f32 m = negative_infinity(), l = 0.0f, o = 0.0f;
        UNROLL for (u32 part = 0; part < WARPS; ++part) m = fmaxf(m, parts[part * size + row]);
        f32 base = m == negative_infinity() ? 0.0f : m;
        UNROLL for (u32 part = 0; part < WARPS; ++part) {
            const f32* own = parts + part * size;
            f32 share = exp2_approx(own[row] - base);
            l = fmaf(share, own[ROWS + row], l);
            o = fmaf(share, own[2 * ROWS + row * OUTPUT_PITCH + element], o);
        }
        u32 packed = rows.first + row;
        u64 record = u64(packed / p.group) * rows.query_heads + block_index_y() * p.group + packed % p.group;
        f32* to = reinterpret_cast<f32*>(item.output) + record * (2 + HEAD_DIM);
        if (element == 0) {
            to[0] = m;
            to[1] = l;
        }
        to[2 + element] = o;
    }
}

DEVICE Item item_of(const Params& p) { return reinterpret_cast<const Item*>(p.items)[block_index_x()]; }

// The rows of this thread block; none past the item's last.
DEVICE Rows rows_of(const Params& p, const Item& item) {
    Rows rows;
    rows.first = block_index_z() * ROWS;
    rows.query_heads = p.kv_heads * p.group;
    rows.count = rows.first < item.rows * p.group ? item.rows * p.group - rows.first : 0;
    if (rows.count > ROWS) rows.count = ROWS;
    return rows;
}

// Grid: (items, KV heads, most tiles of ROWS packed rows of an item).
KERNEL(attend_decode, WARPS * 32, RESIDENT, Params) {
    Item item = item_of(p);
    Rows rows = rows_of(p, item);
    if (rows.count == 0) return;
    u64 tokens = u64(1) << p.token_bits;
    Chunks chunks;
    chunks.pages = reinterpret_cast<const u64*>(p.pages) + item.page + u64(block_index_y()) * item.page_stride;
    chunks.head = block_index_y() * tokens * (2 * ROW_BYTES + (SCALED ? 8 : 0));
    chunks.keys = item.keys;
    chunks.token_bits = p.token_bits;
    u8* stages = shared_memory() + warp() * (STAGES * STAGE_BYTES);

    u32 chunk = warp();
    UNROLL for (u32 stage = 0; stage + 1 < STAGES; ++stage, chunk += WARPS) {
        load_chunk(chunks, chunk, page_of(chunks, chunk), stages + stage * STAGE_BYTES);
    }
    u64 page = page_of(chunks, chunk);
    Attention attention;
    attention.begin(p, item, rows, shared_memory() + WARPS * STAGES * STAGE_BYTES);
    u32 stage = 0, ahead = STAGES - 1;
    for (u32 own = warp(); own * KEYS < item.keys; own += WARPS, chunk += WARPS) {
        wait_copies<STAGES - 2>();
        // What all lanes copied is there, and all have read what is written over now.
        sync_warp();
        load_chunk(chunks, chunk, page, stages + ahead * STAGE_BYTES);
        page = page_of(chunks, chunk + WARPS);
        attention.fold(p, stages + stage * STAGE_BYTES, own * KEYS, item.keys);
        ahead = stage;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    wait_copies<0>();
    sync_block();
    f32* parts = reinterpret_cast<f32*>(shared_memory());
    attention.end(parts + warp() * (ROWS * (2 + OUTPUT_PITCH)));
    sync_block();
    // Read again: registers are short in the loop.
    item = item_of(p);
    store(p, item, rows_of(p, item), parts);
}
