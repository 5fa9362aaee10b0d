// What a device can do at most: what kernels are measured against.

// Bytes are 16-byte words here.
struct CopyParams {
    u64 from;
    u64 to;
    u64 words;
};

// A thread copies or reads this many words at once, so that enough of them are under way.
#define WORDS_AT_ONCE 4

KERNEL(copy_words, 512, 2, CopyParams) {
    const uint4x* from = reinterpret_cast<const uint4x*>(p.from);
    uint4x* to = reinterpret_cast<uint4x*>(p.to);
    u64 step = static_cast<u64>(grid_blocks_x()) * block_threads();
    for (u64 at = static_cast<u64>(block_index_x()) * block_threads() + thread_index(); at < p.words; at += WORDS_AT_ONCE * step) {
        uint4x words[WORDS_AT_ONCE];
        UNROLL for (u32 i = 0; i < WORDS_AT_ONCE; i++) {
            if (at + i * step < p.words) words[i] = load_global_once(from + at + i * step);
        }
        UNROLL for (u32 i = 0; i < WORDS_AT_ONCE; i++) {
            if (at + i * step < p.words) to[at + i * step] = words[i];
        }
    }
}

// Each thread leaves the exclusive or of what it read at `to`, so that nothing is left out.
KERNEL(read_words, 512, 2, CopyParams) {
    const uint4x* from = reinterpret_cast<const uint4x*>(p.from);
    u64 thread = static_cast<u64>(block_index_x()) * block_threads() + thread_index();
    u64 step = static_cast<u64>(grid_blocks_x()) * block_threads();
    u32 mixed = 0;
    for (u64 at = thread; at < p.words; at += WORDS_AT_ONCE * step) {
        UNROLL for (u32 i = 0; i < WORDS_AT_ONCE; i++) {
            if (at + i * step < p.words) {
                uint4x word = load_global_once(from + at + i * step);
                mixed ^= word.x ^ word.y ^ word.z ^ word.w;
            }
        }
    }
    reinterpret_cast<u32*>(p.to)[thread] = mixed;
}

struct MatrixParams {
    u64 to;
    // Two bf16 each.
    u32 a;
    u32 b;
    u32 rounds;
    u32 reserved;
};

// Products of a warp that do not wait for each other.
#define PRODUCTS 8

// Each thread leaves the sum of its part of all products.
KERNEL(multiply_bf16, 256, 2, MatrixParams) {
    f32 sums[PRODUCTS][4] = {};
    u32 a[4] = {p.a, p.a, p.a, p.a};
    u32 b[2] = {p.b, p.b};
    for (u32 round = 0; round < p.rounds; round++) {
        UNROLL for (u32 i = 0; i < PRODUCTS; i++) mma_bf16(sums[i], a, b);
    }
    f32 sum = 0;
    UNROLL for (u32 i = 0; i < PRODUCTS; i++) sum += sums[i][0] + sums[i][1] + sums[i][2] + sums[i][3];
    reinterpret_cast<f32*>(p.to)[static_cast<u64>(block_index_x()) * block_threads() + thread_index()] = sum;
}
