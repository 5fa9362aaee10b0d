// Runs thread blocks on the CPU: each thread of a block is a fiber with a stack of its own. Fibers of a warp run in turn until
// all have met in a warp-wide function, whose work the last to come does for all; warps run in turn until all have met at
// the barrier. Blocks are shared out over a few threads of the host.
//
// Found are: threads or lanes that do not meet, accesses beyond shared or device memory (guard pages), misaligned accesses and
// indices beyond arrays (traps of the compiler's checks), reads of what was never written (NaN everywhere), reads of asynchronous
// copies too early and writes too late (the target is NaN from the beginning of a copy to its wait).
#include "ptx.cuh"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {
namespace {

constexpr u64 PAGE = 4096;
constexpr u64 STACK = 128 << 10;
// Nothing lies within so many bytes of shared memory.
constexpr u64 GUARD = 16 << 20;
constexpr u32 MOST_THREADS = 1024;
constexpr u64 MOST_SHARED = 256 << 10;
constexpr u64 MOST_ARGUMENT = 4096;
constexpr u8 NEVER_WRITTEN = 0xff;

u64 round_up(u64 x, u64 to) { return (x + to - 1) / to * to; }

std::string text(const char* format, ...) {
    char buffer[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    return buffer;
}

const char* name(Meeting meeting) {
    static const char* const names[] = {"",           "sync_block",     "sync_warp",   "shuffle",    "shuffle_xor",
                                        "ballot",     "reduce_max",     "reduce_min",  "reduce_add", "load_matrix_x4",
                                        "load_matrix_x4_transposed", "mma_f16", "mma_bf16", "mma_i8"};
    return names[static_cast<int>(meeting)];
}

// ---- Fibers ----

#if defined(__x86_64__)
using Context = void*;
extern "C" void emulator_switch(Context* from, Context* to);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, . - emulator_switch
)");
void switch_to(Context& from, Context& to) { emulator_switch(&from, &to); }
void begin(Context& context, u8* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + STACK) - 2;
    *top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    context = top;
}
#else
using Context = ucontext_t;
void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
void begin(Context& context, u8* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
#endif

// ---- Blocks ----

struct Copy {
    u8* to;
    const u8* from;
    bool valid;
};

enum class State { Ready, Waiting, Gone };

struct Thread {
    Here here;
    Context context;
    State state;
    Meeting meeting;
    int line;
    void* brought;
    std::vector<Copy> copies;
    // Ends of the groups of `copies` that were committed and not waited for.
    std::vector<u32> groups;
};

struct Warp {
    u32 ready;
    u32 met;
};

// Everything that one thread of the host needs to run blocks; made once and used again.
struct Worker {
    const Launch* launch;
    const char* kernel;
    void (*thread)(const void*);
    u8* argument;
    u8* stacks;
    // Room for shared memory, between guard pages.
    u8* room;
    u8* shared;
    Context scheduler;
    Thread* current;
    u32 at_barrier;
    std::string problem;
    sigjmp_buf recovery;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    u64 bank_conflicts;
    u8* signal_stack;
};

__attribute__((tls_model("initial-exec"))) thread_local Worker* worker = nullptr;

u8* map(u64 bytes, void* hint) {
    void* at = mmap(hint, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? nullptr : static_cast<u8*>(at);
}

Worker* make_worker() {
    auto* made = new Worker();
    made->stacks = map(MOST_THREADS * (STACK + PAGE), nullptr);
    made->room = map(MOST_SHARED + 2 * GUARD, nullptr);
    made->argument = map(MOST_ARGUMENT, nullptr);
    made->signal_stack = map(64 << 10, nullptr);
    if (!made->stacks || !made->room || !made->argument || !made->signal_stack) abort();
    for (u32 thread = 0; thread < MOST_THREADS; thread++) {
        mprotect(made->stacks + thread * (STACK + PAGE), PAGE, PROT_NONE);
    }
    mprotect(made->room, GUARD, PROT_NONE);
    mprotect(made->room + GUARD + MOST_SHARED, GUARD, PROT_NONE);
    return made;
}

std::mutex idle_lock;
std::vector<Worker*> idle;

Worker* take_worker() {
    std::lock_guard<std::mutex> guard(idle_lock);
    if (idle.empty()) return make_worker();
    Worker* taken = idle.back();
    idle.pop_back();
    return taken;
}

void give_worker(Worker* given) {
    std::lock_guard<std::mutex> guard(idle_lock);
    idle.push_back(given);
}

std::string place(const Worker& w) {
    const Here& here = w.current->here;
    return text("kernel `%s`, block (%u, %u, %u), thread %u", w.kernel, here.block[0], here.block[1], here.block[2], here.thread);
}

// Leaves the block for good.
[[noreturn]] void give_up(Worker& w, std::string problem) {
    w.problem = std::move(problem);
    switch_to(w.current->context, w.scheduler);
    abort();
}

// Lets another lane of the warp run, or another warp.
void give_way(Worker& w) {
    Thread& me = *w.current;
    u32 of = me.here.thread / 32, lane = me.here.thread % 32;
    u32 ready = w.warps[of].ready;
    if (ready == 0) {
        switch_to(me.context, w.scheduler);
        return;
    }
    u32 later = lane == 31 ? 0 : ready & (0xffffffffu << (lane + 1));
    Thread& next = w.threads[of * 32 + static_cast<u32>(__builtin_ctz(later ? later : ready))];
    w.warps[of].ready &= ~(1u << next.here.thread % 32);
    w.current = &next;
    switch_to(me.context, next.context);
}

void enter() {
    Worker& w = *worker;
    w.thread(w.argument);
    w.current->state = State::Gone;
    give_way(w);
    abort();
}

// ---- What is done when all lanes have met ----

void check_shared(Worker& w, const void* at, u64 bytes, const char* what, int line) {
    u64 address = reinterpret_cast<u64>(at), first = reinterpret_cast<u64>(w.shared);
    if (address % 16 != 0) give_up(w, place(w) + text(", line %d: %s is misaligned", line, what));
    if (address < first || address + bytes > first + w.launch->shared_bytes) {
        long long off = static_cast<long long>(address - first);
        give_up(w, place(w) + text(", line %d: %s lies at byte %lld of %u bytes of shared memory", line, what, off, w.launch->shared_bytes));
    }
}

u16 element16(const void* row, u32 index) {
    u16 x;
    memcpy(&x, static_cast<const u8*>(row) + 2 * index, sizeof x);
    return x;
}

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

// ---- A block from its beginning to its end ----

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
    u32 x = static_cast<u32>(block % launch.grid[0]), y = static_cast<u32>(block / launch.grid[0] % launch.grid[1]);
    u32 z = static_cast<u32>(block / launch.grid[0] / launch.grid[1]);
    for (u32 index = 0; index < launch.threads; index++) {
        Thread& thread = w.threads[index];
        thread.here = {index, launch.threads, {x, y, z}, {launch.grid[0], launch.grid[1], launch.grid[2]}, w.shared};
        thread.state = State::Ready;
        thread.copies.clear();
        thread.groups.clear();
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
        return check_canaries(w);
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
    }
    me.copies.erase(me.copies.begin(), me.copies.begin() + end);
    me.groups.erase(me.groups.begin(), me.groups.begin() + static_cast<i64>(done));
    for (u32& group : me.groups) group -= end;
}

const char* run(const Launch* launch, const char* kernel, u32 threads, u64 bytes, void (*thread)(const void*)) {
    static thread_local std::string problem;
    problem = check(*launch, kernel, threads, bytes);
    if (!problem.empty()) return problem.c_str();
    catch_faults();
    Run run;
    run.launch = launch;
    run.kernel = kernel;
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

// ---- Device memory: between guard pages, far from each other, so that an address cut to 32 bits is nowhere ----

namespace {
constexpr u64 PAGE = 4096;
u64 padded(u64 bytes) { return (bytes + 255) / 256 * 256; }
u64 mapped(u64 bytes) { return (padded(bytes) + PAGE - 1) / PAGE * PAGE + 2 * PAGE; }
u8* first_page(u64 address, u64 bytes) {
    return reinterpret_cast<u8*>(address + padded(bytes) + PAGE - mapped(bytes));
}
}  // namespace

extern "C" u64 emulator_allocate(u64 bytes) {
    static std::atomic<u64> next{0x100000000000};
    u64 hint = next.fetch_add(0x280000000 + mapped(bytes) / PAGE * PAGE);
    u8* at = emulator::map(mapped(bytes), reinterpret_cast<void*>(hint));
    if (!at) return 0;
    mprotect(at, PAGE, PROT_NONE);
    mprotect(at + mapped(bytes) - PAGE, PAGE, PROT_NONE);
    memset(at + PAGE, emulator::NEVER_WRITTEN, mapped(bytes) - 2 * PAGE);
    return reinterpret_cast<u64>(at + mapped(bytes) - PAGE - padded(bytes));
}

// Whether nothing was written around an allocation.
extern "C" bool emulator_is_whole(u64 address, u64 bytes) {
    const u8 *start = reinterpret_cast<const u8*>(address), *end = start + bytes;
    const u8 *first = first_page(address, bytes) + PAGE, *last = start + padded(bytes);
    for (const u8* at = first; at < start; at++) {
        if (*at != emulator::NEVER_WRITTEN) return false;
    }
    for (const u8* at = end; at < last; at++) {
        if (*at != emulator::NEVER_WRITTEN) return false;
    }
    return true;
}

extern "C" void emulator_free(u64 address, u64 bytes) { munmap(first_page(address, bytes), mapped(bytes)); }
