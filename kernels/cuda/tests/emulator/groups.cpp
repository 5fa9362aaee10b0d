// Who may touch what of shared memory, in kernels of warp groups.
//
// Barriers order what warps do: each has a clock for every warp, how far it knows that one to have come, and learns those of others where it
// meets them (the rule of vector clocks). So it is found that something is read that no barrier orders behind its being written, or
// overwritten though no barrier orders that behind its being read, whichever came first here. That is kept in mind of what asynchronous copies
// write and products read, by pieces of 16 bytes; other accesses are not seen.
namespace emulator {
namespace {

constexpr u32 MOST_WARPS = MOST_THREADS / 32;
constexpr u64 BARRIER_MARK = 0x7a6b5c4d3e2f1a0bull;

struct Clock {
    u32 of[MOST_WARPS];
    void learn(const Clock& other) {
        for (u32 warp = 0; warp < MOST_WARPS; warp++) of[warp] = std::max(of[warp], other.of[warp]);
    }
};

enum class Content : u8 {
    Nothing,
    // A copy is under way.
    Landing,
    // A thread wrote it, and has not told those who go the other way (the async proxy).
    Written,
    Seen,
};

// 16 bytes of shared memory.
struct Piece {
    Content content;
    u32 writer;
    // The clock of its warp when it became what it is.
    u32 since;
    // Products under way.
    u32 readers;
    u8 seen[16];
};

struct SharedBarrier {
    Barrier* at;
    u32 arrivals, missing, phase;
    u32 maker, made;
    Clock arriving, ended;
    std::vector<u32> waiting;
    // By thread, how many phases it waited for.
    std::vector<u32> waits;
};

// Accumulators of products under way; their registers are NaN meanwhile.
struct Accumulator {
    f32* registers[32];
    u32 columns;
    u32 products;
    // [16][columns].
    std::vector<f32> values;
};

// A product under way.
struct Begun {
    Product lanes[32];
    u32 a[32][4];
    int line;
    Accumulator* to;
};

// Registers of a multiprocessor.
constexpr u64 REGISTERS = 64 << 10;

struct WarpTrack {
    Clock clock;
    // Of a thread.
    u32 registers;
    std::list<Accumulator> accumulators;
    std::vector<Begun> begun;
    // Ends of the groups of `begun` that were committed and not waited for.
    std::vector<u32> groups;
    // What its warp group must do too.
    std::vector<std::pair<int, u64>> told;
};

struct Tracks {
    std::vector<Piece> pieces;
    // Of each piece by warp: the clock when a product that read it was over.
    std::vector<u32> reads;
    std::vector<WarpTrack> warps;
    std::list<SharedBarrier> barriers;
    // Factors of a product while it is made.
    f32 a[16][16];
    f32 b[16][128];
};

Tracks* tracks_of(Worker& w) {
    if (!w.own_tracks) w.own_tracks = new Tracks();
    return w.own_tracks;
}

// Registers of a thread of a block that has a multiprocessor for itself: as many as there are, in steps of 8. The tests see that code has so many.
u32 registers_at_launch(const Worker& w) { return static_cast<u32>(std::min<u64>(REGISTERS / w.launch->threads / 8 * 8, 248)); }

void begin_tracks(Worker& w) {
    Tracks& tracks = *w.tracks;
    u64 pieces = round_up(w.launch->shared_bytes, 16) / 16, warps = w.launch->threads / 32;
    tracks.pieces.assign(pieces, Piece{});
    tracks.reads.assign(pieces * warps, 0);
    tracks.warps.assign(warps, WarpTrack{});
    for (u32 warp = 0; warp < warps; warp++) {
        tracks.warps[warp].clock.of[warp] = 1;
        tracks.warps[warp].registers = registers_at_launch(w);
    }
    tracks.barriers.clear();
}

u32 warp_of(u32 thread) { return thread / 32; }
Clock& clock_of(Worker& w, u32 thread) { return w.tracks->warps[warp_of(thread)].clock; }

// All warps of the block have met.
void all_met(Worker& w) {
    Clock all = {};
    for (WarpTrack& warp : w.tracks->warps) all.learn(warp.clock);
    for (u32 warp = 0; warp < w.tracks->warps.size(); warp++) {
        w.tracks->warps[warp].clock = all;
        w.tracks->warps[warp].clock.of[warp]++;
    }
}

// ---- What is written and read ----

u32 offset_of(const Worker& w, const void* shared) { return static_cast<u32>(static_cast<const u8*>(shared) - w.shared); }

[[noreturn]] void refuse(Worker& w, int line, const char* what, u32 piece, const std::string& why) {
    give_up(w, place(w) + text(", line %d: %s byte %u of shared memory, ", line, what, piece * 16) + why);
}

std::string wrote(const Piece& piece) { return text("which thread %u wrote", piece.writer); }

void begin_writing(Worker& w, const void* shared, int line) {
    Tracks& tracks = *w.tracks;
    const char* what = "copy_async_16 overwrites";
    u32 index = offset_of(w, shared) / 16, me = w.current->here.thread;
    Piece& piece = tracks.pieces[index];
    const Clock& clock = clock_of(w, me);
    if (piece.readers > 0) refuse(w, line, what, index, "which a product under way reads");
    for (u32 warp = 0; warp < tracks.warps.size(); warp++) {
        if (warp == warp_of(me) || tracks.reads[index * tracks.warps.size() + warp] <= clock.of[warp]) continue;
        refuse(w, line, what, index, text("which warp %u reads: no barrier orders the two", warp));
    }
    if (piece.content != Content::Nothing && piece.since > clock.of[warp_of(piece.writer)]) {
        refuse(w, line, what, index, wrote(piece) + ": no barrier orders the two");
    }
    piece.content = Content::Landing;
    piece.writer = me;
    piece.since = clock.of[warp_of(me)];
}

void has_written(Worker& w, const void* shared) {
    u32 index = offset_of(w, shared) / 16;
    w.tracks->pieces[index].content = Content::Written;
    w.current->unseen.push_back(index);
}

// Before a product of this warp reads.
void begin_reading(Worker& w, u32 index, int line) {
    const char* what = "multiply_group reads";
    Piece& piece = w.tracks->pieces[index];
    switch (piece.content) {
        case Content::Nothing: refuse(w, line, what, index, "where nobody has copied anything");
        case Content::Landing: refuse(w, line, what, index, text("where a copy of thread %u is under way", piece.writer));
        case Content::Written: refuse(w, line, what, index, wrote(piece) + ", without fence_async_proxy");
        case Content::Seen: break;
    }
    if (piece.since > clock_of(w, w.current->here.thread).of[warp_of(piece.writer)]) {
        refuse(w, line, what, index, wrote(piece) + ": no barrier orders the two");
    }
    piece.readers++;
}

// When it has read.
void end_reading(Worker& w, u32 index, int line) {
    Tracks& tracks = *w.tracks;
    u32 warp = warp_of(w.current->here.thread);
    Piece& piece = tracks.pieces[index];
    piece.readers--;
    tracks.reads[index * tracks.warps.size() + warp] = tracks.warps[warp].clock.of[warp];
    if (memcmp(piece.seen, w.shared + index * 16, 16) != 0) {
        refuse(w, line, "multiply_group reads", index, "which something else overwrote");
    }
}

// ---- Barriers ----

SharedBarrier& barrier_at(Worker& w, Barrier& at, int line) {
    for (SharedBarrier& barrier : w.tracks->barriers) {
        if (barrier.at != &at) continue;
        if (at.state != BARRIER_MARK) give_up(w, place(w) + text(", line %d: the barrier was overwritten", line));
        if (barrier.made > clock_of(w, w.current->here.thread).of[warp_of(barrier.maker)]) {
            give_up(w, place(w) + text(", line %d: thread %u made the barrier: nothing orders the two", line, barrier.maker));
        }
        return barrier;
    }
    give_up(w, place(w) + text(", line %d: no barrier was made here", line));
}

// Of what a warp group does, each warp does the same in the same order.
void told(Worker& w, Thread* threads, u64 what) {
    u32 warp = warp_of(threads[0].here.thread);
    auto& mine = w.tracks->warps[warp].told;
    mine.emplace_back(threads[0].line, what);
    for (u32 other = warp / 4 * 4; other < std::min<u64>(warp / 4 * 4 + 4, w.tracks->warps.size()); other++) {
        const auto& theirs = w.tracks->warps[other].told;
        if (theirs.size() < mine.size() || theirs[mine.size() - 1] == mine.back()) continue;
        give_up(w, place(w) + text(", line %d: warps %u and %u of a group do different things", threads[0].line, other, warp));
    }
}

void change_registers(Worker& w, Thread* threads, u32 count, bool takes) {
    WarpTrack& track = w.tracks->warps[warp_of(threads[0].here.thread)];
    told(w, threads, count);
    if (takes ? count < track.registers : count > track.registers) {
        give_up(w, place(w) + text(", line %d: a thread has %u registers and %s until it has %u", threads[0].line, track.registers,
                                   takes ? "takes some" : "gives some back", count));
    }
    track.registers = count;
}

// When all threads have left.
void check_tracks(Worker& w) {
    u64 wanted = 0, all = static_cast<u64>(registers_at_launch(w)) * w.launch->threads;
    for (const WarpTrack& track : w.tracks->warps) wanted += track.registers * 32;
    if (wanted > all) {
        w.current = &w.threads[0];
        w.problem = place(w) + text(": deadlock in setmaxnreg: warps want %llu registers, the block has %llu",
                                    static_cast<unsigned long long>(wanted), static_cast<unsigned long long>(all));
    }
    for (u32 warp = 0; warp < w.tracks->warps.size(); warp++) {
        w.current = &w.threads[warp * 32];
        const WarpTrack& track = w.tracks->warps[warp];
        if (!track.begun.empty()) {
            w.problem = place(w) + text(": left, the product of line %d is under way", track.begun[0].line);
        } else if (track.told.size() != w.tracks->warps[warp / 4 * 4].told.size()) {
            w.problem = place(w) + ": left before others of its warp group";
        }
    }
}

}  // namespace

u32 shared_address(const void* shared) {
    return static_cast<u32>(static_cast<const u8*>(shared) - (worker->room + GUARD));
}

void init_barrier(Barrier& barrier, u32 arrivals, int line) {
    Worker& w = *worker;
    check_shared(w, reinterpret_cast<const void*>(reinterpret_cast<u64>(&barrier) / 16 * 16), 16, "the barrier", line);
    u32 me = w.current->here.thread;
    if (arrivals == 0) fail("a barrier for nobody", line);
    barrier.state = BARRIER_MARK;
    w.tracks->barriers.push_back({&barrier, arrivals, arrivals, 0, me, clock_of(w, me).of[warp_of(me)], {}, {}, {}, {}});
    w.tracks->barriers.back().waits.resize(w.launch->threads);
}

void arrive(Barrier& at, int line) {
    Worker& w = *worker;
    SharedBarrier& barrier = barrier_at(w, at, line);
    u32 me = w.current->here.thread;
    barrier.arriving.learn(clock_of(w, me));
    clock_of(w, me).of[warp_of(me)]++;
    if (--barrier.missing > 0) return;
    barrier.ended = barrier.arriving;
    barrier.arriving = {};
    barrier.missing = barrier.arrivals;
    barrier.phase++;
    for (u32 thread : barrier.waiting) {
        w.threads[thread].state = State::Ready;
        w.warps[thread / 32].ready |= 1u << thread % 32;
    }
    barrier.waiting.clear();
}

// A thread that waits for a barrier waits for all its phases, one after the other: so it is found that one was missed, where a device would take
// another of the same parity for it.
void wait_barrier(Barrier& at, u32 parity, int line) {
    Worker& w = *worker;
    SharedBarrier& barrier = barrier_at(w, at, line);
    Thread& me = *w.current;
    u32 awaited = barrier.waits[me.here.thread]++;
    if (awaited % 2 != parity) fail("wait_barrier names the wrong parity", line);
    if (barrier.phase <= awaited) {
        me.state = State::Waiting;
        me.meeting = Meeting::WaitBarrier;
        me.line = line;
        barrier.waiting.push_back(me.here.thread);
        give_way(w);
    }
    if (barrier.phase > awaited + 1) fail("wait_barrier missed a phase: the next has ended too", line);
    clock_of(w, me.here.thread).learn(barrier.ended);
}

void fence_async_proxy() {
    Worker& w = *worker;
    Thread& me = *w.current;
    for (u32 index : me.unseen) {
        Piece& piece = w.tracks->pieces[index];
        if (piece.content != Content::Written || piece.writer != me.here.thread) continue;
        piece.content = Content::Seen;
        piece.since = clock_of(w, me.here.thread).of[warp_of(me.here.thread)];
        memcpy(piece.seen, w.shared + index * 16, 16);
    }
    me.unseen.clear();
}

void settle(const void* registers, u64 bytes) {
    const u8* at = static_cast<const u8*>(registers);
    worker->current->settled.push_back({registers, {at, at + bytes}});
}

void name_registers(const void* registers, u64 bytes) {
    const u8* at = static_cast<const u8*>(registers);
    worker->current->named.emplace_back(at, at + bytes);
}

}  // namespace emulator
