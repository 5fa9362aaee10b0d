// What is done when all lanes have met.
namespace emulator {
namespace {

// Rows of one 8×8 matrix are read at once, 16 bytes each: those that lie a multiple of 128 bytes apart wait for each other.
void count_conflicts(Worker& w, Rows* const (&lanes)[32]) {
    for (u32 matrix = 0; matrix < 4; matrix++) {
        u32 seen = 0;
        for (u32 row = 0; row < 8; row++) {
            u32 bank = static_cast<u32>(reinterpret_cast<u64>(lanes[matrix * 8 + row]->row) / 16 % 8);
            w.bank_conflicts += seen >> bank & 1;
            seen |= 1u << bank;
        }
    }
}

void load_matrix(Worker& w, Thread* threads, bool transposed) {
    Rows* lanes[32];
    for (u32 lane = 0; lane < 32; lane++) {
        lanes[lane] = static_cast<Rows*>(threads[lane].brought);
        check_shared(w, lanes[lane]->row, 16, "a row of ldmatrix", threads[lane].line);
    }
    count_conflicts(w, lanes);
    for (u32 lane = 0; lane < 32; lane++) {
        for (u32 matrix = 0; matrix < 4; matrix++) {
            u32 both = 0;
            for (u32 half = 0; half < 2; half++) {
                u32 row = lane / 4, column = lane % 4 * 2 + half;
                if (transposed) std::swap(row, column);
                both |= static_cast<u32>(element16(lanes[matrix * 8 + row]->row, column)) << 16 * half;
            }
            lanes[lane]->registers[matrix] = both;
        }
    }
}

template <f32 (*WIDEN)(u16)>
void multiply_16(Thread* threads) {
    f32 a[16][16], b[16][8], d[16][8];
    for (u32 lane = 0; lane < 32; lane++) {
        const auto& brought = *static_cast<Matrices*>(threads[lane].brought);
        u32 g = lane / 4, t = lane % 4;
        for (u32 i = 0; i < 8; i++) {
            a[g + (i / 2 % 2) * 8][t * 2 + i % 2 + i / 4 * 8] = WIDEN(element16(brought.a, i));
        }
        for (u32 i = 0; i < 4; i++) b[t * 2 + i % 2 + i / 2 * 8][g] = WIDEN(element16(brought.b, i));
        for (u32 i = 0; i < 4; i++) d[g + i / 2 * 8][t * 2 + i % 2] = static_cast<f32*>(brought.d)[i];
    }
    for (u32 row = 0; row < 16; row++) {
        for (u32 k = 0; k < 16; k++) {
            for (u32 column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
        }
    }
    for (u32 lane = 0; lane < 32; lane++) {
        auto* to = static_cast<f32*>(static_cast<Matrices*>(threads[lane].brought)->d);
        for (u32 i = 0; i < 4; i++) to[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
}

void multiply_8(Thread* threads) {
    i32 a[16][32], b[32][8], d[16][8];
    for (u32 lane = 0; lane < 32; lane++) {
        const auto& brought = *static_cast<Matrices*>(threads[lane].brought);
        const auto *from_a = reinterpret_cast<const i8*>(brought.a), *from_b = reinterpret_cast<const i8*>(brought.b);
        u32 g = lane / 4, t = lane % 4;
        for (u32 i = 0; i < 16; i++) a[g + (i / 4 % 2) * 8][t * 4 + i % 4 + i / 8 * 16] = from_a[i];
        for (u32 i = 0; i < 8; i++) b[t * 4 + i % 4 + i / 4 * 16][g] = from_b[i];
        for (u32 i = 0; i < 4; i++) d[g + i / 2 * 8][t * 2 + i % 2] = static_cast<i32*>(brought.d)[i];
    }
    for (u32 row = 0; row < 16; row++) {
        for (u32 k = 0; k < 32; k++) {
            for (u32 column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
        }
    }
    for (u32 lane = 0; lane < 32; lane++) {
        auto* to = static_cast<i32*>(static_cast<Matrices*>(threads[lane].brought)->d);
        for (u32 i = 0; i < 4; i++) to[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
}

Exchange& exchanged(Thread* threads, u32 lane) { return *static_cast<Exchange*>(threads[lane].brought); }

template <typename Fold>
void fold(Thread* threads, Fold with) {
    u32 total = exchanged(threads, 0).value;
    for (u32 lane = 1; lane < 32; lane++) total = with(total, exchanged(threads, lane).value);
    for (u32 lane = 0; lane < 32; lane++) exchanged(threads, lane).result = total;
}

void shuffle_lanes(Thread* threads, bool exclusive) {
    for (u32 lane = 0; lane < 32; lane++) {
        Exchange& mine = exchanged(threads, lane);
        u32 from = (exclusive ? lane ^ mine.operand : mine.operand) % 32;
        mine.result = exchanged(threads, from).value;
    }
}

void perform(Worker& w, Meeting meeting, Thread* threads) {
    switch (meeting) {
        case Meeting::Shuffle: return shuffle_lanes(threads, false);
        case Meeting::ShuffleXor: return shuffle_lanes(threads, true);
        case Meeting::Ballot:
            for (u32 lane = 0; lane < 32; lane++) exchanged(threads, lane).value <<= lane;
            return fold(threads, [](u32 a, u32 b) { return a | b; });
        case Meeting::ReduceMax: return fold(threads, [](u32 a, u32 b) { return a > b ? a : b; });
        case Meeting::ReduceMin: return fold(threads, [](u32 a, u32 b) { return a < b ? a : b; });
        case Meeting::ReduceAdd: return fold(threads, [](u32 a, u32 b) { return a + b; });
        case Meeting::LoadMatrix: return load_matrix(w, threads, false);
        case Meeting::LoadMatrixTransposed: return load_matrix(w, threads, true);
        case Meeting::MmaF16: return multiply_16<f16_to_f32>(threads);
        case Meeting::MmaBf16: return multiply_16<bf16_to_f32>(threads);
        case Meeting::MmaI8: return multiply_8(threads);
        case Meeting::Product: return begin_product(w, threads);
        case Meeting::FenceProducts: return fence_registers(w, threads);
        case Meeting::CommitProducts: return commit_group(w, threads);
        case Meeting::WaitProducts: return wait_group(w, threads);
        case Meeting::ChangeRegisters: return change_registers(w, threads, exchanged(threads, 0).value, exchanged(threads, 0).operand != 0);
        case Meeting::WaitBarrier:
        case Meeting::None:
        case Meeting::SyncBlock:
        case Meeting::SyncWarp: return;
    }
}

// Who does what, in groups of threads that do the same.
std::string whereabouts(const Worker& w) {
    std::string all;
    std::vector<bool> told(w.threads.size(), false);
    for (u32 first = 0; first < w.launch->threads; first++) {
        const Thread& one = w.threads[first];
        if (told[first]) continue;
        u32 like = 0;
        for (u32 other = first; other < w.launch->threads; other++) {
            const Thread& two = w.threads[other];
            if (two.state == one.state && (one.state == State::Gone || (two.meeting == one.meeting && two.line == one.line))) {
                told[other] = true;
                like++;
            }
        }
        all += text("%sthread %u", all.empty() ? "" : "; ", first);
        if (like > 1) all += text(" and %u more", like - 1);
        all += one.state == State::Gone ? " left" : text(" in %s (line %d)", name(one.meeting), one.line);
        if (all.size() > 400) break;
    }
    return all;
}

void check_same(Worker& w, const Thread* threads, u32 count) {
    for (u32 other = 1; other < count; other++) {
        if (threads[other].meeting != threads[0].meeting || threads[other].line != threads[0].line) {
            give_up(w, place(w) + ": threads meet in different places: " + whereabouts(w));
        }
    }
}

void meet_block(Worker& w) {
    Thread& me = *w.current;
    if (++w.at_barrier < w.launch->threads) return give_way(w);
    check_same(w, w.threads.data(), w.launch->threads);
    if (w.tracks) all_met(w);
    w.at_barrier = 0;
    for (u32 thread = 0; thread < w.launch->threads; thread++) w.threads[thread].state = State::Ready;
    for (Warp& warp : w.warps) warp.ready = 0xffffffffu;
    w.warps[me.here.thread / 32].ready &= ~(1u << me.here.thread % 32);
}

void meet_warp(Worker& w) {
    Thread& me = *w.current;
    u32 of = me.here.thread / 32;
    Warp& warp = w.warps[of];
    if (++warp.met < 32) return give_way(w);
    Thread* threads = &w.threads[of * 32];
    check_same(w, threads, 32);
    perform(w, me.meeting, threads);
    warp.met = 0;
    for (u32 lane = 0; lane < 32; lane++) threads[lane].state = State::Ready;
    warp.ready = ~(1u << me.here.thread % 32);
}

}  // namespace
}  // namespace emulator
