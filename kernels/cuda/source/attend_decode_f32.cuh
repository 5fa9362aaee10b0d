#if DTYPE == DTYPE_F32
// A warp's fold of 16 keys of f32 pages onto 8 rows: logits are one chain of fused multiply-adds over the elements in order, as on the
// CPU. ROW_TILES is 1. Shared memory of its own: queries [8][HEAD_DIM], then for each warp shares [16 keys][8 rows] and what is kept [8].

const u32 EACH = (HEAD_DIM + 31) / 32;

// A lane has the logits of key lane % 16 for rows 4 (lane / 16) and the next three, and the output of elements lane, lane + 32, … for
// all rows.
struct Attention {
    f32 o[EACH][ROWS];
    f32 m[4];
    f32 l[4];
    u32 seen[4];
    const f32* q;
    f32* shares;
    f32* kept;

    DEVICE_MEMBER void begin(const Params& p, const Item& item, const Rows& rows, u8* shared) {
        f32* queries = reinterpret_cast<f32*>(shared);
        shares = queries + ROWS * HEAD_DIM + warp() * (KEYS * ROWS + ROWS);
        kept = shares + KEYS * ROWS;
        for (u32 index = thread_index(); index < ROWS * HEAD_DIM; index += block_threads()) {
            u32 row = index / HEAD_DIM;
            queries[index] = row < rows.count ? query_row(p, item, rows, row)[index % HEAD_DIM] : 0.0f;
        }
        sync_block();
        q = queries + lane() / 16 * 4 * HEAD_DIM;
        UNROLL for (u32 i = 0; i < 4; ++i) {
            m[i] = negative_infinity();
            l[i] = 0.0f;
            seen[i] = keys_seen(p, item, rows, lane() / 16 * 4 + i);
        }
        UNROLL for (u32 i = 0; i < EACH; ++i) {
            UNROLL for (u32 row = 0; row < ROWS; ++row) o[i][row] = 0.0f;
        }
    }

    DEVICE_MEMBER void fold(const Params& p, const u8* stage, u32 first, u32) {
        u32 key = lane() % 16;
        f32 t[4];
        multiply_key(stage + key * PITCH, t);
        UNROLL for (u32 i = 0; i < 4; ++i) {
            t[i] = first + key < seen[i] ? t[i] * p.scale : negative_infinity();
            f32 top = t[i];
            UNROLL for (u32 mask = 1; mask < 16; mask *= 2) top = fmaxf(top, shuffle_xor(top, mask));
            top = fmaxf(top, m[i]);
            f32 base = top == negative_infinity() ? 0.0f : top;
            f32 keep = exp2_approx(m[i] - base);
            m[i] = top;
            t[i] = exp2_approx(t[i] - base);
            l[i] = fmaf(l[i], keep, t[i]);
            shares[key * ROWS + lane() / 16 * 4 + i] = t[i];
            if (key == 0) kept[lane() / 16 * 4 + i] = keep;
        }
        sync_warp();
        multiply_values(stage + KEYS * PITCH);
    }

    DEVICE_MEMBER void multiply_key(const u8* key, f32 (&t)[4]) {
        UNROLL for (u32 i = 0; i < 4; ++i) t[i] = 0.0f;
        _Pragma("unroll 4") for (u32 element = 0; element < HEAD_DIM; element += 4) {
            uint4x k = *reinterpret_cast<const uint4x*>(key + element * 4);
            UNROLL for (u32 i = 0; i < 4; ++i) {
                uint4x x = *reinterpret_cast<const uint4x*>(q + i * HEAD_DIM + element);
                t[i] = fmaf(from_bits(x.x), from_bits(k.x), t[i]);
                t[i] = fmaf(from_bits(x.y), from_bits(k.y), t[i]);
                t[i] = fmaf(from_bits(x.z), from_bits(k.z), t[i]);
                t[i] = fmaf(from_bits(x.w), from_bits(k.w), t[i]);
            }
        }
    }

    DEVICE_MEMBER void multiply_values(const u8* v) {
        UNROLL for (u32 row = 0; row < ROWS; ++row) {
            f32 keep = kept[row];
            UNROLL for (u32 i = 0; i < EACH; ++i) o[i][row] *= keep;
        }
        _Pragma("unroll 2") for (u32 key = 0; key < KEYS; ++key) {
            const f32* value = reinterpret_cast<const f32*>(v + key * PITCH);
            UNROLL for (u32 i = 0; i < EACH; ++i) {
                u32 element = i * 32 + lane();
                f32 x = element < HEAD_DIM ? value[element] : 0.0f;
                UNROLL for (u32 row = 0; row < ROWS; ++row) o[i][row] = fmaf(shares[key * ROWS + row], x, o[i][row]);
            }
        }
    }

    DEVICE_MEMBER void end(f32* to) {
        UNROLL for (u32 i = 0; i < 4; ++i) {
            f32 sum = l[i];
            UNROLL for (u32 mask = 1; mask < 16; mask *= 2) sum += shuffle_xor(sum, mask);
            u32 row = lane() / 16 * 4 + i;
            if (lane() % 16 == 0) {
                to[row] = m[i];
                to[ROWS + row] = sum;
            }
        }
        UNROLL for (u32 i = 0; i < EACH; ++i) {
            u32 element = i * 32 + lane();
            if (element >= HEAD_DIM) continue;
            UNROLL for (u32 row = 0; row < ROWS; ++row) to[2 * ROWS + row * OUTPUT_PITCH + element] = o[i][row];
        }
    }
};
#endif
