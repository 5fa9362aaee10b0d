// Linear layers of few rows: weights are read once and multiplied from registers, quantised ones without ever being written out. And what
// else reads weights as they are packed: `embed`, and `expand`, which makes quantised weights plain for `multiply_many`.
//
// Packed weights (src/model/pack.rs): rows of `groups` groups of 128 inputs; inputs past the end are zero. A group is four steps of 32
// inputs; lane t of a quad takes inputs 8t to 8t + 7 of each step, which makes the operands of two matrix instructions without a shuffle.
//   PLAIN    16-bit elements in order, 256 bytes.
//   BYTES    128 bytes: for each half, t and step of it, 8 quants q + 128 in two words; of four inputs, the first two at bits 0 and 16, the
//            others at bits 8 and 24. Constants: two f16 scales a step, of its lower and upper 16 inputs. w = d q.
//   NIBBLES  64 bytes: for each t and step, 8 quants of 4 bits; input 2p at bits 4p, 2p + 1 at bits 16 + 4p. Constants: f16 scale and
//            minimum a step. w = d q + m.
//
// The order of a sum: inputs are cut into `chunks` parts of whole groups; a part is one chain of matrix instructions from 0, in order; the
// parts are added in order. Nothing of it depends on the rows of the call, and `multiply_many` keeps to it.
//
// Constants: DTYPE (f16 or bf16), FORMAT; ROW_TILES (8 rows each) for `multiply_few`.
#include "ptx.cuh"

#define PLAIN 0
#define BYTES 1
#define NIBBLES 2

// A packed matrix.
struct Packed {
    u64 weights, constants;
    u32 groups;
};

// 128 inputs of one output, as many as one lane takes.
struct Group {
#if FORMAT == PLAIN
    uint4x words[4];
#elif FORMAT == BYTES
    uint4x words[2];
#else
    uint4x words[1];
#endif
#if FORMAT != PLAIN
    // One word a step.
    uint4x constants;
#endif
};

DEVICE Group load_group(const Packed& matrix, u64 output, u32 group, u32 t) {
    const u64 index = output * matrix.groups + group;
    Group loaded;
    const u8* words = reinterpret_cast<const u8*>(matrix.weights) + index * sizeof loaded.words * 4 + t * 16;
    UNROLL for (u32 i = 0; i < sizeof loaded.words / 16; i++) loaded.words[i] = load_global_once(words + i * 64);
#if FORMAT != PLAIN
    loaded.constants = reinterpret_cast<const uint4x*>(matrix.constants)[index];
#endif
    return loaded;
}

DEVICE u32 word_of(const uint4x& words, u32 index) {
    return index == 0 ? words.x : index == 1 ? words.y : index == 2 ? words.z : words.w;
}

#if FORMAT != PLAIN

DEVICE u32 twice(u32 half) { return (half & 0xffff) | half << 16; }

// Four pairs of weights out of words of which two halves hold a quant each, at bits `shift`, under `mask`; `zero` is the f16 that 1024 + q
// is more than q by.
DEVICE u32 pair_of(u32 word, u32 shift, u32 mask, u32 zero, u32 scale, u32 minimum) {
    const u32 quants = word >> shift & (mask | mask << 16);
#if DTYPE == DTYPE_F16
    // 0x6400 is 1024, whose lowest bit counts 1: the quants are put into it and come out as numbers, exactly.
    return fma_f16x2(add_f16x2(quants | 0x64006400, twice(zero)), scale, minimum);
#else
    const f32 offset = f16_to_f32(static_cast<u16>(zero)) + 1024.0f;
    f32 d, ignored, m;
    unpack_f16(scale, d, ignored);
    unpack_f16(minimum, m, ignored);
    const f32 low = static_cast<f32>(quants & 0xffff) + offset, high = static_cast<f32>(quants >> 16) + offset;
    return pack_bf16(fmaf(low, d, m), fmaf(high, d, m));
#endif
}

#endif

// Inputs 8t to 8t + 7 of a step of 32, in pairs.
DEVICE void step_of(const Group& group, u32 step, [[maybe_unused]] u32 t, u32 (&pairs)[4]) {
#if FORMAT == PLAIN
    UNROLL for (u32 i = 0; i < 4; i++) pairs[i] = word_of(group.words[step], i);
#elif FORMAT == BYTES
    const u32 scale = twice(word_of(group.constants, step) >> 16 * (t / 2));
    UNROLL for (u32 i = 0; i < 4; i++) {
        const u32 word = word_of(group.words[step / 2], 2 * (step % 2) + i / 2);
        // −1152 = −(1024 + 128).
        pairs[i] = pair_of(word, 8 * (i % 2), 0xff, 0xe480, scale, 0);
    }
#else
    const u32 word = word_of(group.words[0], step), constants = word_of(group.constants, step);
    const u32 scale = twice(constants), minimum = twice(constants >> 16);
    UNROLL for (u32 i = 0; i < 4; i++) pairs[i] = pair_of(word, 4 * i, 0xf, 0xe400, scale, minimum);
#endif
}

#ifdef ROW_TILES

#define STORE 0
#define ADD 1
#define GATE 2

#define WARPS 8
#define ROWS (8 * ROW_TILES)
// Whether the next group is on its way while one is multiplied; with many rows there are no registers for it, and more to do meanwhile.
#define AHEAD (ROW_TILES == 1 || FORMAT == PLAIN)

struct Linear {
    u64 weights, constants;
    // DTYPE `[rows, x_stride]`; inputs past the end are zero.
    u64 x;
    // f32 `[rows, out_stride]`; GATE: DTYPE.
    u64 out;
    u32 outputs, rows, groups, chunks, x_stride, out_stride, then, reserved;
};

DEVICE u16 narrow(f32 x) {
#if DTYPE == DTYPE_F16
    return f32_to_finite_f16(x);
#else
    return f32_to_bf16(x);
#endif
}

// One part of the inputs for 16 outputs and all rows of the block.
DEVICE void part(const Linear& p, u32 chunk, f32 (&sums)[ROW_TILES][4]) {
    const u32 g = lane() / 4, t = lane() % 4, first_output = block_index_x() * 16;
    const u32 low_output = first_output + g < p.outputs ? first_output + g : p.outputs - 1;
    const u32 high_output = first_output + g + 8 < p.outputs ? first_output + g + 8 : p.outputs - 1;
    const Packed matrix{p.weights, p.constants, p.groups};
    const u32 end = (chunk + 1) * p.groups / p.chunks;
    u32 group = chunk * p.groups / p.chunks;
    Group low = load_group(matrix, low_output, group, t), high = load_group(matrix, high_output, group, t);
    for (; group < end; group++) {
        const Group low_now = low, high_now = high;
        if (AHEAD && group + 1 < end) {
            low = load_group(matrix, low_output, group + 1, t);
            high = load_group(matrix, high_output, group + 1, t);
        }
        UNROLL for (u32 step = 0; step < 4; step++) {
            u32 l[4], h[4];
            step_of(low_now, step, t, l);
            step_of(high_now, step, t, h);
            const u32 first[4] = {l[0], h[0], l[1], h[1]}, second[4] = {l[2], h[2], l[3], h[3]};
            UNROLL for (u32 tile = 0; tile < ROW_TILES; tile++) {
                const u32 row = block_index_y() * ROWS + tile * 8 + g;
                uint4x x = {0, 0, 0, 0};
                const u64 at = static_cast<u64>(row) * p.x_stride + group * 128 + step * 32 + t * 8;
                if (row < p.rows) x = *reinterpret_cast<const uint4x*>(reinterpret_cast<const u16*>(p.x) + at);
                const u32 b_first[2] = {x.x, x.y}, b_second[2] = {x.z, x.w};
                multiply(sums[tile], first, b_first);
                multiply(sums[tile], second, b_second);
            }
        }
        if (!AHEAD && group + 1 < end) {
            low = load_group(matrix, low_output, group + 1, t);
            high = load_group(matrix, high_output, group + 1, t);
        }
    }
}

// The sum of the parts for one output and row.
DEVICE f32 total_of(const f32* parts, u32 chunks, u32 row, u32 output) {
    f32 total = 0.0f;
    for (u32 chunk = 0; chunk < chunks; chunk++) total += parts[(chunk * ROWS + row) * 16 + output];
    return total;
}

// A block has 16 outputs (x) and ROWS rows (y); each warp takes a part of the inputs, at most 8.
KERNEL(multiply_few, 32 * WARPS, 2, Linear) {
    f32* parts = reinterpret_cast<f32*>(shared_memory());
    const u32 g = lane() / 4, t = lane() % 4;
    if (warp() < p.chunks) {
        f32 sums[ROW_TILES][4] = {};
        part(p, warp(), sums);
        UNROLL for (u32 tile = 0; tile < ROW_TILES; tile++) {
            f32* to = parts + (warp() * ROWS + tile * 8 + 2 * t) * 16 + g;
            to[0] = sums[tile][0];
            to[16] = sums[tile][1];
            to[8] = sums[tile][2];
            to[24] = sums[tile][3];
        }
    }
    sync_block();
    // With GATE, outputs 8 to 15 of a block go up with gates 0 to 7.
    const u32 width = p.then == GATE ? 8 : 16;
    for (u32 i = thread_index(); i < ROWS * width; i += block_threads()) {
        const u32 row = block_index_y() * ROWS + i / width, column = block_index_x() * width + i % width;
        if (row >= p.rows || block_index_x() * 16 + i % width >= p.outputs) continue;
        const u64 at = static_cast<u64>(row) * p.out_stride + column;
        const f32 total = total_of(parts, p.chunks, i / width, i % width);
        if (p.then == GATE) {
            const f32 up = total_of(parts, p.chunks, i / width, i % width + 8);
            reinterpret_cast<u16*>(p.out)[at] = narrow(total / (1.0f + expf(-total)) * up);
        } else {
            f32* out = reinterpret_cast<f32*>(p.out) + at;
            *out = p.then == ADD ? *out + total : total;
        }
    }
}

#else

struct Table {
    u64 weights, constants;
    // embed: u32 `[rows]`, which outputs (tokens); expand: not used.
    u64 tokens;
    // embed: f32 `[rows, width]`; expand: PLAIN rows.
    u64 out;
    u32 rows, width, groups, first;
};

// A block is one row; the weights of a token become f32.
KERNEL(embed, 128, 8, Table) {
    const u32 row = block_index_x();
    const u32 token = reinterpret_cast<const u32*>(p.tokens)[row];
    f32* out = reinterpret_cast<f32*>(p.out) + static_cast<u64>(row) * p.width;
    for (u32 i = thread_index(); i < p.groups * 4; i += block_threads()) {
        const Group group = load_group(Packed{p.weights, p.constants, p.groups}, token, i / 4, i % 4);
        UNROLL for (u32 step = 0; step < 4; step++) {
            u32 pairs[4];
            step_of(group, step, i % 4, pairs);
            UNROLL for (u32 pair = 0; pair < 4; pair++) {
                const u32 input = i / 4 * 128 + step * 32 + i % 4 * 8 + 2 * pair;
                f32 low, high;
#if DTYPE == DTYPE_F16
                unpack_f16(pairs[pair], low, high);
#else
                unpack_bf16(pairs[pair], low, high);
#endif
                if (input < p.width) out[input] = low;
                if (input + 1 < p.width) out[input + 1] = high;
            }
        }
    }
}

// A block is one output of `rows`, from `first` on; its weights become PLAIN, with the bits that `multiply_few` multiplies.
KERNEL(expand, 128, 8, Table) {
    const u64 row = block_index_x();
    uint4x* out = reinterpret_cast<uint4x*>(p.out) + row * p.groups * 16;
    for (u32 i = thread_index(); i < p.groups * 4; i += block_threads()) {
        const Group group = load_group(Packed{p.weights, p.constants, p.groups}, p.first + row, i / 4, i % 4);
        UNROLL for (u32 step = 0; step < 4; step++) {
            u32 pairs[4];
            step_of(group, step, i % 4, pairs);
            out[i / 4 * 16 + step * 4 + i % 4] = uint4x{pairs[0], pairs[1], pairs[2], pairs[3]};
        }
    }
}

#endif
