// Runs the fibers of a kernel's blocks, see host_cuda.h. A library that all kernels of a process share; compiled without sanitizers, whose
// fibers it manages.

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "host_cuda.h"

namespace host_cuda {

Thread* current;
uint3 block_index, block_size, grid_size;

namespace {

constexpr size_t STACK = 256 << 10;
constexpr unsigned PAIR_THREADS = 2 * WARP_LANES;

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

struct Fiber : Thread {
    Context context;
    void* stack = nullptr;
    void* fake_stack = nullptr;
    Wait wait;
    unsigned mask;                  // lanes of the warp collective that it waits at
    uint64_t sent;                  // its value there
    uint64_t received[WARP_LANES];  // everybody's value, once the collective is complete
};

// Which lanes of a warp may run, wait at a collective, or have exited or never were.
struct Warp {
    unsigned ready, collective, done;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
unsigned elsewhere;  // fibers that have neither come to the block's barrier nor exited
Context scheduler;
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_size;
const Kernel* kernel;
void** arguments;

Fiber& own() { return *static_cast<Fiber*>(current); }

}  // namespace

void fail(const char* what) {
    std::fprintf(stderr, "host_cuda: %s (block %u,%u,%u thread %u)\n", what, block_index.x, block_index.y, block_index.z,
                 current ? current->linear : 0);
    std::abort();
}

// Back to the scheduler, until it has found this fiber's barrier or collective complete.
void wait(Wait kind) {
    Fiber* self = &own();
    self->wait = kind;
    __sanitizer_start_switch_fiber(kind == Wait::done ? nullptr : &self->fake_stack, scheduler_stack, scheduler_stack_size);
    switch_context(&self->context, &scheduler);
    __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
}

const uint64_t* collective(Wait kind, unsigned mask, uint64_t value) {
    if (!(mask >> current->linear % WARP_LANES & 1)) fail("a lane calls a warp collective whose mask leaves it out");
    Fiber& self = own();
    self.mask = mask;
    self.sent = value;
    wait(kind);
    return self.received;
}

namespace {

void fiber_main() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
    kernel->call(arguments);
    wait(Wait::done);
}

void start(Fiber& fiber, unsigned linear) {
    fiber.linear = linear;
    fiber.index = {linear % block_size.x, linear / block_size.x % block_size.y, linear / (block_size.x * block_size.y)};
    fiber.wait = Wait::ready;
    fiber.fake_stack = nullptr;
    if (!fiber.stack) {
        fiber.stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (fiber.stack == MAP_FAILED) fail("no memory for a fiber's stack");
        __asan_unpoison_memory_region(fiber.stack, STACK);  // once: a fiber's frames have returned when it is done
    }
    make_context(&fiber.context, fiber.stack, STACK, fiber_main);
}

void resume(Fiber& fiber) {
    current = &fiber;
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, STACK);
    switch_context(&scheduler, &fiber.context);
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

// Notes where a fiber has arrived, and lets those go that wait for it there, if it was the last.
void arrive(const Fiber& fiber, unsigned threads) {
    Warp& warp = warps[fiber.linear / WARP_LANES];
    const unsigned lane = fiber.linear % WARP_LANES, first = fiber.linear - lane, mask = fiber.mask;
    warp.ready &= ~(1u << lane);
    if (fiber.wait == Wait::block || fiber.wait == Wait::done) {
        if (fiber.wait == Wait::done) warp.done |= 1u << lane;
        if (--elsewhere) return;
        for (unsigned i = 0; i < threads; ++i) {
            if (fibers[i]->wait != Wait::block) continue;
            fibers[i]->wait = Wait::ready;
            warps[i / WARP_LANES].ready |= 1u << i % WARP_LANES;
            ++elsewhere;
        }
        return;
    }
    if (fiber.wait == Wait::pair) {
        const unsigned first_of_pair = fiber.linear / PAIR_THREADS * PAIR_THREADS;
        if (first_of_pair + PAIR_THREADS > threads) fail("a pair's barrier in a warp that has no other beside it");
        for (unsigned i = first_of_pair; i < first_of_pair + PAIR_THREADS; ++i) {
            if (fibers[i]->wait == Wait::done) fail("a pair's barrier waits for a thread that has exited");
            if (fibers[i]->wait != Wait::pair) return;
        }
        for (unsigned i = first_of_pair; i < first_of_pair + PAIR_THREADS; ++i) {
            fibers[i]->wait = Wait::ready;
            warps[i / WARP_LANES].ready |= 1u << i % WARP_LANES;
        }
        return;
    }
    warp.collective |= 1u << lane;
    if (mask & warp.done) fail("a warp collective names a lane that has exited");
    if (mask & ~warp.collective) return;
    uint64_t values[WARP_LANES] = {};
    for (unsigned other = 0; other < WARP_LANES; ++other) {
        if (!(mask >> other & 1)) continue;
        const Fiber& its = *fibers[first + other];
        if (its.wait != fiber.wait || its.mask != mask) return;
        values[other] = its.sent;
    }
    for (unsigned other = 0; other < WARP_LANES; ++other) {
        if (!(mask >> other & 1)) continue;
        std::memcpy(fibers[first + other]->received, values, sizeof values);
        fibers[first + other]->wait = Wait::ready;
    }
    warp.collective &= ~mask;
    warp.ready |= mask;
}

void run_block(std::mt19937_64& random) {
    const unsigned threads = block_size.x * block_size.y * block_size.z;
    while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
    for (unsigned i = 0; i < threads; ++i) start(*fibers[i], i);
    const unsigned count = (threads + WARP_LANES - 1) / WARP_LANES;
    warps.assign(count, {~0u, 0, 0});
    if (threads % WARP_LANES) warps.back() = {(1u << threads % WARP_LANES) - 1, 0, ~0u << threads % WARP_LANES};
    elsewhere = threads;
    std::vector<unsigned> ready;
    // A warp goes on for about LEAD turns, so that it gets ahead of the others by any number of collectives.
    constexpr unsigned LEAD = 64;
    unsigned warp = random() % count;
    for (unsigned left = threads; left > 0;) {
        if (random() % LEAD == 0 || !warps[warp].ready) {
            warp = random() % count;
            for (unsigned tried = 0; !warps[warp].ready; warp = (warp + 1) % count)
                if (++tried > count) fail("deadlock: threads wait at different barriers");
        }
        ready.clear();
        for (unsigned lanes = warps[warp].ready; lanes; lanes &= lanes - 1) ready.push_back(warp * WARP_LANES + __builtin_ctz(lanes));
        std::shuffle(ready.begin(), ready.end(), random);
        const size_t some = 1 + random() % ready.size();
        for (size_t i = 0; i < some; ++i) {
            resume(*fibers[ready[i]]);
            left -= own().wait == Wait::done;
            arrive(own(), threads);
        }
    }
}

void poison_shared() {
    for (volatile char* byte = kernel->shared; byte < kernel->shared_end; ++byte) *byte = char(0xff);
}

}  // namespace

}  // namespace host_cuda

extern "C" {

const char* host_parameters(const host_cuda::Kernel* kernel) { return kernel->parameters(); }

// Exactly `size` bytes between ASan's redzones, at a multiple of 16, as malloc aligns.
void* host_alloc(size_t size) { return std::malloc(size); }
void host_free(void* memory) { std::free(memory); }

void host_launch(const host_cuda::Kernel* launched, const unsigned* grid, const unsigned* block, void** slots, uint64_t seed) {
    using namespace host_cuda;
    kernel = launched;
    arguments = slots;
    grid_size = {grid[0], grid[1], grid[2]};
    block_size = {block[0], block[1], block[2]};
    std::mt19937_64 random(seed);
    std::vector<unsigned> blocks(grid[0] * grid[1] * grid[2]);
    for (unsigned i = 0; i < blocks.size(); ++i) blocks[i] = i;
    std::shuffle(blocks.begin(), blocks.end(), random);
    for (unsigned b : blocks) {
        block_index = {b % grid[0], b / grid[0] % grid[1], b / (grid[0] * grid[1])};
        poison_shared();
        run_block(random);
    }
    current = nullptr;
}
}
