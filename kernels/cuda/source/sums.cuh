// Sums over the lanes of a warp.
#pragma once
#include "ptx.cuh"

// Exclusive prefix sum over a warp.
DEVICE u32 sum_before(u32 x) {
    u32 sum = x;
    for (u32 step = 1; step < 32; step *= 2) {
        u32 other = shuffle(sum, (lane() - step) % 32);
        if (lane() >= step) sum += other;
    }
    return sum - x;
}
