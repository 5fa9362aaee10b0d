// Stands in for libcuda where there is no GPU: memory of the host, one kernel, and calls that fail when they are told to. What is
// queued is done as late as the contract allows, at a wait, so that a buffer that is used again too early shows.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <deque>
#include <mutex>
#include <set>
#include <string>
#include <thread>

namespace {

struct State {
    std::map<std::string, long> settings;
    std::map<std::string, int> failures;
    std::map<std::string, long> calls;
    std::map<uint64_t, size_t> memory;
    size_t used = 0;
    // Things made and not yet given back, by kind.
    std::map<std::string, long> live;
    long streams = 0;
};

std::mutex lock;
State state;
thread_local void* current = nullptr;

struct Stream {
    std::deque<std::function<void()>> queue;
    // Which of the streams it is, from 1 on.
    long number = 0;
};

// Where an event was recorded: who waits for it waits for this, whatever becomes of the event.
struct Point {
    bool done = true;
    Stream* stream = nullptr;
};

struct Event {
    std::shared_ptr<Point> point = std::make_shared<Point>();
};

// All that were made and not given back.
std::set<Stream*> streams;

long setting(const char* key, long otherwise) {
    auto found = state.settings.find(key);
    return found == state.settings.end() ? otherwise : found->second;
}

// Waits as long as a setting is 1, without the lock.
void hold(const char* key) {
    for (;;) {
        {
            std::lock_guard<std::mutex> guard(lock);
            if (setting(key, 0) == 0) return;
            state.calls["held"]++;
        }
        std::this_thread::yield();
    }
}

int enter(const char* call) {
    state.calls[call]++;
    auto failure = state.failures.find(call);
    if (failure == state.failures.end()) return 0;
    // So many calls succeed before.
    long& after = state.settings["after"];
    if (after > 0) {
        after--;
        return 0;
    }
    int code = failure->second;
    state.failures.erase(failure);
    return code;
}

void step(Stream* stream) {
    auto next = stream->queue.front();
    stream->queue.pop_front();
    next();
}

void run(Stream* stream) {
    while (!stream->queue.empty()) step(stream);
}

// No further than to the point.
void run_to(const Point& point) {
    while (!point.done) step(point.stream);
}

int take(uint64_t* address, size_t bytes) {
    if (bytes == 0) return 1;
    if (state.used + bytes > static_cast<size_t>(setting("capacity", 1l << 30))) return 2;
    size_t rounded = (bytes + 255) / 256 * 256;
    void* memory = aligned_alloc(256, rounded);
    memset(memory, 0xab, rounded);
    *address = reinterpret_cast<uint64_t>(memory);
    state.memory[*address] = bytes;
    state.used += bytes;
    return 0;
}

void give_back(uint64_t address) {
    auto found = state.memory.find(address);
    if (found == state.memory.end()) abort();
    state.used -= found->second;
    memset(reinterpret_cast<void*>(address), 0xcd, found->second);
    free(reinterpret_cast<void*>(address));
    state.memory.erase(found);
}

struct CopyParams {
    uint64_t from, to, words;
};

}  // namespace

#define CALL(name)                              \
    std::lock_guard<std::mutex> guard(lock);    \
    if (int code = enter(#name)) return code;
#define IN_CONTEXT \
    if (current == nullptr) return 201;

extern "C" {

void stand_in_reset() {
    std::lock_guard<std::mutex> guard(lock);
    state = State();
}
void stand_in_set(const char* key, long value) {
    std::lock_guard<std::mutex> guard(lock);
    state.settings[key] = value;
}
void stand_in_fail(const char* call, int code) {
    std::lock_guard<std::mutex> guard(lock);
    state.failures[call] = code;
}
long stand_in_calls(const char* call) {
    std::lock_guard<std::mutex> guard(lock);
    return state.calls[call];
}
// Everything that was made and not given back.
long stand_in_live() {
    std::lock_guard<std::mutex> guard(lock);
    long sum = static_cast<long>(state.memory.size());
    for (auto& [kind, count] : state.live) sum += count < 0 ? 1000 : count;
    return sum;
}

int cuDriverGetVersion(int* version) {
    CALL(cuDriverGetVersion)
    *version = static_cast<int>(setting("version", 13000));
    return 0;
}
#ifndef WITHOUT_INIT
int cuInit(unsigned) {
    CALL(cuInit)
    return 0;
}
#endif
int cuGetErrorName(int code, const char** text) {
    static thread_local char buffer[32];
    snprintf(buffer, sizeof buffer, "STAND_IN_%d", code);
    *text = buffer;
    return 0;
}
int cuGetErrorString(int, const char** text) {
    *text = "told to fail";
    return 0;
}
int cuDeviceGetCount(int* count) {
    CALL(cuDeviceGetCount)
    *count = static_cast<int>(setting("devices", 2));
    return 0;
}
int cuDeviceGet(int* device, int ordinal) {
    CALL(cuDeviceGet)
    *device = ordinal;
    return 0;
}
int cuDeviceGetName(char* name, int length, int device) {
    CALL(cuDeviceGetName)
    snprintf(name, static_cast<size_t>(length), "Stand-in %d", device);
    return 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int) {
    CALL(cuDeviceTotalMem_v2)
    *bytes = static_cast<size_t>(setting("capacity", 1l << 30));
    return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
    CALL(cuDeviceGetAttribute)
    long capability = setting("capability", 90);
    switch (attribute) {
        case 16: *value = 4; return 0;
        case 75: *value = static_cast<int>(capability / 10); return 0;
        case 76: *value = static_cast<int>(capability % 10); return 0;
        case 97: *value = 232448; return 0;
        case 115: *value = static_cast<int>(setting("pools", 1)); return 0;
        default: return 1;
    }
}
int cuDevicePrimaryCtxRetain(void** context, int) {
    CALL(cuDevicePrimaryCtxRetain)
    *context = &state;
    state.live["context"]++;
    return 0;
}
int cuDevicePrimaryCtxRelease_v2(int) {
    CALL(cuDevicePrimaryCtxRelease_v2)
    state.live["context"]--;
    return 0;
}
int cuCtxSetCurrent(void* context) {
    CALL(cuCtxSetCurrent)
    current = context;
    return 0;
}
int cuDeviceGetDefaultMemPool(void** pool, int) {
    CALL(cuDeviceGetDefaultMemPool)
    *pool = &state;
    return 0;
}
int cuMemPoolSetAttribute(void*, int attribute, void* value) {
    CALL(cuMemPoolSetAttribute)
    // CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
    return attribute == 4 && *static_cast<uint64_t*>(value) == UINT64_MAX ? 0 : 1;
}
int cuMemPoolTrimTo(void*, size_t) {
    CALL(cuMemPoolTrimTo)
    return 0;
}
int cuMemGetInfo_v2(size_t* unused, size_t* all) {
    CALL(cuMemGetInfo_v2)
    IN_CONTEXT
    *all = static_cast<size_t>(setting("capacity", 1l << 30));
    *unused = *all - state.used;
    return 0;
}
int cuStreamCreate(Stream** stream, unsigned flags) {
    CALL(cuStreamCreate)
    IN_CONTEXT
    if (flags != 1) return 1;
    *stream = new Stream();
    streams.insert(*stream);
    (*stream)->number = ++state.streams;
    state.live["stream"]++;
    return 0;
}
int cuStreamDestroy_v2(Stream* stream) {
    CALL(cuStreamDestroy_v2)
    run(stream);
    streams.erase(stream);
    delete stream;
    state.live["stream"]--;
    return 0;
}
int cuStreamSynchronize(Stream* stream) {
    CALL(cuStreamSynchronize)
    IN_CONTEXT
    run(stream);
    return 0;
}
int cuStreamQuery(Stream* stream) {
    CALL(cuStreamQuery)
    run(stream);
    return 0;
}
int cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
    CALL(cuStreamWaitEvent)
    IN_CONTEXT
    stream->queue.push_back([point = event->point] { run_to(*point); });
    return 0;
}
int cuEventCreate(Event** event, unsigned) {
    CALL(cuEventCreate)
    IN_CONTEXT
    *event = new Event();
    state.live["event"]++;
    return 0;
}
int cuEventDestroy_v2(Event* event) {
    CALL(cuEventDestroy_v2)
    delete event;
    state.live["event"]--;
    return 0;
}
int cuEventRecord(Event* event, Stream* stream) {
    CALL(cuEventRecord)
    IN_CONTEXT
    event->point = std::make_shared<Point>(Point{false, stream});
    stream->queue.push_back([point = event->point] { point->done = true; });
    return 0;
}
int cuEventSynchronize(Event* event) {
    hold("hold_events");
    CALL(cuEventSynchronize)
    run_to(*event->point);
    return 0;
}
int cuMemAllocAsync(uint64_t* address, size_t bytes, Stream*) {
    CALL(cuMemAllocAsync)
    IN_CONTEXT
    return take(address, bytes);
}
int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    CALL(cuMemAlloc_v2)
    IN_CONTEXT
    return take(address, bytes);
}
int cuMemFreeAsync(uint64_t address, Stream* stream) {
    CALL(cuMemFreeAsync)
    IN_CONTEXT
    stream->queue.push_back([address] { give_back(address); });
    return 0;
}
int cuMemFree_v2(uint64_t address) {
    CALL(cuMemFree_v2)
    IN_CONTEXT
    for (Stream* stream : streams) run(stream);
    give_back(address);
    return 0;
}
int cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
    CALL(cuMemHostAlloc)
    IN_CONTEXT
    *memory = malloc(bytes);
    state.live["pinned"]++;
    return 0;
}
int cuMemFreeHost(void* memory) {
    CALL(cuMemFreeHost)
    free(memory);
    state.live["pinned"]--;
    return 0;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, Stream* stream) {
    CALL(cuMemcpyHtoDAsync_v2)
    IN_CONTEXT
    stream->queue.push_back([=] { memcpy(reinterpret_cast<void*>(to), from, bytes); });
    // As early as it may be done, in place of as late.
    if (stream->number == setting("eager", 0)) run(stream);
    return 0;
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, Stream* stream) {
    CALL(cuMemcpyDtoHAsync_v2)
    IN_CONTEXT
    stream->queue.push_back([=] { memcpy(to, reinterpret_cast<const void*>(from), bytes); });
    return 0;
}
int cuModuleLoadData(void** module, const void* image) {
    hold("hold_modules");
    CALL(cuModuleLoadData)
    IN_CONTEXT
    if (memcmp(image, "\177ELF", 4) != 0) return 200;
    *module = new char;
    state.live["module"]++;
    return 0;
}
int cuModuleUnload(void* module) {
    CALL(cuModuleUnload)
    delete static_cast<char*>(module);
    state.live["module"]--;
    return 0;
}
int cuModuleGetFunction(void** function, void*, const char* name) {
    CALL(cuModuleGetFunction)
    if (strcmp(name, "copy_words") != 0 && strcmp(name, "attend_prefill_wgmma") != 0) return 500;
    *function = &state;
    return 0;
}
int cuFuncGetAttribute(int* value, int attribute, void*) {
    CALL(cuFuncGetAttribute)
    // CU_FUNC_ATTRIBUTE_NUM_REGS
    if (attribute != 4) return 1;
    *value = static_cast<int>(setting("registers", 168));
    return 0;
}
int cuFuncSetAttribute(void*, int attribute, int value) {
    CALL(cuFuncSetAttribute)
    // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    return attribute == 8 && value == 232448 ? 0 : 1;
}
int cuLaunchKernel(void*, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned, Stream* stream,
                   void** params, void** extra) {
    CALL(cuLaunchKernel)
    IN_CONTEXT
    if (x * y * z == 0 || threads == 0 || params != nullptr) return 1;
    if (extra[0] != reinterpret_cast<void*>(1) || extra[2] != reinterpret_cast<void*>(2) || extra[4] != nullptr) return 1;
    if (*static_cast<size_t*>(extra[3]) != sizeof(CopyParams)) return 1;
    CopyParams p;
    memcpy(&p, extra[1], sizeof p);
    stream->queue.push_back([p] { memcpy(reinterpret_cast<void*>(p.to), reinterpret_cast<const void*>(p.from), 16 * p.words); });
    return 0;
}

}  // extern "C"
