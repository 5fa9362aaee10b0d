// Device memory: between guard pages, far from each other, so that an address cut to 32 bits is nowhere.

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

// Nothing is known of these bytes until they are shown: they are NaN, and as far as they fill pages of memory no access is allowed.
extern "C" void emulator_hide(u64 address, u64 bytes) {
    memset(reinterpret_cast<void*>(address), emulator::NEVER_WRITTEN, bytes);
    u64 first = (address + PAGE - 1) / PAGE * PAGE, end = (address + bytes) / PAGE * PAGE;
    if (first < end) mprotect(reinterpret_cast<void*>(first), end - first, PROT_NONE);
}
extern "C" void emulator_show(u64 address, u64 bytes) {
    u64 first = (address + PAGE - 1) / PAGE * PAGE, end = (address + bytes) / PAGE * PAGE;
    if (first < end) mprotect(reinterpret_cast<void*>(first), end - first, PROT_READ | PROT_WRITE);
}

extern "C" void emulator_free(u64 address, u64 bytes) { munmap(first_page(address, bytes), mapped(bytes)); }
