// Warp-wide instructions on what each lane finds in memory: `in` and `out` are arrays of 32 lanes.

struct Params {
    u64 in;
    u64 out;
    u32 in_words;
    u32 out_words;
};

DEVICE u32* input(const Params& p) { return reinterpret_cast<u32*>(p.in) + lane() * p.in_words; }
DEVICE u32* output(const Params& p) { return reinterpret_cast<u32*>(p.out) + lane() * p.out_words; }

// In: a, b, d; out: d.
KERNEL(multiply, 32, 1, Params) {
    u32 *in = input(p), *out = output(p);
    u32 a[4], b[2];
    f32 d[4];
    for (u32 i = 0; i < 4; i++) a[i] = in[i];
    for (u32 i = 0; i < 2; i++) b[i] = in[4 + i];
    for (u32 i = 0; i < 4; i++) d[i] = from_bits(in[6 + i]);
#if KIND == 0
    mma_f16(d, a, b);
#elif KIND == 1
    mma_bf16(d, a, b);
#else
    i32 e[4];
    for (u32 i = 0; i < 4; i++) e[i] = static_cast<i32>(in[6 + i]);
    mma_i8(e, a, b);
    for (u32 i = 0; i < 4; i++) d[i] = from_bits(static_cast<u32>(e[i]));
#endif
    for (u32 i = 0; i < 4; i++) out[i] = bits_of(d[i]);
}

// In: four words of four matrices, and which 16 bytes of shared memory this lane names.
KERNEL(load, 32, 1, Params) {
    u32 *in = input(p), *out = output(p);
    u32* shared = reinterpret_cast<u32*>(shared_memory());
    for (u32 i = 0; i < 4; i++) shared[lane() * 4 + i] = in[i];
    sync_warp();
    u32 r[4], t[4];
    load_matrix_x4(r, shared + 4 * in[4]);
    load_matrix_x4_transposed(t, shared + 4 * in[4]);
    for (u32 i = 0; i < 4; i++) {
        out[i] = r[i];
        out[4 + i] = t[i];
    }
}

// In: a number, another lane.
KERNEL(exchange, 32, 1, Params) {
    u32 *in = input(p), *out = output(p);
    out[0] = shuffle(in[0], in[1]);
    out[1] = shuffle_xor(in[0], in[2]);
    out[2] = ballot(in[0] % 3 == 0);
    out[3] = reduce_max(in[0]);
    out[4] = reduce_min(in[0]);
    out[5] = reduce_add(in[0]);
    out[6] = any(in[0] == in[3]);
    out[7] = bits_of(reduce_max(static_cast<f32>(in[0])));
    out[8] = bits_of(reduce_add(static_cast<f32>(in[0] % 1000)));
    out[9] = popcount(in[0]) + 100 * popcount(static_cast<u64>(in[0]) << 20 | in[0]);
    out[10] = find_first(in[0]) + 100 * find_first(static_cast<u64>(in[0]) << 20);
    out[11] = bits_of(shuffle(from_bits(in[0]), in[1]));
    uint4x once = load_global_once(reinterpret_cast<const u32*>(p.in) + 4 * lane());
    out[12] = once.x ^ once.y ^ once.z ^ once.w;
}

// In: f32 bits; out: f16, bf16, both packed with their neighbour.
KERNEL(narrow, 32, 1, Params) {
    u32 *in = input(p), *out = output(p);
    for (u32 i = 0; i < p.in_words; i++) {
        f32 x = from_bits(in[i]), y = from_bits(in[p.in_words - 1 - i]);
        out[4 * i] = f32_to_f16(x);
        out[4 * i + 1] = f32_to_bf16(x);
        out[4 * i + 2] = pack_f16(x, y);
        out[4 * i + 3] = pack_bf16(x, y);
    }
}

// In: 16 bits; out: as f16 and bf16, and those of the word's halves.
KERNEL(widen, 32, 1, Params) {
    u32 *in = input(p), *out = output(p);
    for (u32 i = 0; i < p.in_words; i++) {
        f32 low, high;
        out[6 * i] = bits_of(f16_to_f32(static_cast<u16>(in[i])));
        out[6 * i + 1] = bits_of(bf16_to_f32(static_cast<u16>(in[i])));
        unpack_f16(in[i] << 16 | (in[i] ^ 1), low, high);
        out[6 * i + 2] = bits_of(low);
        out[6 * i + 3] = bits_of(high);
        unpack_bf16(in[i] << 16 | (in[i] ^ 1), low, high);
        out[6 * i + 4] = bits_of(low);
        out[6 * i + 5] = bits_of(high);
    }
}

// In: f32 bits; out: 2^x and log2(x).
KERNEL(exponentials, 32, 1, Params) {
    u32 *in = input(p), *out = output(p);
    for (u32 i = 0; i < p.in_words; i++) {
        out[2 * i] = bits_of(exp2_approx(from_bits(in[i])));
        out[2 * i + 1] = bits_of(log2_approx(from_bits(in[i])));
    }
}
