// Enough of CUDA to run a kernel of this project on the host: every thread of a block is a fiber, one block at a time.
//
// Meant to be adversarial rather than fast. Warps, their fibers and blocks run in an order drawn from a seed, a fiber runs until its next
// barrier or warp collective, shared memory is poisoned before every block: code that leans on an order or on a barrier that is
// not there gives another result under another seed. Built with AddressSanitizer and UBSan, which see every index and every
// alignment. Any violation prints a line that starts with "host_cuda:" or a sanitizer's report, and ends the process.
//
// This is what kernels see of it; who runs their fibers is scheduler.cpp, which is compiled once. It is read anew for every kernel, so it
// includes nothing: the standard library's headers take longer to read, precompiled too, than most kernels to compile.

#pragma once

typedef __SIZE_TYPE__ size_t;
typedef __UINT64_TYPE__ uint64_t;

extern "C" float exp2f(float) noexcept;
extern "C" float fmaf(float, float, float) noexcept;
extern "C" float fmaxf(float, float) noexcept;
extern "C" float sqrtf(float) noexcept;

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
// In a section of its own, so that it can be found and poisoned; -fsanitize-sections keeps its variables under ASan.
#define __shared__ static __attribute__((section("shared_memory")))

struct uint3 {
    unsigned x, y, z;
};

struct alignas(8) uint2 {
    unsigned x, y;
};

struct alignas(8) float2 {
    float x, y;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct alignas(16) float4 {
    float x, y, z, w;
};

struct alignas(16) ulonglong2 {
    unsigned long long x, y;
};

namespace host_cuda {

constexpr unsigned WARP_LANES = 32;

enum class Wait { ready, block, pair, shuffle, ballot, warp, done };

struct Thread {
    uint3 index;
    unsigned linear;
};

extern Thread* current;
extern uint3 block_index, block_size, grid_size;

[[noreturn]] void fail(const char* what);
void wait(Wait kind);
// Everybody's value, once all lanes of the mask have come to the same collective.
const uint64_t* collective(Wait kind, unsigned mask, uint64_t value);

template <class T>
inline uint64_t bits_of(T value) {
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof value);
    return bits;
}

template <class T>
inline T shuffle(unsigned mask, T value, unsigned source) {
    const uint64_t* received = collective(Wait::shuffle, mask, bits_of(value));
    if (source >= WARP_LANES) return value;
    if (!(mask >> source & 1)) fail("a shuffle reads a lane that its mask leaves out");
    __builtin_memcpy(&value, &received[source], sizeof value);
    return value;
}

// What the scheduler gets of a kernel.
struct Kernel {
    void (*call)(void** slots);
    char *shared, *shared_end;
    const char* (*parameters)();
};

struct Call {
    template <class... P>
    Call(void (*function)(P...), P... arguments) {
        function(arguments...);
    }
};

template <class P>
inline P next(void**& slots) {
    return *static_cast<P*>(*slots++);
}

template <class... P>
inline void call(void (*function)(P...), void** slots) {
    Call{function, next<P>(slots)...};  // braces: from left to right
}

// What a parameter is: P for each pointer, which may be in a struct, f float32, i int32.
template <class P>
struct Kind {
    static_assert(sizeof(P) % sizeof(void*) == 0);
    static void write(char*& at) {
        for (size_t i = 0; i < sizeof(P); i += sizeof(void*)) *at++ = 'P';
    }
};
template <>
struct Kind<float> {
    static void write(char*& at) { *at++ = 'f'; }
};
template <>
struct Kind<int> {
    static void write(char*& at) { *at++ = 'i'; }
};

template <class... P>
inline const char* parameters(void (*)(P...)) {
    static char all[256];
    char* at = all;
    ((Kind<P>::write(at), *at++ = ' '), ...);
    return all;
}

}  // namespace host_cuda

#define threadIdx (host_cuda::current->index)
#define blockIdx (host_cuda::block_index)
#define blockDim (host_cuda::block_size)
#define gridDim (host_cuda::grid_size)

inline void __syncthreads() { host_cuda::wait(host_cuda::Wait::block); }
// Of two neighbouring warps, which is all that kernels ask for.
inline void __barrier_sync_count(unsigned barrier, unsigned threads) {
    if (threads != 64 || barrier != host_cuda::current->linear / 64 + 1 || barrier > 15)
        host_cuda::fail("a barrier that is not a pair's own");
    host_cuda::wait(host_cuda::Wait::pair);
}
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

inline unsigned atomicInc(unsigned* address, unsigned last) {
    const unsigned old = *address;
    *address = old >= last ? 0 : old + 1;
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
    __builtin_memcpy(&value, &bits, sizeof value);
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

extern "C" __attribute__((weak, visibility("hidden"))) char __start_shared_memory[], __stop_shared_memory[];

#define HOST_ENTRY(name)                                                                    \
    extern "C" __attribute__((visibility("default"))) host_cuda::Kernel host_kernel = {     \
        [](void** slots) { host_cuda::call(name, slots); }, __start_shared_memory, __stop_shared_memory, \
        [] { return host_cuda::parameters(name); }};
