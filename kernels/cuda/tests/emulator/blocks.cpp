// A block from its beginning to its end, and a launch of many.
namespace emulator {
namespace {

// Bytes before shared memory that nobody may write.
u64 canary_bytes(const Worker& w) { return std::min(PAGE, MOST_SHARED - round_up(w.launch->shared_bytes, 16)); }

void prepare(Worker& w, u64 block) {
    const Launch& launch = *w.launch;
    w.threads.resize(launch.threads);
    w.warps.assign(launch.threads / 32, Warp{0xffffffffu, 0});
    w.at_barrier = 0;
    w.problem.clear();
    // Its end is the guard page, as far as alignment lets it be.
    u64 bytes = round_up(launch.shared_bytes, 16);
    w.shared = w.room + GUARD + MOST_SHARED - bytes;
    memset(w.shared - canary_bytes(w), NEVER_WRITTEN, canary_bytes(w) + bytes);
    memcpy(w.argument, launch.argument, launch.argument_bytes);
    if (w.tracks) begin_tracks(w);
    u32 x = static_cast<u32>(block % launch.grid[0]), y = static_cast<u32>(block / launch.grid[0] % launch.grid[1]);
    u32 z = static_cast<u32>(block / launch.grid[0] / launch.grid[1]);
    for (u32 index = 0; index < launch.threads; index++) {
        Thread& thread = w.threads[index];
        thread.here = {index, launch.threads, {x, y, z}, {launch.grid[0], launch.grid[1], launch.grid[2]}, w.shared};
        thread.state = State::Ready;
        thread.copies.clear();
        thread.groups.clear();
        thread.unseen.clear();
        thread.settled.clear();
        thread.named.clear();
        begin(thread.context, w.stacks + index * (STACK + PAGE) + PAGE, enter);
    }
}

// Runs one warp until none of its lanes can go on. Warps and lanes of odd blocks take turns the other way round, which brings out who relies
// on an order.
bool run_warp(Worker& w, u32 of, bool backwards) {
    bool ran = false;
    while (w.warps[of].ready != 0 && w.problem.empty()) {
        u32 ready = w.warps[of].ready;
        u32 lane = backwards ? 31 - static_cast<u32>(__builtin_clz(ready)) : static_cast<u32>(__builtin_ctz(ready));
        w.warps[of].ready &= ~(1u << lane);
        w.current = &w.threads[of * 32 + lane];
        switch_to(w.scheduler, w.current->context);
        ran = true;
    }
    return ran;
}

void check_canaries(Worker& w) {
    u32 end = w.launch->shared_bytes, padded = static_cast<u32>(round_up(end, 16));
    for (u64 at = 0; at < canary_bytes(w); at++) {
        if (w.shared[-1 - static_cast<i64>(at)] != NEVER_WRITTEN) {
            w.problem = place(w) + ": the block wrote before its shared memory";
            return;
        }
    }
    for (u32 at = end; at < padded; at++) {
        if (w.shared[at] != NEVER_WRITTEN) w.problem = place(w) + ": the block wrote past its shared memory";
    }
}

void run_block(Worker& w, u64 block) {
    prepare(w, block);
    w.current = &w.threads[0];
    if (sigsetjmp(w.recovery, 1) != 0) return;
    u32 warps = static_cast<u32>(w.warps.size());
    for (;;) {
        bool ran = false;
        for (u32 turn = 0; turn < warps; turn++) {
            ran |= run_warp(w, block % 2 == 0 ? turn : warps - 1 - turn, block % 2 == 1);
            if (!w.problem.empty()) return;
        }
        if (ran) continue;
        for (u32 thread = 0; thread < w.launch->threads; thread++) {
            if (w.threads[thread].state != State::Gone) {
                w.current = &w.threads[thread];
                w.problem = place(w) + ": deadlock: " + whereabouts(w);
                return;
            }
        }
        check_canaries(w);
        if (w.tracks && w.problem.empty()) check_tracks(w);
        return;
    }
}

// ---- Faults of the processor ----

struct sigaction before_segv, before_bus, before_ill;

std::string describe(Worker& w, int signal, const siginfo_t* info) {
    u64 at = reinterpret_cast<u64>(info->si_addr), shared = reinterpret_cast<u64>(w.shared);
    if (signal == SIGILL) return place(w) + ": misaligned access, index beyond an array, or shift beyond a word";
    if (at >= reinterpret_cast<u64>(w.room) && at < reinterpret_cast<u64>(w.room) + MOST_SHARED + 2 * GUARD) {
        long long off = static_cast<long long>(at - shared);
        return place(w) + text(": access to byte %lld of %u bytes of shared memory", off, w.launch->shared_bytes);
    }
    u64 stacks = reinterpret_cast<u64>(w.stacks);
    if (at >= stacks && at < stacks + MOST_THREADS * (STACK + PAGE)) return place(w) + ": the thread's stack is full";
    if (at == 0) return place(w) + ": access to address 0, or misaligned";
    return place(w) + text(": access to address 0x%llx, where nothing is", at);
}

void on_signal(int signal, siginfo_t* info, void* context) {
    Worker* w = worker;
    if (w != nullptr) {
        w->problem = describe(*w, signal, info);
        siglongjmp(w->recovery, 1);
    }
    const struct sigaction& before = signal == SIGSEGV ? before_segv : signal == SIGBUS ? before_bus : before_ill;
    if (before.sa_flags & SA_SIGINFO) return before.sa_sigaction(signal, info, context);
    sigaction(signal, &before, nullptr);
}

void catch_faults() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction ours = {};
        ours.sa_sigaction = on_signal;
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigemptyset(&ours.sa_mask);
        sigaction(SIGSEGV, &ours, &before_segv);
        sigaction(SIGBUS, &ours, &before_bus);
        sigaction(SIGILL, &ours, &before_ill);
    });
}

struct Run {
    const Launch* launch;
    const char* kernel;
    bool tracked;
    void (*thread)(const void*);
    std::atomic<u64> next{0};
    std::atomic<bool> failed{false};
    std::atomic<u64> bank_conflicts{0};
    std::mutex lock;
    std::string problem;
};

// Runs blocks until there are none, or one fails.
void work(Run& run) {
    Worker* w = take_worker();
    stack_t own = {}, before = {};
    own.ss_sp = w->signal_stack;
    own.ss_size = 64 << 10;
    sigaltstack(&own, &before);
    w->launch = run.launch;
    w->kernel = run.kernel;
    w->thread = run.thread;
    w->bank_conflicts = 0;
    w->tracks = run.tracked ? tracks_of(*w) : nullptr;
    worker = w;
    const u32* grid = run.launch->grid;
    u64 blocks = static_cast<u64>(grid[0]) * grid[1] * grid[2];
    for (u64 block; !run.failed && (block = run.next.fetch_add(1)) < blocks;) {
        run_block(*w, block);
        if (w->problem.empty()) continue;
        std::lock_guard<std::mutex> guard(run.lock);
        if (!run.failed.exchange(true)) run.problem = w->problem;
    }
    worker = nullptr;
    run.bank_conflicts += w->bank_conflicts;
    sigaltstack(&before, nullptr);
    give_worker(w);
}

std::string check(const Launch& launch, const char* kernel, u32 threads, u64 bytes) {
    if (launch.threads == 0 || launch.threads % 32 != 0 || launch.threads > threads) {
        return text("kernel `%s`: %u threads, must be a multiple of 32 up to its bound of %u", kernel, launch.threads, threads);
    }
    if (launch.argument_bytes != bytes || bytes > MOST_ARGUMENT) {
        return text("kernel `%s`: argument of %llu bytes, it takes %llu", kernel, launch.argument_bytes, bytes);
    }
    for (int axis = 0; axis < 3; axis++) {
        u32 most = axis == 0 ? 0x7fffffffu : 0xffffu;
        if (launch.grid[axis] == 0 || launch.grid[axis] > most) {
            return text("kernel `%s`: grid of %u × %u × %u blocks", kernel, launch.grid[0], launch.grid[1], launch.grid[2]);
        }
    }
    return "";
}

}  // namespace

// ---- What kernels call ----

const Here& here() { return worker->current->here; }

void meet(Meeting meeting, int line, void* brought) {
    Worker& w = *worker;
    Thread& me = *w.current;
    me.state = State::Waiting;
    me.meeting = meeting;
    me.line = line;
    me.brought = brought;
    meeting == Meeting::SyncBlock ? meet_block(w) : meet_warp(w);
}

void fail(const char* problem, int line) {
    Worker& w = *worker;
    give_up(w, place(w) + text(", line %d: %s", line, problem));
}

void begin_copy(void* shared, const void* global, bool valid, int line) {
    Worker& w = *worker;
    if (reinterpret_cast<u64>(global) % 16 != 0) fail("source of copy_async_16 is misaligned", line);
    check_shared(w, shared, 16, "target of copy_async_16", line);
    if (w.tracks) begin_writing(w, shared, line);
    memset(shared, NEVER_WRITTEN, 16);
    w.current->copies.push_back({static_cast<u8*>(shared), static_cast<const u8*>(global), valid});
}

void commit() {
    Thread& me = *worker->current;
    me.groups.push_back(static_cast<u32>(me.copies.size()));
}

void wait(u32 groups) {
    Thread& me = *worker->current;
    if (me.groups.size() <= groups) return;
    u64 done = me.groups.size() - groups;
    u32 end = me.groups[done - 1];
    for (u32 index = 0; index < end; index++) {
        const Copy& copy = me.copies[index];
        if (copy.valid) {
            memcpy(copy.to, copy.from, 16);
        } else {
            memset(copy.to, 0, 16);
        }
        if (worker->tracks) has_written(*worker, copy.to);
    }
    me.copies.erase(me.copies.begin(), me.copies.begin() + end);
    me.groups.erase(me.groups.begin(), me.groups.begin() + static_cast<i64>(done));
    for (u32& group : me.groups) group -= end;
}

const char* run(const Launch* launch, const char* kernel, u32 threads, u64 bytes, bool tracked, void (*thread)(const void*)) {
    static thread_local std::string problem;
    problem = check(*launch, kernel, threads, bytes);
    if (!problem.empty()) return problem.c_str();
    catch_faults();
    Run run;
    run.launch = launch;
    run.kernel = kernel;
    run.tracked = tracked;
    run.thread = thread;
    u64 blocks = static_cast<u64>(launch->grid[0]) * launch->grid[1] * launch->grid[2];
    std::vector<std::thread> others;
    for (u32 other = 1; other < launch->workers && other < blocks; other++) others.emplace_back([&run] { work(run); });
    work(run);
    for (std::thread& other : others) other.join();
    *launch->bank_conflicts += run.bank_conflicts;
    problem = run.problem;
    return run.failed ? problem.c_str() : nullptr;
}

}  // namespace emulator
