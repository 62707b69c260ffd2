// Enough of CUDA to run a kernel of this project on the host: every thread of a block is a fiber, one block at a time.
//
// Meant to be adversarial rather than fast. Warps, their fibers and blocks run in an order drawn from a seed, a fiber runs until its next barrier
// or warp collective, shared memory is poisoned before every block: code that leans on an order or on a barrier that is not there
// gives another result under another seed. Built with AddressSanitizer and UBSan, which see every index and every alignment.
// Any violation prints a line that starts with "host_cuda:" or a sanitizer's report, and ends the process.

#pragma once

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// In a section of its own, so that it can be found and poisoned; -fsanitize-sections keeps its variables under ASan.
#define __shared__ static __attribute__((section("shared_memory")))

struct uint3 {
    unsigned x, y, z;
};

struct alignas(8) uint2 {
    unsigned x, y;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace host_cuda {

constexpr unsigned WARP_LANES = 32;
constexpr size_t STACK = 256 << 10;

// What a fiber resumes from. swapcontext asks the kernel for the signal mask, and AddressSanitizer clears its shadow of the whole stack
// at every one, which took half of a run; so on x86-64 registers and stacks are exchanged here.
#ifdef __x86_64__
typedef void* Context;
__attribute__((naked, noinline)) static void switch_context(Context*, Context*) {
    asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq (%rsi), %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
inline void make_context(Context* context, void* stack, size_t bytes, void (*entry)()) {
    __asan_unpoison_memory_region(stack, bytes);  // what frames of the fiber before have left
    void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + bytes);
    top[-1] = nullptr;  // where the entry would return to
    top[-2] = reinterpret_cast<void*>(entry);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
    *context = top - 8;
}
#else
typedef ucontext_t Context;
inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }
inline void make_context(Context* context, void* stack, size_t bytes, void (*entry)()) {
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = bytes;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
}
#endif

enum class Wait { ready, block, shuffle, ballot, warp, done };

struct Fiber {
    Context context;
    void* stack = nullptr;
    void* fake_stack = nullptr;
    uint3 thread;
    unsigned linear;
    Wait wait;
    unsigned mask;            // lanes of the warp collective that it waits at
    uint64_t sent;            // its value there
    uint64_t received[WARP_LANES];  // everybody's value, once the collective is complete
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Fiber* current;
inline uint3 block_index, block_size, grid_size;
inline Context scheduler;
inline void* scheduler_fake_stack;
inline const void* scheduler_stack;
inline size_t scheduler_stack_size;
inline void (*kernel)(void**);
inline void** arguments;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "host_cuda: %s (block %u,%u,%u thread %u)\n", what, block_index.x, block_index.y, block_index.z,
                 current ? current->linear : 0);
    std::abort();
}

// Back to the scheduler, until it has found this fiber's barrier or collective complete.
inline void wait(Wait kind) {
    Fiber* self = current;
    self->wait = kind;
    __sanitizer_start_switch_fiber(kind == Wait::done ? nullptr : &self->fake_stack, scheduler_stack, scheduler_stack_size);
    switch_context(&self->context, &scheduler);
    __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
}

inline void fiber_main() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
    kernel(arguments);
    wait(Wait::done);
}

inline void start(Fiber& fiber, unsigned linear) {
    fiber.linear = linear;
    fiber.thread = {linear % block_size.x, linear / block_size.x % block_size.y, linear / (block_size.x * block_size.y)};
    fiber.wait = Wait::ready;
    fiber.fake_stack = nullptr;
    if (!fiber.stack) {
        fiber.stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (fiber.stack == MAP_FAILED) fail("no memory for a fiber's stack");
    }
    make_context(&fiber.context, fiber.stack, STACK, fiber_main);
}

inline void resume(Fiber& fiber) {
    current = &fiber;
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, STACK);
    switch_context(&scheduler, &fiber.context);
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

// Lets the fibers go that wait for what `fiber` has just arrived at, if it was the last.
inline void release(const Fiber& fiber, unsigned threads) {
    if (fiber.wait == Wait::block || fiber.wait == Wait::done) {
        unsigned waiting = 0;
        for (unsigned i = 0; i < threads; ++i) {
            if (fibers[i]->wait != Wait::block && fibers[i]->wait != Wait::done) return;
            waiting += fibers[i]->wait == Wait::block;
        }
        for (unsigned i = 0; waiting && i < threads; ++i)
            if (fibers[i]->wait == Wait::block) fibers[i]->wait = Wait::ready;
        return;
    }
    const unsigned first = fiber.linear / WARP_LANES * WARP_LANES, mask = fiber.mask;
    uint64_t values[WARP_LANES] = {};
    for (unsigned lane = 0; lane < WARP_LANES; ++lane) {
        if (!(mask >> lane & 1)) continue;
        if (first + lane >= threads || fibers[first + lane]->wait == Wait::done) fail("a warp collective names a lane that has exited");
        const Fiber& other = *fibers[first + lane];
        if (other.wait != fiber.wait || other.mask != mask) return;
        values[lane] = other.sent;
    }
    for (unsigned lane = 0; lane < WARP_LANES; ++lane) {
        if (!(mask >> lane & 1)) continue;
        std::memcpy(fibers[first + lane]->received, values, sizeof values);
        fibers[first + lane]->wait = Wait::ready;
    }
}

inline void run_block(std::mt19937_64& random) {
    const unsigned threads = block_size.x * block_size.y * block_size.z;
    while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
    for (unsigned i = 0; i < threads; ++i) start(*fibers[i], i);
    const unsigned warps = (threads + WARP_LANES - 1) / WARP_LANES;
    std::vector<unsigned> ready;
    const auto find_ready = [&](unsigned warp) {
        ready.clear();
        for (unsigned i = warp * WARP_LANES; i < std::min(threads, (warp + 1) * WARP_LANES); ++i)
            if (fibers[i]->wait == Wait::ready) ready.push_back(i);
        return !ready.empty();
    };
    // A warp goes on for about LEAD turns, so that it gets ahead of the others by any number of collectives.
    constexpr unsigned LEAD = 64;
    unsigned warp = random() % warps;
    for (unsigned left = threads; left > 0;) {
        if (random() % LEAD == 0 || !find_ready(warp)) {
            warp = random() % warps;
            for (unsigned tried = 0; !find_ready(warp); warp = (warp + 1) % warps)
                if (++tried > warps) fail("deadlock: threads wait at different barriers");
        }
        std::shuffle(ready.begin(), ready.end(), random);
        const size_t some = 1 + random() % ready.size();
        for (size_t i = 0; i < some; ++i) {
            resume(*fibers[ready[i]]);
            left -= current->wait == Wait::done;
            release(*current, threads);
        }
    }
}

template <class T>
inline uint64_t bits_of(T value) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

inline const uint64_t* collective(Wait kind, unsigned mask, uint64_t value) {
    if (!(mask >> current->linear % WARP_LANES & 1)) fail("a lane calls a warp collective whose mask leaves it out");
    current->mask = mask;
    current->sent = value;
    wait(kind);
    return current->received;
}

template <class T>
inline T shuffle(unsigned mask, T value, unsigned source) {
    const uint64_t* received = collective(Wait::shuffle, mask, bits_of(value));
    if (source >= WARP_LANES) return value;
    if (!(mask >> source & 1)) fail("a shuffle reads a lane that its mask leaves out");
    std::memcpy(&value, &received[source], sizeof value);
    return value;
}

template <class... P, size_t... I>
inline void call(void (*function)(P...), void** slots, std::index_sequence<I...>) {
    function(*static_cast<std::remove_cv_t<P>*>(slots[I])...);
}

template <class... P>
inline void call(void (*function)(P...), void** slots) {
    call(function, slots, std::index_sequence_for<P...>());
}

}  // namespace host_cuda

extern "C" char __start_shared_memory[] __attribute__((weak)), __stop_shared_memory[] __attribute__((weak));

#define threadIdx (host_cuda::current->thread)
#define blockIdx (host_cuda::block_index)
#define blockDim (host_cuda::block_size)
#define gridDim (host_cuda::grid_size)

inline void __syncthreads() { host_cuda::wait(host_cuda::Wait::block); }
inline void __syncwarp(unsigned mask = ~0u) { host_cuda::collective(host_cuda::Wait::warp, mask, 0); }
template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
    return host_cuda::shuffle(mask, value, host_cuda::current->linear % 32 / width * width + lane % width);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return host_cuda::shuffle(mask, value, host_cuda::current->linear % 32 ^ lanes);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by) {
    return host_cuda::shuffle(mask, value, host_cuda::current->linear % 32 - by);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by) {
    return host_cuda::shuffle(mask, value, host_cuda::current->linear % 32 + by);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const uint64_t* received = host_cuda::collective(host_cuda::Wait::ballot, mask, predicate != 0);
    unsigned result = 0;
    for (unsigned lane = 0; lane < 32; ++lane) result |= unsigned(received[lane]) << lane;
    return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

inline void __threadfence() {}
template <class T>
inline T atomicAdd(T* address, T value) {
    const T old = *address;
    *address = old + value;
    return old;
}

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    return by % 32 ? high << by % 32 | low >> (32 - by % 32) : high;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned from = selector >> 4 * i & 7;
        result |= ((from < 4 ? x : y) >> from % 4 * 8 & 0xff) << 8 * i;
    }
    return result;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffsll(unsigned long long value) { return __builtin_ffsll((long long)value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value ? __builtin_clz(value) : 32; }
inline unsigned __float_as_uint(float value) { return unsigned(host_cuda::bits_of(value)); }
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T>
inline T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
    return a < b ? b : a;
}

extern "C" {

inline __attribute__((no_sanitize("address"))) void host_poison_shared() {
    for (volatile char* byte = __start_shared_memory; byte < __stop_shared_memory; ++byte) *byte = char(0xff);
}

// Exactly `size` bytes between ASan's redzones, at a multiple of 16, as malloc aligns.
__attribute__((visibility("default"))) void* host_alloc(size_t size) { return std::malloc(size); }
__attribute__((visibility("default"))) void host_free(void* memory) { std::free(memory); }
__attribute__((visibility("default"))) void host_launch(const unsigned* grid, const unsigned* block, void** arguments, uint64_t seed);
}

// Defines host_launch for one kernel.
#define HOST_ENTRY(name)                                                                                                  \
    static void host_call(void** slots) { host_cuda::call(name, slots); }                                                 \
    void host_launch(const unsigned* grid, const unsigned* block, void** arguments, uint64_t seed) {                      \
        using namespace host_cuda;                                                                                        \
        kernel = host_call;                                                                                               \
        host_cuda::arguments = arguments;                                                                                 \
        grid_size = {grid[0], grid[1], grid[2]};                                                                          \
        block_size = {block[0], block[1], block[2]};                                                                      \
        std::mt19937_64 random(seed);                                                                                     \
        std::vector<unsigned> blocks(grid[0] * grid[1] * grid[2]);                                                        \
        for (unsigned i = 0; i < blocks.size(); ++i) blocks[i] = i;                                                       \
        std::shuffle(blocks.begin(), blocks.end(), random);                                                               \
        for (unsigned b : blocks) {                                                                                       \
            block_index = {b % grid[0], b / grid[0] % grid[1], b / (grid[0] * grid[1])};                                  \
            host_poison_shared();                                                                                         \
            run_block(random);                                                                                            \
        }                                                                                                                 \
        current = nullptr;                                                                                                \
    }
