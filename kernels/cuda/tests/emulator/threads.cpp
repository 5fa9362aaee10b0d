// Runs thread blocks on the CPU: each thread of a block is a fiber with a stack of its own. Fibers of a warp run in turn until
// all have met in a warp-wide function, whose work the last to come does for all; warps run in turn until all have met at
// the barrier. Blocks are shared out over a few threads of the host.
//
// Found are: threads or lanes that do not meet, accesses beyond shared or device memory (guard pages), misaligned accesses and
// indices beyond arrays (traps of the compiler's checks), reads of what was never written (NaN everywhere), reads of asynchronous
// copies too early and writes too late (the target is NaN from the beginning of a copy to its wait).
//
// Parts, in this order, of one text: threads.cpp, groups.cpp, products.cpp, meetings.cpp, blocks.cpp, memory.cpp.
#include "warpgroup.cuh"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <list>
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
                                        "load_matrix_x4_transposed", "mma_f16", "mma_bf16", "mma_i8",
                                        "multiply_group", "fence_products", "commit_products", "wait_products",
                                        "setmaxnreg", "wait_barrier"};
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

// Registers as they were at a fence of products.
struct Settled {
    const void* at;
    std::vector<u8> content;
};

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
    // Pieces of shared memory that it wrote and that products do not see yet.
    std::vector<u32> unseen;
    std::vector<Settled> settled;
    // Registers that the wait for products it is in names: from, end.
    std::vector<std::pair<const u8*, const u8*>> named;
};

struct Warp {
    u32 ready;
    u32 met;
};

struct Tracks;

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
    // What is kept in mind of warp groups; none where nothing is.
    Tracks* tracks;
    Tracks* own_tracks;
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

}  // namespace
}  // namespace emulator
