// Folds the parts of lists that were cut along their keys, in order: a warp takes one row at a time.

#define WARPS 4
#define THREADS (32 * WARPS)
#define PARTS ((HEAD_DIM + 31) / 32)

// Packed rows of a KV head whose list was cut.
struct Merge {
    u32 first_row;
    u32 rows;
    u32 kv_head;
    // Row of the parts where the first lies; the others follow.
    u32 part;
    u32 parts;
    // Rows of each.
    u32 part_rows;
};

KERNEL(merge_parts, THREADS, 1, Params) {
    const Merge& merge = reinterpret_cast<const Merge*>(p.items)[block_index_x()];
    for (u32 row = warp(); row < merge.rows; row += WARPS) {
        f32 top = negative_infinity(), sum = 0;
        f32 output[PARTS] = {};
        for (u32 part = 0; part < merge.parts; part++) {
            u64 at = static_cast<u64>(merge.part) + static_cast<u64>(part) * merge.part_rows + row;
            const f32* sums = reinterpret_cast<const f32*>(p.part_sums) + 2 * at;
            // A part without keys changes nothing.
            if (sums[0] == negative_infinity()) continue;
            f32 after = fmaxf(top, sums[0]), earlier = exp2_approx(top - after), later = exp2_approx(sums[0] - after);
            top = after;
            sum = fmaf(later, sums[1], earlier * sum);
            for (u32 piece = 0; piece < PARTS; piece++) {
                u32 index = piece * 32 + lane();
                if (index >= HEAD_DIM) continue;
                f32 other = reinterpret_cast<const f32*>(p.part_output)[at * HEAD_DIM + index];
                output[piece] = fmaf(later, other, earlier * output[piece]);
            }
        }
        store_row(p, top, sum, output, pair_of(p, merge.kv_head, merge.first_row + row), true);
    }
}
