// Products of warp groups. They are made when they are waited for, as late as they may be; until then their accumulators are NaN, and what they
// read of registers and of shared memory must stay as it is. A warp has 16 rows of the 64, and comes to its part of a product without the others.
namespace emulator {
namespace {

// ---- Where matrices lie ("Matrix Descriptor Format", "Canonical Layouts", "Strides") ----

struct Descriptor {
    u32 start, leading, stride, base_offset, mode;
    explicit Descriptor(u64 bits)
        : start(static_cast<u32>(bits & 0x3fff) << 4),
          leading(static_cast<u32>(bits >> 16 & 0x3fff) << 4),
          stride(static_cast<u32>(bits >> 32 & 0x3fff) << 4),
          base_offset(bits >> 49 & 7),
          mode(static_cast<u32>(bits >> 62)) {}
    // 16-byte pieces of a row: none exchanged, then 128, 64, 32 bytes.
    u32 pieces() const { return mode == 0 ? 1 : 16u >> mode; }
    u32 exchanged(u32 at) const { return at ^ (at >> 7 & (pieces() - 1)) << 4; }
    // Address of elements 8 j and the next 7 of the sum in column `column`.
    u32 along(u32 column, u32 j) const {
        u32 at = start + column % 8 * pieces() * 16 + column / 8 * stride;
        return exchanged(at + j * (mode == 0 ? leading : 16));
    }
    // Address of columns 8 j and the next 7 of element `k` of the sum.
    u32 across(u32 k, u32 j) const {
        if (mode == 0) return start + k % 8 * 16 + k / 8 * leading + j * stride;
        return exchanged(start + k % 8 * pieces() * 16 + k / 8 * stride + j % pieces() * 16 + j / pieces() * leading);
    }
};

// Gives each piece that a product reads: its number in shared memory, the first element of the sum and the first column in it.
template <typename Take>
void each_piece(Worker& w, const Product& product, int line, Take take) {
    Descriptor b(product.b);
    if (b.base_offset != 0) fail("a base offset of a matrix is not emulated", line);
    u32 rows = product.across ? 16 : product.columns, pieces = (product.across ? product.columns : 16) / 8;
    for (u32 row = 0; row < rows; row++) {
        for (u32 j = 0; j < pieces; j++) {
            const u8* at = w.room + GUARD + (product.across ? b.across(row, j) : b.along(row, j));
            check_shared(w, at, 16, "a matrix", line);
            product.across ? take(offset_of(w, at) / 16, row, j * 8) : take(offset_of(w, at) / 16, j * 8, row);
        }
    }
}

// ---- Registers ----

const Product& product_of(const Thread& thread) { return *static_cast<const Product*>(thread.brought); }

// Row and column of register `i` of a lane, of the 16 rows of its warp.
u32 row_of(u32 lane, u32 i) { return lane / 4 + i / 2 % 2 * 8; }
u32 column_of(u32 lane, u32 i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

// Whether registers are what they were at the last fence.
void check_settled(Worker& w, const Thread& thread, const void* registers, u64 bytes, const char* what) {
    const u8* at = static_cast<const u8*>(registers);
    bool found = false;
    for (const Settled& settled : thread.settled) {
        const u8* from = static_cast<const u8*>(settled.at);
        if (at < from || at + bytes > from + settled.content.size()) continue;
        found = memcmp(at, settled.content.data() + (at - from), bytes) == 0;
    }
    if (found) return;
    w.current = &w.threads[thread.here.thread];
    give_up(w, place(w) + text(", line %d: %s of multiply_group were not named in fence_products, or touched after it", thread.line, what));
}

// Whether the wait that ends a product names its accumulators: the compiler may move what reads others before it.
void check_named(Worker& w, const Thread& thread, const void* registers, u64 bytes) {
    const u8* at = static_cast<const u8*>(registers);
    for (const auto& [from, end] : thread.named) {
        if (at >= from && at + bytes <= end) return;
    }
    w.current = &w.threads[thread.here.thread];
    give_up(w, place(w) + text(", line %d: accumulators of multiply_group are not named in wait_products", thread.line));
}

void fence_registers(Worker& w, Thread* threads) { told(w, threads, 0); }

Accumulator& accumulator_of(Worker& w, WarpTrack& track, Thread* threads) {
    const Product& first = product_of(threads[0]);
    for (Accumulator& under_way : track.accumulators) {
        if (under_way.registers[0] == first.d && under_way.columns == first.columns) return under_way;
    }
    track.accumulators.push_back({{}, first.columns, 0, std::vector<f32>(16 * first.columns)});
    Accumulator& made = track.accumulators.back();
    for (u32 lane = 0; lane < 32; lane++) {
        f32* d = product_of(threads[lane]).d;
        made.registers[lane] = d;
        check_settled(w, threads[lane], d, first.columns * 2, "accumulators");
        for (u32 i = 0; i < first.columns / 2; i++) made.values[row_of(lane, i) * first.columns + column_of(lane, i)] = d[i];
        memset(d, NEVER_WRITTEN, first.columns * 2);
    }
    return made;
}

// ---- Products ----

void begin_product(Worker& w, Thread* threads) {
    const Product& first = product_of(threads[0]);
    WarpTrack& track = w.tracks->warps[warp_of(threads[0].here.thread)];
    Begun begun = {};
    begun.line = threads[0].line;
    told(w, threads, first.b ^ static_cast<u64>(first.columns) << 20 ^ static_cast<u64>(first.across) << 30);
    for (u32 lane = 0; lane < 32; lane++) {
        begun.lanes[lane] = product_of(threads[lane]);
        if (begun.lanes[lane].b != first.b) fail("lanes have different matrices", begun.line);
        check_settled(w, threads[lane], begun.lanes[lane].a, sizeof begun.a[lane], "factors");
        memcpy(begun.a[lane], begun.lanes[lane].a, sizeof begun.a[lane]);
    }
    begun.to = &accumulator_of(w, track, threads);
    begun.to->products++;
    each_piece(w, first, begun.line, [&](u32 piece, u32, u32) { begin_reading(w, piece, begun.line); });
    track.begun.push_back(begun);
}

f32 widen(u16 x, bool bf16) { return bf16 ? bf16_to_f32(x) : f16_to_f32(x); }

void multiply_rows(Worker& w, const Begun& begun) {
    auto& a = w.tracks->a;
    auto& b = w.tracks->b;
    const Product& first = begun.lanes[0];
    for (u32 lane = 0; lane < 32; lane++) {
        for (u32 i = 0; i < 8; i++) {
            a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] = widen(element16(begun.a[lane], i), first.bf16);
        }
    }
    each_piece(w, first, begun.line, [&](u32 piece, u32 k, u32 column) {
        end_reading(w, piece, begun.line);
        for (u32 i = 0; i < 8; i++) {
            f32& to = first.across ? b[k][column + i] : b[k + i][column];
            to = widen(element16(w.shared + piece * 16, i), first.bf16);
        }
    });
    for (u32 row = 0; row < 16; row++) {
        f32* d = &begun.to->values[row * first.columns];
        for (u32 k = 0; k < 16; k++) {
            for (u32 column = 0; column < first.columns; column++) d[column] += a[row][k] * b[k][column];
        }
    }
}

void end_product(Worker& w, Thread* threads, WarpTrack& track, const Begun& begun) {
    for (u32 lane = 0; lane < 32; lane++) {
        if (memcmp(begun.a[lane], begun.lanes[lane].a, sizeof begun.a[lane]) == 0) continue;
        w.current = &threads[lane];
        fail("factors of multiply_group were touched before it was waited for", begun.line);
    }
    multiply_rows(w, begun);
    Accumulator& to = *begun.to;
    if (--to.products > 0) return;
    for (u32 lane = 0; lane < 32; lane++) {
        f32* d = to.registers[lane];
        check_named(w, threads[lane], d, to.columns * 2);
        for (u32 i = 0; i < to.columns / 2; i++) {
            if (bits_of(d[i]) != 0xffffffffu) {
                w.current = &threads[lane];
                fail("accumulators of multiply_group were touched before it was waited for", begun.line);
            }
            d[i] = to.values[row_of(lane, i) * to.columns + column_of(lane, i)];
        }
    }
    track.accumulators.remove_if([&](const Accumulator& one) { return &one == &to; });
}

void commit_group(Worker& w, Thread* threads) {
    WarpTrack& track = w.tracks->warps[warp_of(threads[0].here.thread)];
    told(w, threads, 0);
    track.groups.push_back(static_cast<u32>(track.begun.size()));
}

void wait_group(Worker& w, Thread* threads) {
    WarpTrack& track = w.tracks->warps[warp_of(threads[0].here.thread)];
    u32 most = *static_cast<const u32*>(threads[0].brought);
    told(w, threads, most);
    for (u32 lane = 0; lane < 32; lane++) threads[lane].settled.clear();
    if (track.groups.size() <= most) {
        for (u32 lane = 0; lane < 32; lane++) threads[lane].named.clear();
        return;
    }
    u64 done = track.groups.size() - most;
    u32 end = track.groups[done - 1];
    for (u32 index = 0; index < end; index++) end_product(w, threads, track, track.begun[index]);
    track.begun.erase(track.begun.begin(), track.begun.begin() + end);
    track.groups.erase(track.groups.begin(), track.groups.begin() + static_cast<i64>(done));
    for (u32& group : track.groups) group -= end;
    for (u32 lane = 0; lane < 32; lane++) threads[lane].named.clear();
}

}  // namespace
}  // namespace emulator
