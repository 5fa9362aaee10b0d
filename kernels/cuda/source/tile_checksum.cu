// CRC-32C of tiles, one a thread block. Thread t takes the vectors of 16 bytes t, t + THREADS, …, counted so that the last vector is the
// last thread's; before the first there are zeros, which change no checksum that begins with 0.
//
// A checksum is the rest of a polynomial, so it is linear: what thread t keeps, s, becomes `s · x^(128 THREADS) + v · x^32` by one vector v.
// The tables do that in one go (they shift each vector by 16 (THREADS − 1) bytes too far, which the last multiplication takes back,
// with the shift to the thread's place).
#include "ptx.cuh"

struct Params {
    u64 tiles;      // u64 addresses, 16-byte aligned
    u64 checksums;  // u32 [tiles]
    u64 tables;     // u32 [8][256], then [THREADS]: x^(−128 t), all for the reflected polynomial
    u64 bytes;      // of a tile, a multiple of 16, not 0
};

const u32 THREADS = 256;
// The polynomial of CRC-32C, reflected: bit 31 is x^0.
const u32 POLYNOMIAL = 0x82f63b78u;

// Four bytes on: `tables` has four tables of 256.
DEVICE u32 step(const u32* tables, u32 word) {
    return tables[768 + (word & 0xff)] ^ tables[512 + (word >> 8 & 0xff)] ^ tables[256 + (word >> 16 & 0xff)] ^ tables[word >> 24];
}

// Product of two reflected polynomials modulo the polynomial.
DEVICE u32 multiply(u32 a, u32 b) {
    u32 product = 0;
    for (u32 i = 0; i < 32; ++i) {
        product ^= b & (0u - (a >> 31));
        a <<= 1;
        b = b >> 1 ^ (POLYNOMIAL & (0u - (b & 1)));
    }
    return product;
}

// Grid: (tiles).
KERNEL(checksum_tiles, 256, 4, Params) {
    u32* tables = reinterpret_cast<u32*>(shared_memory());
    const uint4x* from_tables = reinterpret_cast<const uint4x*>(p.tables);
    for (u32 index = thread_index(); index < 8 * 256 / 4; index += THREADS) {
        reinterpret_cast<uint4x*>(tables)[index] = from_tables[index];
    }
    sync_block();
    const uint4x* vectors = reinterpret_cast<const uint4x*>(reinterpret_cast<const u64*>(p.tiles)[block_index_x()]);
    u64 count = p.bytes / 16, before = (THREADS - count % THREADS) % THREADS;
    u32 state = 0;
    for (u64 index = thread_index(); index < count + before; index += THREADS) {
        if (index < before) continue;
        uint4x vector = load_global_once(vectors + (index - before));
        // A checksum begins with ones.
        if (index == before) vector.x ^= 0xffffffffu;
        state = step(tables, state ^ vector.x);
        state = step(tables, state ^ vector.y);
        state = step(tables, state ^ vector.z);
        state = step(tables + 1024, state ^ vector.w);
    }
    const u32* places = reinterpret_cast<const u32*>(p.tables) + 8 * 256;
    state = multiply(state, places[thread_index()]);
    for (u32 mask = 16; mask > 0; mask /= 2) state ^= shuffle_xor(state, mask);
    sync_block();
    if (lane() == 0) tables[warp()] = state;
    sync_block();
    if (thread_index() == 0) {
        u32 all = 0;
        for (u32 index = 0; index < THREADS / 32; ++index) all ^= tables[index];
        reinterpret_cast<u32*>(p.checksums)[block_index_x()] = ~all;
    }
}
