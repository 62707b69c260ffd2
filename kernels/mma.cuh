// mma: products of 16-bit elements on tensor cores.
//
// mma.m16n8k16 multiplies 16 x 16 by 16 x 8. With g = lane / 4 and t = lane % 4, a lane has of the first factor a word of two
// elements, columns 2 t and 2 t + 1, of row g (word 0) and of row g + 8 (word 1), and the same 8 columns on (words 2 and 3); of the
// second factor the same two pairs of rows of column g; of the sums columns 2 t and 2 t + 1 of row g (sums 0 and 1) and of row
// g + 8 (sums 2 and 3). Each product is exact. How they are added, 8 or 16 at a time and rounded towards zero, is the GPU's.
//
// Which elements of a dot product a word holds is free, as long as both factors agree.

#include "elements.cuh"
#include "warp.cuh"

#ifdef DTYPE_FLOAT32
#error "tensor cores multiply 16-bit elements"
#endif

constexpr int MMA_TOKENS = 8;  // that are multiplied together, whether there are as many or not
static_assert(TOKENS <= MMA_TOKENS, "a token is a column of the second factor");

#ifdef __CUDACC__

#ifdef DTYPE_BFLOAT16
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif

// All lanes of a warp call together.
__device__ __forceinline__ void add_product(float (&sums)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                            unsigned b1) {
    asm volatile(MMA "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The second factor out of shared memory, where each of its 16 rows is 16 bytes: those of the first 8 rows are what lanes 0 to 7
// point to, the others what lanes 8 to 15 do. All lanes of a warp call together.
__device__ __forceinline__ void load_second(unsigned& b0, unsigned& b1, const uint4* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(b0), "=r"(b1)
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
}

// Stores to shared memory if `is_stored`: predicated, where the compiler would branch.
__device__ __forceinline__ void store_if(bool is_stored, uint4* to, const uint4& v) {
    asm volatile("{\n .reg .pred p;\n setp.ne.u32 p, %0, 0;\n @p st.shared.v4.u32 [%1], {%2, %3, %4, %5};\n}"
                 :
                 : "r"((unsigned)is_stored), "r"((unsigned)__cvta_generic_to_shared(to)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ void store_if(bool is_stored, unsigned short* to, unsigned short v) {
    asm volatile("{\n .reg .pred p;\n setp.ne.u32 p, %0, 0;\n @p st.shared.u16 [%1], %2;\n}"
                 :
                 : "r"((unsigned)is_stored), "r"((unsigned)__cvta_generic_to_shared(to)), "h"(v)
                 : "memory");
}

#else

__device__ __forceinline__ void add_product(float (&sums)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                            unsigned b1) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const auto half = [](unsigned word, int h) { return to_float((scalar)(word >> 16 * h)); };
    float of[4] = {sums[0], sums[1], sums[2], sums[3]};
    for (int k = 0; k < 4; ++k) {
        const unsigned a[4] = {__shfl_sync(ALL_LANES, a0, 4 * g + k), __shfl_sync(ALL_LANES, a1, 4 * g + k),
                               __shfl_sync(ALL_LANES, a2, 4 * g + k), __shfl_sync(ALL_LANES, a3, 4 * g + k)};
        for (int column = 0; column < 2; ++column) {
            const unsigned b[2] = {__shfl_sync(ALL_LANES, b0, 4 * (2 * t + column) + k),
                                   __shfl_sync(ALL_LANES, b1, 4 * (2 * t + column) + k)};
            for (int row = 0; row < 2; ++row)
                for (int i = 0; i < 4; ++i) of[2 * row + column] += half(a[row + i / 2 * 2], i % 2) * half(b[i / 2], i % 2);
        }
    }
    for (int i = 0; i < 4; ++i) sums[i] = of[i];
}

__device__ __forceinline__ void load_second(unsigned& b0, unsigned& b1, const uint4* row) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    unsigned* const to[2] = {&b0, &b1};
    for (int matrix = 0; matrix < 2; ++matrix) {
        *to[matrix] = 0;
        for (int h = 0; h < 2; ++h) {
            const uint4* from = __shfl_sync(ALL_LANES, row, 8 * matrix + 2 * t + h);
            *to[matrix] |= (unsigned)raw_element(*from, g) << 16 * h;
        }
    }
}

template <class T>
__device__ __forceinline__ void store_if(bool is_stored, T* to, const T& v) {
    if (is_stored) *to = v;
}

#endif
