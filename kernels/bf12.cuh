// bf12: bfloat16 weights in 12 bits, without loss, in two formats: Bf12Rows for kernels that read whole rows, Bf12Slices for
// those whose blocks read a slice of every row. Each works for both.
//
// A bfloat16 is a sign, 8 bits of exponent and 7 of mantissa. A matrix has a window of 16 exponents, from 2 * base on, and where
// a weight's exponent lies in it, the weight has a code of 4 bits. A chunk of 8 weights is 3 words:
//
//   low0, low1   a byte for each weight: the lowest bit of its code, then the mantissa
//   high         signs and upper 3 bits of the codes: those of weights 0, 1, 4, 5 in bits 7 and 2 to 0 of bytes 0 to 3, those of
//                weights 2, 3, 6, 7 where they come to lie so when the word is rotated left by 4
//
// So a word of high, masked, is the upper bytes of four weights but for the base, which is added to four at a time: nine
// instructions a chunk. A chunk with an exponent outside the window escapes: its high is ESCAPE, and its low0 the index of its
// plain weights in `escapes`, which is sorted by the column of chunks; `starts` says where each column starts.

#include "elements.cuh"
#include "memory.cuh"
#include "warp.cuh"

#ifdef DTYPE_BFLOAT16

// What both formats share: how words become weights.
struct Bf12 {
    static constexpr unsigned ESCAPE = 0x88888888u;  // 8 negative weights with the window's two smallest exponents

    const uint4* chunks;  // that escape
    unsigned bases;       // the base in each byte

    __device__ __forceinline__ uint4 plain(unsigned low0, unsigned low1, unsigned high) const {
        constexpr unsigned UPPER = 0x87878787u;
        const unsigned first = (high & UPPER) + bases, second = (__funnelshift_l(high, high, 4) & UPPER) + bases;
        uint4 v = {__byte_perm(low0, first, 0x5140), __byte_perm(low0, second, 0x5342), __byte_perm(low1, first, 0x7160),
                   __byte_perm(low1, second, 0x7362)};
        if (high == ESCAPE) v = load_once(chunks + low0);
        return v;
    }

    // The escapes of some columns of chunks.
    struct Escapes {
        const uint4* chunks;
        int first, end;

        // Brings them near while the weights themselves are on their way.
        __device__ __forceinline__ void fetch() const {
            const int i = first + 2 * threadIdx.x;
            if (i < end) prefetch_into_l2(chunks + i);
        }
    };

    template <class Matrix>
    __device__ static __forceinline__ Bf12 of(const Matrix& matrix) {
        return {matrix.escapes, (unsigned)matrix.base * 0x01010101u};
    }

    template <class Matrix>
    __device__ static __forceinline__ Escapes escapes_of(const Matrix& matrix, int first, int end) {
        return {matrix.escapes, (int)load_once(matrix.starts + first), (int)load_once(matrix.starts + end)};
    }
};

// The low words of all chunks, row by row, and the high words of all.
struct Bf12Rows {
    struct Chunk {
        uint2 low;
        unsigned high;
    };

    struct Matrix {
        const uint2* low;
        const unsigned* high;
        const uint4* escapes;
        const unsigned* starts;
        unsigned long long base;
    };

    struct Row {
        const uint2* low;
        const unsigned* high;
        Bf12 code;

        __device__ __forceinline__ Row from(int c) const { return {low + c, high + c, code}; }
        __device__ __forceinline__ Chunk load(int c) const { return {load_once(low + c), load_once(high + c)}; }
        __device__ __forceinline__ Chunk load_with_neighbours() const {
            return {load_once_with_neighbours(low), load_once_with_neighbours(high)};
        }
        __device__ __forceinline__ uint4 plain(const Chunk& chunk) const {
            return code.plain(chunk.low.x, chunk.low.y, chunk.high);
        }
    };

    __device__ static __forceinline__ Row row(const Matrix& matrix, int j, int n) {
        const long long first = (long long)j * n;
        return {matrix.low + first, matrix.high + first, Bf12::of(matrix)};
    }

    __device__ static __forceinline__ Bf12::Escapes escapes(const Matrix& matrix, int first, int end) {
        return Bf12::escapes_of(matrix, first, end);
    }
};

// Four chunks are a unit of three vectors, and a row is whole units: vector r is the words of chunk r and word r of chunk 3. The
// lanes of chunks 0 to 2 load a vector each, and the lane of chunk 3 gets its words from them. Lanes that lack such neighbours,
// where a block's slice is half a unit, load alone.
struct Bf12Slices {
#if defined(LANES) && LANES < 4
    static constexpr bool ALONE = true;
#else
    static constexpr bool ALONE = false;
#endif
    typedef uint4 Chunk;  // a vector; of chunk 3 its words, if it was loaded alone

    struct Matrix {
        const uint4* units;
        const uint4* escapes;
        const unsigned* starts;
        unsigned long long base;
    };

    struct Row {
        const uint4* units;
        int position;  // of the lane's chunk in its unit
        Bf12 code;

        __device__ __forceinline__ Row from(int c) const { return {units + c / 4 * 3, c % 4, code}; }

        __device__ __forceinline__ Chunk load(int c) const {
            const uint4* unit = units + c / 4 * 3;
            if (position != 3) return load_once(unit + position);
            if (ALONE) return {load_once(&unit[0].w), load_once(&unit[1].w), load_once(&unit[2].w), 0};
            return {0, 0, 0, 0};
        }

        __device__ __forceinline__ Chunk load_with_neighbours() const {
            if (position != 3) return load_once_with_neighbours(units + position);
            if (ALONE)
                return {load_once_with_neighbours(&units[0].w), load_once_with_neighbours(&units[1].w),
                        load_once_with_neighbours(&units[2].w), 0};
            return {0, 0, 0, 0};
        }

        __device__ __forceinline__ uint4 plain(const Chunk& chunk) const {
            if (ALONE) return code.plain(chunk.x, chunk.y, chunk.z);
            const unsigned word0 = __shfl_sync(ALL_LANES, chunk.w, 0, 4), word1 = __shfl_sync(ALL_LANES, chunk.w, 1, 4),
                           word2 = __shfl_sync(ALL_LANES, chunk.w, 2, 4);
            const bool last = position == 3;
            return code.plain(last ? word0 : chunk.x, last ? word1 : chunk.y, last ? word2 : chunk.z);
        }
    };

    __device__ static __forceinline__ Row row(const Matrix& matrix, int j, int n) {
        return {matrix.units + (long long)j * ((n + 3) / 4 * 3), 0, Bf12::of(matrix)};
    }

    __device__ static __forceinline__ Bf12::Escapes escapes(const Matrix& matrix, int first, int end) {
        return Bf12::escapes_of(matrix, first, end);
    }
};

#endif
