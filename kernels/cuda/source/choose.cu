// The likeliest tokens of rows of logits, and the sum of all their exponentials.
//
// A candidate is a u64 that orders like its logit, of equals the lower token first: the logit's bits, made to order like numbers, over
// the complement of the token. 0 is none.
#include "ptx.cuh"

// Candidates that a block puts in order: a power of two.
#define SPAN 2048
#define THREADS 256

struct Choose {
    // f32 `[rows, count]` logits, or u64 `[rows, count]` candidates.
    u64 from;
    // u64 `[rows, spans, keep]`.
    u64 best;
    // f32 `[rows, spans, 2]`: the largest logit of a span and Σ exp(logit − it); logits only.
    u64 sums;
    // u32 `[rows, spans]`: the first token of a span whose logit is not finite, or 2^32 − 1; logits only.
    u64 broken;
    u32 count, keep;
};

// Zeros of both signs are equal.
DEVICE u64 candidate_of(f32 logit, u32 token) {
    const u32 bits = bits_of(logit == 0.0f ? 0.0f : logit);
    const u32 ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return static_cast<u64>(ordered) << 32 | (0xffffffffu - token);
}

// Puts the span in shared memory in descending order (bitonic).
DEVICE void sort(u64* span) {
    for (u32 size = 2; size <= SPAN; size *= 2)
        for (u32 step = size / 2; step > 0; step /= 2) {
            sync_block();
            for (u32 i = thread_index(); i < SPAN / 2; i += THREADS) {
                const u32 low = i / step * 2 * step + i % step, high = low + step;
                const bool descending = (low & size) == 0;
                const u64 a = span[low], b = span[high];
                if ((a < b) == descending) {
                    span[low] = b;
                    span[high] = a;
                }
            }
        }
    sync_block();
}

DEVICE void write_best(const Choose& p, const u64* span) {
    u64* best = reinterpret_cast<u64*>(p.best) + (static_cast<u64>(block_index_y()) * grid_blocks_x() + block_index_x()) * p.keep;
    for (u32 i = thread_index(); i < p.keep; i += THREADS) best[i] = span[i];
}

// Largest, and sum in a fixed order, over a block.
DEVICE f32 block_max(f32 x, f32* warps) {
    x = reduce_max(x);
    if (lane() == 0) warps[warp()] = x;
    sync_block();
    f32 largest = warps[0];
    for (u32 i = 1; i < THREADS / 32; i++) largest = fmaxf(largest, warps[i]);
    sync_block();
    return largest;
}
DEVICE f32 block_sum(f32 x, f32* warps) {
    x = reduce_add(x);
    if (lane() == 0) warps[warp()] = x;
    sync_block();
    f32 sum = 0.0f;
    for (u32 i = 0; i < THREADS / 32; i++) sum += warps[i];
    sync_block();
    return sum;
}

// A block is a span (x) of one row (y) of logits.
KERNEL(choose_logits, THREADS, 2, Choose) {
    u64* span = reinterpret_cast<u64*>(shared_memory());
    f32* warps = reinterpret_cast<f32*>(span + SPAN);
    u32* broken = reinterpret_cast<u32*>(warps + THREADS / 32);
    const u32 first = block_index_x() * SPAN;
    const f32* logits = reinterpret_cast<const f32*>(p.from) + static_cast<u64>(block_index_y()) * p.count;
    f32 largest = negative_infinity(), sum = 0.0f;
    u32 first_broken = 0xffffffffu;
    for (u32 i = thread_index(); i < SPAN; i += THREADS) {
        const u32 token = first + i;
        const f32 logit = token < p.count ? logits[token] : negative_infinity();
        span[i] = token < p.count ? candidate_of(logit, token) : 0;
        largest = fmaxf(largest, logit);
        if (token < p.count && !(fabsf(logit) <= from_bits(0x7f7fffffu)) && token < first_broken) first_broken = token;
    }
    largest = block_max(largest, warps);
    for (u32 i = thread_index(); i < SPAN && first + i < p.count; i += THREADS) sum += expf(logits[first + i] - largest);
    sum = block_sum(sum, warps);
    first_broken = reduce_min(first_broken);
    if (lane() == 0) broken[warp()] = first_broken;
    sort(span);
    if (thread_index() == 0) {
        const u64 at = static_cast<u64>(block_index_y()) * grid_blocks_x() + block_index_x();
        for (u32 i = 1; i < THREADS / 32; i++) first_broken = broken[i] < first_broken ? broken[i] : first_broken;
        reinterpret_cast<f32*>(p.sums)[2 * at] = largest;
        reinterpret_cast<f32*>(p.sums)[2 * at + 1] = sum;
        reinterpret_cast<u32*>(p.broken)[at] = first_broken;
    }
    write_best(p, span);
}

// A block is a span (x) of one row (y) of candidates.
KERNEL(choose_candidates, THREADS, 2, Choose) {
    u64* span = reinterpret_cast<u64*>(shared_memory());
    const u32 first = block_index_x() * SPAN;
    const u64* from = reinterpret_cast<const u64*>(p.from) + static_cast<u64>(block_index_y()) * p.count;
    for (u32 i = thread_index(); i < SPAN; i += THREADS) span[i] = first + i < p.count ? from[first + i] : 0;
    sort(span);
    write_best(p, span);
}
