// What every kernel shares: the element type, 16-byte vectors of it, and the sums of a warp.
//
//   DTYPE_BFLOAT16 | DTYPE_FLOAT16 | DTYPE_FLOAT32   the element type, exactly one of them
//   ROW_OPT, COL_OPT                                 d_ff and d_model as constants; without them both come with the launch
//   PROGRAMMATIC                                     launches may overlap the end of their predecessor (sm_90)
//   EARLY_SUCCESSOR                                  the successor may start before this launch has written its results (sm_90)
//
// 16-bit elements are carried as their bits, so no CUDA header is included: a header costs more to parse than these kernels cost
// to compile. Inline PTX is in the helpers under #ifdef __CUDACC__ and nowhere else, each with a plain C++ twin.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "prosparse-cupy needs a GPU of compute capability 8.0 (Ampere) or later"
#endif
#if defined(DTYPE_BFLOAT16) + defined(DTYPE_FLOAT16) + defined(DTYPE_FLOAT32) != 1
#error "define exactly one of DTYPE_BFLOAT16, DTYPE_FLOAT16, DTYPE_FLOAT32"
#endif
#if defined(ROW_OPT) != defined(COL_OPT)
#error "ROW_OPT and COL_OPT go together: both from the arrays' shape, or neither"
#endif

#ifdef ROW_OPT
#define D_FF(argument) (ROW_OPT)
#define D_MODEL(argument) (COL_OPT)
#else
#define D_FF(argument) (argument)
#define D_MODEL(argument) (argument)
#endif

#ifdef DTYPE_FLOAT32
typedef float scalar;
#else
typedef unsigned short scalar;
#endif

constexpr int VEC = 16 / sizeof(scalar);  // elements in a 16-byte vector
constexpr unsigned ALL_LANES = 0xffffffffu;

#if defined(ROW_OPT)
static_assert(ROW_OPT >= 1, "d_ff must be at least 1");
static_assert(COL_OPT >= VEC && COL_OPT % VEC == 0, "d_model must be a multiple of 16 bytes");
#endif

#ifdef __CUDACC__

__device__ __forceinline__ float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ unsigned short float_to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ unsigned short float_to_bfloat16(float value) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Weights are read once: keep them out of L1, which then holds x. Volatile keeps the loads of a batch together, ahead of their uses.
__device__ __forceinline__ uint4 load_once(const uint4* address) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
}

// The same, and L2 may fetch 256 bytes at a time, since neighbours ask for the rest soon: ffn_4 on every row of 13B, H100: 59.2 µs
// without, 52.4 with. Where a warp itself asks for all of it, it costs: ffn_23, 7B, 89 %: 5.6 µs, 5.55 without.
__device__ __forceinline__ uint4 load_once_with_neighbours(const uint4* address) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
}

// A block's THREADS threads ask for a vector of `length` elements, which then comes into L1 while they do something else: a copy to shared
// memory goes through L1, and unlike a load whose result is not used it stays in the program. prefetch.global.L1 takes 2 µs more.
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

// A programmatic launch starts while its predecessor on the stream ends. What that one wrote is there after this, and nothing may be
// written before it. Vectors it may have written are not const __restrict__: the compiler would read them through a cache that holds
// only what never changes during the kernel. H100: 0.4 µs a launch.
__device__ __forceinline__ void wait_for_predecessor() {
#ifdef PROGRAMMATIC
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the successor's blocks in as soon as all blocks of this launch have come here: after their last read, by all of their threads, so
// that a successor that writes before it waits, as foreign ones may, overwrites nothing that is still needed.
__device__ __forceinline__ void let_successor_in() {
#ifdef EARLY_SUCCESSOR
    asm volatile("bar.sync 0;\n griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#else

__device__ __forceinline__ float half_to_float(unsigned short bits) {
    const unsigned sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 0x1fu, fraction = bits & 0x3ffu;
    if (exponent == 0x1f) return __uint_as_float(sign | 0x7f800000u | (fraction << 13));
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * fraction * 0x1p-24f;
    return __uint_as_float(sign | ((exponent + 112) << 23) | (fraction << 13));
}

__device__ __forceinline__ unsigned short float_to_half(float value) {
    const unsigned bits = __float_as_uint(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
    if (magnitude < 0x38800000u)                          // below 2^-14: adding 0.5 rounds at the subnormal step 2^-24
        return sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u);
    return sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
}

__device__ __forceinline__ unsigned short float_to_bfloat16(float value) {
    const unsigned bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

__device__ __forceinline__ uint4 load_once(const uint4* address) { return *address; }

__device__ __forceinline__ uint4 load_once_with_neighbours(const uint4* address) { return *address; }

template <int THREADS>
__device__ __forceinline__ void fetch_into_l1(const scalar*, int) {}

__device__ __forceinline__ void end_fetch() {}

__device__ __forceinline__ void wait_for_predecessor() {}

__device__ __forceinline__ void let_successor_in() {}

#endif

__device__ __forceinline__ float to_float(scalar value) {
#if defined(DTYPE_BFLOAT16)
    return __uint_as_float((unsigned)value << 16);
#elif defined(DTYPE_FLOAT16)
    return half_to_float(value);
#else
    return value;
#endif
}

__device__ __forceinline__ scalar from_float(float value) {
#if defined(DTYPE_BFLOAT16)
    return float_to_bfloat16(value);
#elif defined(DTYPE_FLOAT16)
    return float_to_half(value);
#else
    return value;
#endif
}

// The bits of element i of a vector.
__device__ __forceinline__ scalar raw_element(const uint4& v, int i) {
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
#ifdef DTYPE_FLOAT32
    return __uint_as_float(words[i]);
#else
    return (scalar)(words[i / 2] >> (i % 2 * 16));
#endif
}

// Element i of a vector; i is a constant once the caller's loop is unrolled, so this is a shift, a mask or nothing.
__device__ __forceinline__ float element(const uint4& v, int i) {
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
#if defined(DTYPE_BFLOAT16)
    return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
#elif defined(DTYPE_FLOAT16)
    return half_to_float((unsigned short)(words[i / 2] >> (i % 2 * 16)));
#else
    return __uint_as_float(words[i]);
#endif
}

// Whether not (gate < threshold) and gate != 0, on the bits: -ftz=true, which CuPy always passes, would make a comparison of
// floats flush subnormal gates. For threshold >= +0 the bits of positive floats order as the floats do; every NaN is active.
__device__ __forceinline__ bool is_active(float gate, float threshold) {
    const unsigned bits = __float_as_uint(gate);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return nan | (((int)bits > 0) & (bits >= __float_as_uint(threshold)));
}

__device__ __forceinline__ bool is_nonzero(scalar value) {
#ifdef DTYPE_FLOAT32
    return (__float_as_uint(value) & 0x7fffffffu) != 0;
#else
    return (value & 0x7fffu) != 0;
#endif
}

// The sum over the warp, in every lane; the tree is fixed, so the bits are.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}
