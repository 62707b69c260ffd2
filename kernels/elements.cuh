// elements: the element type, 16-byte vectors of it, rounding, and the dims.
//
//   DTYPE_BFLOAT16 | DTYPE_FLOAT16 | DTYPE_FLOAT32   the element type, exactly one of them
//   ROW_OPT, COL_OPT                                 d_ff and d_model as constants; without them both come with the launch
//   TOKENS                                           tokens of a call: vectors are (TOKENS, dim), row-major
//   PARTIAL                                          the result stays in float32: a sum, to be added to those of other GPUs
//
// 16-bit elements are carried as their bits, so no CUDA header is included: a header costs more to parse than these kernels
// cost to compile. Inline PTX stands in these shared headers under #ifdef __CUDACC__ and nowhere else, each with a plain C++
// twin.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "prosparse-cupy needs a GPU of compute capability 8.0 (Ampere) or later"
#endif
#if defined(DTYPE_BFLOAT16) + defined(DTYPE_FLOAT16) + defined(DTYPE_FLOAT32) != 1
#error "define exactly one of DTYPE_BFLOAT16, DTYPE_FLOAT16, DTYPE_FLOAT32"
#endif
#ifndef TOKENS
#error "define TOKENS, 1 to 8"
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

#ifdef PARTIAL
typedef float result;
#else
typedef scalar result;
#endif

constexpr int VEC = 16 / sizeof(scalar);             // elements in a 16-byte vector
constexpr unsigned ALL_TOKENS = (1u << TOKENS) - 1;  // a set of tokens has a bit for each

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

// The one rounding of a result, or none.
__device__ __forceinline__ result to_result(float value) {
#ifdef PARTIAL
    return value;
#else
    return from_float(value);
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

__device__ __forceinline__ bool is_nonzero(scalar value) {
#ifdef DTYPE_FLOAT32
    return (__float_as_uint(value) & 0x7fffffffu) != 0;
#else
    return (value & 0x7fffu) != 0;
#endif
}
