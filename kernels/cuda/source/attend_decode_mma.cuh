#if DTYPE != DTYPE_F32
// A warp's fold of 16 keys onto its rows by matrix instructions, pages of f16, bf16, int8 or e4m3.

// Groups of 16 elements of a head.
const u32 STEPS = HEAD_DIM / 16;

#if DTYPE == DTYPE_BF16
DEVICE u32 pack(f32 low, f32 high) { return pack_bf16(low, high); }
#else
DEVICE u32 pack(f32 low, f32 high) { return pack_f16(low, high); }
#endif

// Two elements of a query; what is beyond the range becomes the largest.
DEVICE u32 pack_query(f32 low, f32 high) {
    const f32 most = DTYPE == DTYPE_BF16 ? 3.3895314e38f : 65504.0f;
    return pack(fminf(fmaxf(low, -most), most), fminf(fmaxf(high, -most), most));
}

// Bytes I and J of a word, as f16.
template <u32 I, u32 J>
DEVICE u32 widen(u32 word) {
#if DTYPE == DTYPE_INT8
    return int8_to_f16<I, J>(word);
#else
    return e4m3_to_f16<I, J>(word);
#endif
}
// What widen makes is so much smaller.
const f32 WIDENED = DTYPE == DTYPE_E4M3 ? 256.0f : 1.0f;

DEVICE f32 max_over_keys(f32 x) {
    x = fmaxf(x, shuffle_xor(x, 4));
    x = fmaxf(x, shuffle_xor(x, 8));
    return fmaxf(x, shuffle_xor(x, 16));
}
DEVICE f32 sum_over_keys(f32 x) {
    x += shuffle_xor(x, 4);
    x += shuffle_xor(x, 8);
    return x + shuffle_xor(x, 16);
}

// With g = lane / 4 and c = lane % 4, a lane has keys g and g + 8 of rows 2c and 2c + 1 of each row tile.
struct Attention {
    u32 q[ROW_TILES][STEPS][2];
    f32 o[ROW_TILES][STEPS][4];
    f32 m[ROW_TILES][2];
    f32 l[ROW_TILES][2];
    // Keys that the rows see, and all rows of the thread block.
    u32 seen[ROW_TILES][2];
    u32 seen_by_all;
    f32 scale;

    DEVICE_MEMBER void begin(const Params& p, const Item& item, const Rows& rows, u8*) {
        u32 g = lane() / 4, c = lane() % 4;
        scale = p.scale * (SCALED ? WIDENED : 1.0f);
        u32 least = item.keys;
        UNROLL for (u32 tile = 0; tile < ROW_TILES; ++tile) {
            load_queries(p, item, rows, tile, g, c);
            UNROLL for (u32 i = 0; i < 2; ++i) {
                m[tile][i] = negative_infinity();
                l[tile][i] = 0.0f;
                seen[tile][i] = keys_seen(p, item, rows, tile * 8 + 2 * c + i);
                if (seen[tile][i] < least) least = seen[tile][i];
            }
            UNROLL for (u32 step = 0; step < STEPS; ++step) {
                UNROLL for (u32 i = 0; i < 4; ++i) o[tile][step][i] = 0.0f;
            }
        }
        seen_by_all = reduce_min(least);
    }

    // Which elements a lane has of a step is free, as long as K has the same: pairs 8 apart as matrices lie, or, of bytes, four in a row.
    DEVICE_MEMBER void load_queries(const Params& p, const Item& item, const Rows& rows, u32 tile, u32 g, u32 c) {
        u32 row = tile * 8 + g;
        bool exists = row < rows.count;
        const f32* from = query_row(p, item, rows, exists ? row : 0);
        UNROLL for (u32 step = 0; step < STEPS; ++step) {
            UNROLL for (u32 i = 0; i < 2; ++i) {
                u32 element = step * 16 + (SCALED ? 4 * c + 2 * i : 2 * c + 8 * i);
                q[tile][step][i] = exists ? pack_query(from[element], from[element + 1]) : 0;
            }
        }
    }

    DEVICE_MEMBER void fold(const Params&, const u8* stage, u32 first, u32 keys) {
        f32 t[ROW_TILES][4];
        UNROLL for (u32 tile = 0; tile < ROW_TILES; ++tile) {
            UNROLL for (u32 i = 0; i < 4; ++i) t[tile][i] = 0.0f;
        }
        multiply_keys(stage, t);
        const f32* scales = reinterpret_cast<const f32*>(stage + 2 * KEYS * PITCH);
        u32 key = lane() / 4;
        f32 k_scale[2] = {scale, scale}, v_scale[2] = {1.0f, 1.0f}, unit = 1.0f;
        if (SCALED) {
            UNROLL for (u32 i = 0; i < 2; ++i) {
                bool exists = first + key + 8 * i < keys;
                k_scale[i] = exists ? scale * scales[key + 8 * i] : 0.0f;
                v_scale[i] = exists ? scales[KEYS + key + 8 * i] : 0.0f;
            }
            // P counts in shares of the largest scale, which f16 can hold.
            unit = fmaxf(max_over_keys(fmaxf(v_scale[0], v_scale[1])), 1.1754944e-38f);
            f32 inverse = 1.0f / unit;
            v_scale[0] *= inverse;
            v_scale[1] *= inverse;
            unit *= WIDENED;
        }
        bool masked = first + KEYS > seen_by_all;
        UNROLL for (u32 tile = 0; tile < ROW_TILES; ++tile) {
            u32 probabilities[2];
            f32 kept[2];
            soften(tile, first + key, masked, t[tile], k_scale, v_scale, probabilities, kept);
            t[tile][0] = from_bits(probabilities[0]);
            t[tile][1] = from_bits(probabilities[1]);
            t[tile][2] = kept[0];
            t[tile][3] = kept[1];
        }
        multiply_values(stage + KEYS * PITCH, t, unit);
    }

    // From logits of keys `key` and `key + 8` to shares, as the second operand of the product with V, and what is kept of o.
    DEVICE_MEMBER void soften(u32 tile, u32 key, bool masked, const f32 (&t)[4], const f32 (&k_scale)[2],
                              const f32 (&v_scale)[2], u32 (&probabilities)[2], f32 (&kept)[2]) {
        f32 p[4];
        UNROLL for (u32 i = 0; i < 4; ++i) {
            p[i] = t[i] * k_scale[i / 2];
            if (masked && key + i / 2 * 8 >= seen[tile][i % 2]) p[i] = negative_infinity();
        }
        UNROLL for (u32 i = 0; i < 2; ++i) {
            f32 top = fmaxf(m[tile][i], max_over_keys(fmaxf(p[i], p[i + 2])));
            f32 base = top == negative_infinity() ? 0.0f : top;
            kept[i] = exp2_approx(m[tile][i] - base);
            m[tile][i] = top;
            p[i] = exp2_approx(p[i] - base);
            p[i + 2] = exp2_approx(p[i + 2] - base);
            l[tile][i] = fmaf(l[tile][i], kept[i], p[i] + p[i + 2]);
        }
        // Elements (key g, rows 2c and 2c + 1) to (row g, keys 2c and 2c + 1).
        probabilities[0] = transpose_8x8(pack(p[0] * v_scale[0], p[1] * v_scale[0]));
        probabilities[1] = transpose_8x8(pack(p[2] * v_scale[1], p[3] * v_scale[1]));
    }

    DEVICE_MEMBER void multiply_keys(const u8* k, f32 (&t)[ROW_TILES][4]) {
        const u8* row = k + lane() % 16 * PITCH + lane() / 16 * 16;
#if DTYPE == DTYPE_INT8 || DTYPE == DTYPE_E4M3
        UNROLL for (u32 step = 0; step < STEPS; step += 2) {
            u32 r[4];
            load_matrix_x4(r, row + step * 16);
            UNROLL for (u32 half = 0; half < 2 && step + half < STEPS; ++half) {
                u32 x = r[2 * half], y = r[2 * half + 1];
                const u32 a[4] = {widen<0, 1>(x), widen<0, 1>(y), widen<2, 3>(x), widen<2, 3>(y)};
                UNROLL for (u32 tile = 0; tile < ROW_TILES; ++tile) multiply(t[tile], a, q[tile][step + half]);
            }
        }
#else
        UNROLL for (u32 step = 0; step < STEPS; ++step) {
            u32 a[4];
            load_matrix_x4(a, row + step * 32);
            UNROLL for (u32 tile = 0; tile < ROW_TILES; ++tile) multiply(t[tile], a, q[tile][step]);
        }
#endif
    }

    // `t`: shares (two registers) and what is kept, of each row tile.
    DEVICE_MEMBER void multiply_values(const u8* v, const f32 (&t)[ROW_TILES][4], [[maybe_unused]] f32 unit) {
#if DTYPE == DTYPE_INT8 || DTYPE == DTYPE_E4M3
        const u8* row = v + lane() % 16 * PITCH + lane() / 16 * 16;
        UNROLL for (u32 step = 0; step < STEPS; step += 2) {
            u32 r[4];
            load_matrix_x4_transposed(r, row + step * 16);
            UNROLL for (u32 half = 0; half < 2 && step + half < STEPS; ++half) {
                // Of 16-bit pairs of elements that were turned round: row g of the product is element 2g, row g + 8 element 2g + 1.
                u32 x = r[2 * half], y = r[2 * half + 1];
                const u32 a[4] = {widen<0, 2>(x), widen<1, 3>(x), widen<0, 2>(y), widen<1, 3>(y)};
                UNROLL for (u32 tile = 0; tile < ROW_TILES; ++tile) {
                    const u32 b[2] = {bits_of(t[tile][0]), bits_of(t[tile][1])};
                    f32 sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                    multiply(sum, a, b);
                    f32(&to)[4] = o[tile][step + half];
                    UNROLL for (u32 i = 0; i < 4; ++i) to[i] = fmaf(sum[i], unit, to[i] * t[tile][2 + i % 2]);
                }
            }
        }
#else
        bool changed = false;
        UNROLL for (u32 tile = 0; tile < ROW_TILES; ++tile) changed = changed || t[tile][2] != 1.0f || t[tile][3] != 1.0f;
        if (any(changed)) {
            UNROLL for (u32 tile = 0; tile < ROW_TILES; ++tile) {
                UNROLL for (u32 step = 0; step < STEPS; ++step) {
                    UNROLL for (u32 i = 0; i < 4; ++i) o[tile][step][i] *= t[tile][2 + i % 2];
                }
            }
        }
        const u8* row = v + (lane() % 8 + lane() / 16 * 8) * PITCH + lane() / 8 % 2 * 16;
        UNROLL for (u32 step = 0; step < STEPS; ++step) {
            u32 a[4];
            load_matrix_x4_transposed(a, row + step * 32);
            UNROLL for (u32 tile = 0; tile < ROW_TILES; ++tile) {
                const u32 b[2] = {bits_of(t[tile][0]), bits_of(t[tile][1])};
                multiply(o[tile][step], a, b);
            }
        }
#endif
    }

    DEVICE_MEMBER void end(f32* to) {
        u32 g = lane() / 4, c = lane() % 4;
        UNROLL for (u32 tile = 0; tile < ROW_TILES; ++tile) {
            UNROLL for (u32 i = 0; i < 2; ++i) {
                f32 sum = sum_over_keys(l[tile][i]);
                u32 row = tile * 8 + 2 * c + i;
                if (g == 0) {
                    to[row] = m[tile][i];
                    to[ROWS + row] = sum;
                }
                f32* output = to + 2 * ROWS + row * OUTPUT_PITCH;
                UNROLL for (u32 step = 0; step < STEPS; ++step) {
                    output[step * 16 + (SCALED ? 2 * g : g)] = o[tile][step][i];
                    output[step * 16 + (SCALED ? 2 * g + 1 : g + 8)] = o[tile][step][i + 2];
                }
            }
        }
    }
};
#endif
