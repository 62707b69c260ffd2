// memory: loads that keep L1 for what is read again, and prefetches.

#include "elements.cuh"

#ifdef __CUDACC__

// Weights are read once: keep them out of L1, which then holds x. Volatile keeps the loads of a batch together, ahead of their
// uses.
__device__ __forceinline__ uint4 load_once(const uint4* address) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
}

__device__ __forceinline__ uint2 load_once(const uint2* address) {
    uint2 v;
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
    return v;
}

__device__ __forceinline__ unsigned load_once(const unsigned* address) {
    unsigned v;
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(address));
    return v;
}

// The same, and L2 may fetch 256 bytes at a time. That pays if neighbouring blocks ask for the rest soon, as those of ffn_4 do,
// and costs if a warp itself asks for all of it. With several tokens a block may ask for it once more, so L1 keeps it.
#if TOKENS == 1
#define NOT_IN_L1 "L1::no_allocate."
#else
#define NOT_IN_L1
#endif
__device__ __forceinline__ uint4 load_once_with_neighbours(const uint4* address) {
    uint4 v;
    asm volatile("ld.global." NOT_IN_L1 "L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
}

__device__ __forceinline__ uint2 load_once_with_neighbours(const uint2* address) {
    uint2 v;
    asm volatile("ld.global." NOT_IN_L1 "L2::256B.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
    return v;
}

__device__ __forceinline__ unsigned load_once_with_neighbours(const unsigned* address) {
    unsigned v;
    asm volatile("ld.global." NOT_IN_L1 "L2::256B.u32 %0, [%1];" : "=r"(v) : "l"(address));
    return v;
}

// The pointer, in registers: the compiler neither reloads it nor takes its computation apart to put it elsewhere.
template <class T>
__device__ __forceinline__ const T* in_registers(const T* pointer) {
    asm volatile("" : "+l"(pointer));
    return pointer;
}

// Prefetches a vector of `length` elements into L1: each of the block's THREADS threads issues a 4-byte cp.async per 32-byte
// sector. The copied word is discarded; only the cache fill matters. A load whose result is not used would be removed by the
// compiler.
template <int THREADS>
__device__ __forceinline__ void fetch_into_l1(const scalar* vector, int length) {
    constexpr int SECTOR = 32 / sizeof(scalar);  // elements of what L1 fetches at a time
    __shared__ unsigned unused;
    const unsigned to = (unsigned)__cvta_generic_to_shared(&unused);
#pragma unroll
    for (int first = 0; first < length; first += THREADS * SECTOR) {
        const int e = first + threadIdx.x * SECTOR;
        if (e < length) asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(vector + e) : "memory");
    }
}

// Every thread that fetched calls this before it ends.
__device__ __forceinline__ void end_fetch() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#ifdef SHARED_BYTES
extern __shared__ uint4 dynamic_shared_memory[];
#endif

#else

template <class T>
__device__ __forceinline__ T load_once(const T* address) {
    return *address;
}

template <class T>
__device__ __forceinline__ T load_once_with_neighbours(const T* address) {
    return *address;
}

template <class T>
__device__ __forceinline__ const T* in_registers(const T* pointer) {
    return pointer;
}

template <int THREADS>
__device__ __forceinline__ void fetch_into_l1(const scalar*, int) {}

__device__ __forceinline__ void end_fetch() {}

#ifdef SHARED_BYTES
__shared__ uint4 dynamic_shared_memory[SHARED_BYTES / 16];
#endif

#endif

#ifdef SHARED_BYTES
// The block's dynamic shared memory, SHARED_BYTES of it.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
    return reinterpret_cast<T*>(dynamic_shared_memory);
}
#endif

// `pointer` and j times `bytes`.
template <class T>
__device__ __forceinline__ const T* advanced(const T* pointer, unsigned j, unsigned bytes) {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(pointer) + (unsigned long long)j * bytes);
}

// A vector of elements as its 16-byte vectors.
__device__ __forceinline__ const uint4* chunks_of(const scalar* vector) { return reinterpret_cast<const uint4*>(vector); }
