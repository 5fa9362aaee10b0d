// Linear layers in f32: each output is one chain of fused multiply-adds over the inputs in order, from 0, as the CPU computes it. Exact
// rather than fast: for the self-test and for models that are small.
#include "ptx.cuh"

#define ADD 1

#define TILE 64
#define TILE_INPUTS 16

struct Linear {
    // f32 `[outputs, inputs]`.
    u64 weights;
    // f32 `[rows, inputs]`.
    u64 x;
    // f32 `[rows, out_stride]`.
    u64 out;
    u32 outputs, rows, inputs, out_stride, then, reserved;
};

// Brings 16 inputs of 64 rows, transposed; what does not exist is zero.
DEVICE void load(f32 (&to)[TILE_INPUTS][TILE + 1], const f32* from, u32 first, u32 rows, u32 inputs, u32 input) {
    for (u32 i = thread_index(); i < TILE * TILE_INPUTS; i += 256) {
        const u32 row = first + i / TILE_INPUTS, column = input + i % TILE_INPUTS;
        const bool there = row < rows && column < inputs;
        to[i % TILE_INPUTS][i / TILE_INPUTS] = there ? from[static_cast<u64>(row) * inputs + column] : 0.0f;
    }
}

// A block has 64 outputs (x) and 64 rows (y), a thread 4 of each.
KERNEL(multiply_f32, 256, 2, Linear) {
    f32(*weights)[TILE_INPUTS][TILE + 1] = reinterpret_cast<f32(*)[TILE_INPUTS][TILE + 1]>(shared_memory());
    f32(*x)[TILE_INPUTS][TILE + 1] = weights + 1;
    const u32 first_output = block_index_x() * TILE, first_row = block_index_y() * TILE;
    const u32 across = thread_index() % 16, down = thread_index() / 16;
    f32 sums[4][4] = {};
    for (u32 input = 0; input < p.inputs; input += TILE_INPUTS) {
        sync_block();
        load(*weights, reinterpret_cast<const f32*>(p.weights), first_output, p.outputs, p.inputs, input);
        load(*x, reinterpret_cast<const f32*>(p.x), first_row, p.rows, p.inputs, input);
        sync_block();
        const u32 count = p.inputs - input < TILE_INPUTS ? p.inputs - input : TILE_INPUTS;
        for (u32 k = 0; k < count; k++)
            UNROLL for (u32 j = 0; j < 4; j++)
                UNROLL for (u32 i = 0; i < 4; i++)
                    sums[j][i] = fmaf((*weights)[k][across + 16 * i], (*x)[k][down + 16 * j], sums[j][i]);
    }
    UNROLL for (u32 j = 0; j < 4; j++)
        UNROLL for (u32 i = 0; i < 4; i++) {
            const u32 output = first_output + across + 16 * i, row = first_row + down + 16 * j;
            if (output >= p.outputs || row >= p.rows) continue;
            f32* out = reinterpret_cast<f32*>(p.out) + static_cast<u64>(row) * p.out_stride + output;
            *out = p.then == ADD ? *out + sums[j][i] : sums[j][i];
        }
}
