// Which blocks a list visits, by their energies: those near the largest (alpha), the heaviest k (top-k), or the fewest, heaviest first,
// that reach a share of all weight (mass); of equal energies the later block. Of more than may be kept (`most`) the heaviest are. Guards add blocks. A thread block makes one list: a bit for each
// block, and their count.
//
// The two that rank find the least key by its digits of 8 bits, the highest first, from a histogram of counts or of weights. Weights are
// 2^(energy − largest) in units of 2^−32, so that sums are exact in any order.
#include "ptx.cuh"

struct Params {
    u64 energies;  // f32 [lists][stride]
    u64 peaks;     // the same, or 0
    u64 always;    // u32 [lists / tiles][words]: blocks that are visited in any case, or 0
    u64 ends;      // u32 [tiles][2]: blocks that are scored; blocks of the list, the rest of which is visited
    u64 bits;      // u32 [lists][words]
    u64 counts;    // u32 [lists]
    u32 tiles;     // list l is of tile l % tiles
    u32 stride;
    u32 words;
    u32 selector;
    f32 value;     // log2 of alpha, or the share of the weight
    u32 count;     // k
    u32 sink;      // first blocks that are visited
    u32 local;     // last scored blocks that are visited
    f32 least_peak;
    u32 most;      // blocks that are kept by their energies
};

const u32 THREADS = 256;
const u32 WARPS = THREADS / 32;
// Values of `selector`; 2 is mass.
const u32 ALPHA = 0;
const u32 TOP_K = 1;

struct Shared {
    u64 histogram[256];
    u32 of_warps[WARPS];
    u32 digit;
    u32 flag;
    u64 above;
};

// Larger energies have larger keys, in the total order of IEEE 754; NaN, whatever its sign, has the largest.
DEVICE u32 key_of(f32 energy) {
    if (energy != energy) return 0xffc00000u;
    u32 bits = bits_of(energy);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

DEVICE u64 weight_of(f32 energy, f32 largest) { return static_cast<u64>(exp2_approx(energy - largest) * 4294967296.0f); }

// The largest energy of all, and whether some is NaN; NaN counts as nothing.
DEVICE f32 largest_of(const f32* energies, u32 scored, Shared* shared, bool& has_nan) {
    u32 largest = 0, nan = 0;
    for (u32 block = thread_index(); block < scored; block += THREADS) {
        f32 energy = energies[block];
        if (energy != energy) nan = 1;
        else if (key_of(energy) > largest) largest = key_of(energy);
    }
    largest = reduce_max(largest);
    nan = reduce_max(nan);
    if (lane() == 0) {
        shared->of_warps[warp()] = largest;
        shared->histogram[warp()] = nan;
    }
    sync_block();
    largest = 0;
    has_nan = false;
    for (u32 index = 0; index < WARPS; ++index) {
        if (shared->of_warps[index] > largest) largest = shared->of_warps[index];
        has_nan = has_nan || shared->histogram[index] > 0;
    }
    sync_block();
    if (largest == 0) return negative_infinity();
    return from_bits(largest ^ (largest >> 31 ? 0x80000000u : 0xffffffffu));
}

// What the lanes from this one on have.
DEVICE u64 sum_from_here(u64 x) {
    for (u32 step = 1; step < 32; step *= 2) {
        u32 from = lane() + step;
        u64 other = shuffle(static_cast<u32>(x), from % 32) | static_cast<u64>(shuffle(static_cast<u32>(x >> 32), from % 32)) << 32;
        if (from < 32) x += other;
    }
    return x;
}

// The digit at which what lies above reaches `wanted`; `above` grows by the digits over it. By the first warp.
DEVICE void find_digit(Shared* shared, u64 wanted) {
    u64 own = 0;
    for (u32 i = 0; i < 8; ++i) own += shared->histogram[lane() * 8 + i];
    u64 reached = shared->above + sum_from_here(own) - own;
    // Read by all lanes before one writes.
    sync_warp();
    if (reached >= wanted || reached + own < wanted) return;
    for (u32 i = 8; i-- > 0;) {
        u64 here = shared->histogram[lane() * 8 + i];
        if (reached + here >= wanted) {
            shared->digit = lane() * 8 + i;
            shared->above = reached;
            return;
        }
        reached += here;
    }
}

// What ranking keeps: energies with a larger key, and the last `ties` of those with this key.
struct Limit {
    u32 key;
    u32 ties;
};

// The least key of those that, heaviest first, reach `wanted` (above 0, and no more than there is).
DEVICE Limit rank(const f32* energies, u32 scored, f32 largest, bool by_weight, u64 wanted, Shared* shared) {
    u32 prefix = 0;
    if (thread_index() == 0) shared->above = 0;
    for (u32 shift = 32; shift > 0;) {
        shift -= 8;
        shared->histogram[thread_index()] = 0;
        sync_block();
        for (u32 block = thread_index(); block < scored; block += THREADS) {
            u32 key = key_of(energies[block]);
            bool counts = shift == 24 || key >> (shift + 8) == prefix >> (shift + 8);
            if (counts) atomic_add_u64(&shared->histogram[key >> shift & 0xff], by_weight ? weight_of(energies[block], largest) : 1);
        }
        sync_block();
        if (warp() == 0) find_digit(shared, wanted);
        sync_block();
        prefix |= shared->digit << shift;
    }
    f32 energy = from_bits(prefix ^ (prefix >> 31 ? 0x80000000u : 0xffffffffu));
    u64 each = by_weight ? weight_of(energy, largest) : 1, left = wanted - shared->above;
    Limit limit;
    limit.key = prefix;
    limit.ties = static_cast<u32>((left + each - 1) / each);
    return limit;
}

// Sum of all weights.
DEVICE u64 weigh(const f32* energies, u32 scored, f32 largest, Shared* shared) {
    if (thread_index() == 0) shared->above = 0;
    sync_block();
    u64 sum = 0;
    for (u32 block = thread_index(); block < scored; block += THREADS) sum += weight_of(energies[block], largest);
    atomic_add_u64(&shared->above, sum);
    sync_block();
    sum = shared->above;
    sync_block();
    return sum;
}

DEVICE Limit keep_all() { return Limit{0, 0xffffffffu}; }
DEVICE Limit keep_none() { return Limit{0xffffffffu, 0}; }

// The heaviest `count`.
DEVICE Limit keep_heaviest(u32 count, const f32* energies, u32 scored, Shared* shared) {
    if (count >= scored) return keep_all();
    return count == 0 ? keep_none() : rank(energies, scored, 0.0f, false, count, shared);
}

// What cannot be compared is visited.
DEVICE bool is_near(f32 energy, f32 least) { return energy >= least || energy - least != energy - least; }

// How many blocks are kept: by a limit, or, without one, as near enough.
DEVICE u32 count_kept(const f32* energies, u32 scored, bool ranks, const Limit& limit, f32 least, Shared* shared) {
    u32 above = 0, ties = 0;
    for (u32 block = thread_index(); block < scored; block += THREADS) {
        u32 key = key_of(energies[block]);
        above += (ranks ? key > limit.key : is_near(energies[block], least)) ? 1 : 0;
        ties += ranks && key == limit.key ? 1 : 0;
    }
    above = reduce_add(above);
    ties = reduce_add(ties);
    if (lane() == 0) {
        shared->of_warps[warp()] = above;
        shared->histogram[warp()] = ties;
    }
    sync_block();
    above = ties = 0;
    for (u32 index = 0; index < WARPS; ++index) {
        above += shared->of_warps[index];
        ties += static_cast<u32>(shared->histogram[index]);
    }
    sync_block();
    return above + (ties < limit.ties ? ties : limit.ties);
}

// Limit of the selectors that rank.
DEVICE Limit limit_of(const Params& p, const f32* energies, u32 scored, f32 largest, bool has_nan, Shared* shared) {
    if (p.selector == TOP_K) return keep_heaviest(p.count, energies, scored, shared);
    // What cannot be weighed is visited.
    if (has_nan || largest == negative_infinity() || p.value >= 1.0f) return keep_all();
    f64 share = static_cast<f64>(p.value) * static_cast<f64>(weigh(energies, scored, largest, shared));
    u64 wanted = static_cast<u64>(share);
    if (static_cast<f64>(wanted) < share) ++wanted;
    return wanted == 0 ? keep_none() : rank(energies, scored, largest, true, wanted, shared);
}

// Blocks that guards add.
DEVICE bool is_guarded(const Params& p, u32 list, u32 block, u32 scored) {
    if (block < p.sink || block + p.local >= scored) return true;
    if (p.peaks && reinterpret_cast<const f32*>(p.peaks)[u64(list) * p.stride + block] >= p.least_peak) return true;
    return p.always && (reinterpret_cast<const u32*>(p.always)[u64(list / p.tiles) * p.words + block / 32] >> block % 32 & 1);
}

// Grid: (lists).
KERNEL(select_blocks, 256, 4, Params) {
    Shared* shared = reinterpret_cast<Shared*>(shared_memory());
    u32 list = block_index_x();
    const u32* ends = reinterpret_cast<const u32*>(p.ends) + list % p.tiles * 2;
    u32 scored = ends[0], seen = ends[1];
    const f32* energies = reinterpret_cast<const f32*>(p.energies) + u64(list) * p.stride;
    bool has_nan;
    f32 largest = largest_of(energies, scored, shared, has_nan);
    bool ranks = p.selector != ALPHA;
    Limit limit = ranks ? limit_of(p, energies, scored, largest, has_nan, shared) : keep_none();
    f32 least = largest + p.value;
    if (p.most < scored && count_kept(energies, scored, ranks, limit, least, shared) > p.most) {
        limit = keep_heaviest(p.most, energies, scored, shared);
        ranks = true;
    }
    u32 ties_after = 0, visited = 0;
    // From the end, so that ties are counted from there.
    for (u32 chunk = (p.words + WARPS - 1) / WARPS; chunk-- > 0;) {
        u32 word = chunk * WARPS + warp(), block = word * 32 + lane();
        f32 energy = block < scored ? energies[block] : 0.0f;
        u32 key = key_of(energy);
        u32 ties = ballot(ranks && block < scored && key == limit.key && limit.ties > 0);
        sync_block();
        if (lane() == 0) shared->of_warps[warp()] = popcount(ties);
        sync_block();
        u32 after = ties_after + popcount(ties & ~(0xffffffffu >> (31 - lane())));
        for (u32 index = 0; index < WARPS; ++index) {
            if (index > warp()) after += shared->of_warps[index];
            ties_after += shared->of_warps[index];
        }
        bool visit = block >= scored && block < seen;
        if (block < scored) {
            visit = is_guarded(p, list, block, scored);
            if (!ranks) visit = visit || is_near(energy, least);
            else visit = visit || key > limit.key || (key == limit.key && after < limit.ties);
        }
        u32 bits = ballot(visit);
        if (lane() == 0 && word < p.words) reinterpret_cast<u32*>(p.bits)[u64(list) * p.words + word] = bits;
        visited += popcount(bits);
    }
    sync_block();
    if (lane() == 0) shared->of_warps[warp()] = visited;
    sync_block();
    if (thread_index() > 0) return;
    visited = 0;
    for (u32 index = 0; index < WARPS; ++index) visited += shared->of_warps[index];
    reinterpret_cast<u32*>(p.counts)[list] = visited;
}
