// Linear layers of many rows, with PLAIN weights (linear_few.cu). A block computes 128 outputs of TILE_ROWS rows; operands come through
// shared memory, three stages of 64 inputs.
//
// A stage holds, for the outputs and then for the rows, two halves of 32 inputs, 64 bytes each: lanes 4g + t read 16 bytes at row g, inputs
// 8t on, so that eight lanes read 128 bytes in a row of banks. The rows of the second half are swapped in pairs, so that a row's 128 bytes,
// which eight lanes write, also go to different banks.
//
// Each sum has the order of `multiply_few`: the same bits for any number of rows, as long as a matrix instruction treats all places of a
// tile alike.
//
// Constants: DTYPE (f16 or bf16), TILE_ROWS (64 or 128).
#include "ptx.cuh"

#define STORE 0
#define ADD 1
#define GATE 2

#define STAGES 3
// Thread blocks of a multiprocessor: what registers leave room for.
#define BLOCKS (TILE_ROWS == 128 ? 1 : 2)
#define TILE_OUTPUTS 128
#define STAGE_BYTES ((TILE_OUTPUTS + TILE_ROWS) * 128)
// Warps along outputs and along rows.
#define OUTPUT_WARPS (TILE_ROWS == 128 ? 2 : 4)
#define ROW_WARPS (8 / OUTPUT_WARPS)
// Tiles of a warp: 16 outputs each, 8 rows each.
#define OUTPUT_TILES (TILE_OUTPUTS / 16 / OUTPUT_WARPS)
#define ROW_TILES (TILE_ROWS / 8 / ROW_WARPS)

struct Linear {
    u64 weights, constants;
    // DTYPE `[rows, x_stride]`; inputs past the end are zero.
    u64 x;
    // f32 `[rows, out_stride]`; GATE: DTYPE.
    u64 out;
    u32 outputs, rows, groups, chunks, x_stride, out_stride, then, reserved;
};

typedef f32 Sums[OUTPUT_TILES][ROW_TILES][4];

DEVICE u16 narrow(f32 x) {
#if DTYPE == DTYPE_F16
    return f32_to_finite_f16(x);
#else
    return f32_to_bf16(x);
#endif
}

// Place of 16 bytes, inputs 8 `part` on of the half, in `count` rows of a stage.
DEVICE u32 place(u32 count, u32 half, u32 row, u32 part) { return ((half * count + (row ^ half)) * 4 + part) * 16; }

// Begins to copy `count` rows of 64 inputs; those from `there` on are zero.
DEVICE void copy_rows(u8* to, const u16* from, u32 stride, u32 count, u32 there) {
    for (u32 i = thread_index(); i < count * 8; i += 256) {
        const u32 row = i / 8, half = i / 4 % 2, part = i % 4;
        const bool valid = row < there;
        const u64 at = static_cast<u64>(valid ? row : 0) * stride + half * 32 + part * 8;
        copy_async_16(to + place(count, half, row, part), from + at, valid);
    }
}

DEVICE void copy_stage(const Linear& p, u32 stage, u32 first_output, u32 first_row) {
    if (stage < 2 * p.groups) {
        u8* to = shared_memory() + stage % STAGES * STAGE_BYTES;
        const u32 stride = p.groups * 128;
        const u16* weights = reinterpret_cast<const u16*>(p.weights) + static_cast<u64>(first_output) * stride;
        copy_rows(to, weights + stage * 64, stride, TILE_OUTPUTS, p.outputs - first_output);
        const u16* x = reinterpret_cast<const u16*>(p.x) + static_cast<u64>(first_row) * p.x_stride;
        copy_rows(to + TILE_OUTPUTS * 128, x + stage * 64, p.x_stride, TILE_ROWS, p.rows - first_row);
    }
    commit_copies();
}

DEVICE uint4x read(const u8* rows, u32 count, u32 half, u32 row, u32 part) {
    return *reinterpret_cast<const uint4x*>(rows + place(count, half, row, part));
}

// Multiplies 32 inputs of a stage.
DEVICE void multiply_half(const u8* stage, u32 half, u32 output, u32 row, Sums& sums) {
    const u32 g = lane() / 4, t = lane() % 4;
    uint4x low[OUTPUT_TILES], high[OUTPUT_TILES], x[ROW_TILES];
    UNROLL for (u32 i = 0; i < OUTPUT_TILES; i++) {
        low[i] = read(stage, TILE_OUTPUTS, half, output + i * 16 + g, t);
        high[i] = read(stage, TILE_OUTPUTS, half, output + i * 16 + g + 8, t);
    }
    UNROLL for (u32 j = 0; j < ROW_TILES; j++) x[j] = read(stage + TILE_OUTPUTS * 128, TILE_ROWS, half, row + j * 8 + g, t);
    UNROLL for (u32 i = 0; i < OUTPUT_TILES; i++) {
        const u32 a[4] = {low[i].x, high[i].x, low[i].y, high[i].y};
        UNROLL for (u32 j = 0; j < ROW_TILES; j++) {
            const u32 b[2] = {x[j].x, x[j].y};
            multiply(sums[i][j], a, b);
        }
    }
    UNROLL for (u32 i = 0; i < OUTPUT_TILES; i++) {
        const u32 a[4] = {low[i].z, high[i].z, low[i].w, high[i].w};
        UNROLL for (u32 j = 0; j < ROW_TILES; j++) {
            const u32 b[2] = {x[j].z, x[j].w};
            multiply(sums[i][j], a, b);
        }
    }
}

// Ends a part of the inputs.
DEVICE void add_part(Sums& totals, Sums& sums) {
    UNROLL for (u32 i = 0; i < OUTPUT_TILES; i++)
        UNROLL for (u32 j = 0; j < ROW_TILES; j++)
            UNROLL for (u32 k = 0; k < 4; k++) {
                totals[i][j][k] += sums[i][j][k];
                sums[i][j][k] = 0.0f;
            }
}

DEVICE void write(const Linear& p, u32 output, u32 row, f32 total) {
    if (output >= p.outputs || row >= p.rows) return;
    f32* out = reinterpret_cast<f32*>(p.out) + static_cast<u64>(row) * p.out_stride + output;
    *out = p.then == ADD ? *out + total : total;
}

DEVICE void write_gated(const Linear& p, u32 output, u32 row, f32 gate, f32 up) {
    if (2 * output >= p.outputs || row >= p.rows) return;
    const u64 at = static_cast<u64>(row) * p.out_stride + output;
    reinterpret_cast<u16*>(p.out)[at] = narrow(gate / (1.0f + expf(-gate)) * up);
}

// A block has TILE_ROWS rows (x) and 128 outputs (y).
KERNEL(multiply_many, 256, BLOCKS, Linear) {
    const u32 first_row = block_index_x() * TILE_ROWS, first_output = block_index_y() * TILE_OUTPUTS;
    const u32 output = warp() / ROW_WARPS * OUTPUT_TILES * 16, row = warp() % ROW_WARPS * ROW_TILES * 8;
    Sums totals = {}, sums = {};
    u32 chunk = 0, chunk_end = p.groups / p.chunks;
    copy_stage(p, 0, first_output, first_row);
    copy_stage(p, 1, first_output, first_row);
    for (u32 stage = 0; stage < 2 * p.groups; stage++) {
        wait_copies<STAGES - 2>();
        // Now the stage is there for all, and all are done with the one before, whose place the next copy takes.
        sync_block();
        copy_stage(p, stage + STAGES - 1, first_output, first_row);
        const u8* here = shared_memory() + stage % STAGES * STAGE_BYTES;
        multiply_half(here, 0, output, row, sums);
        multiply_half(here, 1, output, row, sums);
        if (stage % 2 == 1 && stage / 2 + 1 == chunk_end) {
            add_part(totals, sums);
            chunk++;
            chunk_end = (chunk + 1) * p.groups / p.chunks;
        }
    }
    const u32 g = lane() / 4, t = lane() % 4;
    UNROLL for (u32 i = 0; i < OUTPUT_TILES; i++)
        UNROLL for (u32 j = 0; j < ROW_TILES; j++) {
            const f32(&total)[4] = totals[i][j];
            const u32 to_row = first_row + row + j * 8 + 2 * t, to = first_output + output + i * 16;
            if (p.then == GATE) {
                write_gated(p, to / 2 + g, to_row, total[0], total[2]);
                write_gated(p, to / 2 + g, to_row + 1, total[1], total[3]);
            } else {
                write(p, to + g, to_row, total[0]);
                write(p, to + g, to_row + 1, total[1]);
                write(p, to + g + 8, to_row, total[2]);
                write(p, to + g + 8, to_row + 1, total[3]);
            }
        }
}
