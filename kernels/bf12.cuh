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
// plain weights in `escapes`.

#include "elements.cuh"
#include "memory.cuh"
#include "warp.cuh"

#ifdef DTYPE_BFLOAT16

// What both formats share: how words become weights.
struct Bf12 {
    static constexpr bool HAS_ESCAPES = true;
    static constexpr unsigned ESCAPE = 0x88888888u;  // 8 negative weights with the window's two smallest exponents

    struct Words {
        unsigned low0, low1, high;
        __device__ __forceinline__ bool escaped() const { return high == ESCAPE; }
    };

    const uint4* escapes;
    unsigned bases;  // the base in each byte

    __device__ __forceinline__ uint4 plain(const Words& w) const {
        constexpr unsigned UPPER = 0x87878787u;
        const unsigned first = (w.high & UPPER) + bases, second = (__funnelshift_l(w.high, w.high, 4) & UPPER) + bases;
        return {__byte_perm(w.low0, first, 0x5140), __byte_perm(w.low0, second, 0x5342), __byte_perm(w.low1, first, 0x7160),
                __byte_perm(w.low1, second, 0x7362)};
    }

    template <class Matrix>
    __device__ static __forceinline__ Bf12 of(const Matrix& matrix) {
        return {matrix.escapes, (unsigned)matrix.base * 0x01010101u};
    }
};

// The low words of all chunks, row by row, and the high words of all.
struct Bf12Rows : Bf12 {
    static constexpr int TOGETHER = 1;

    struct Chunk {
        uint2 low;
        unsigned high;
    };

    struct Matrix {
        const uint2* low;
        const unsigned* high;
        const uint4* escapes;
        unsigned long long base;
    };

    __device__ static __forceinline__ Words words_of(const Chunk& chunk) { return {chunk.low.x, chunk.low.y, chunk.high}; }

    struct Row {
        const uint2* low;
        const unsigned* high;
        Bf12 code;

        __device__ __forceinline__ Row from(int c) const { return {low + c, high + c, code}; }
        __device__ __forceinline__ Chunk load(int c) const { return {load_once(low + c), load_once(high + c)}; }
        __device__ __forceinline__ Words words(const Chunk& chunk) const { return words_of(chunk); }
    };

    __device__ static __forceinline__ Row row(const Matrix& matrix, int j, int n) {
        const long long first = (long long)j * n;
        return {matrix.low + first, matrix.high + first, Bf12::of(matrix)};
    }

    struct Column {
        const uint2* low;
        const unsigned* high;
        unsigned pitch;
        Bf12 code;

        __device__ __forceinline__ Chunk load(unsigned j) const {
            return {load_once_with_neighbours(advanced(low, j, 8 * pitch)),
                    load_once_with_neighbours(advanced(high, j, 4 * pitch))};
        }
        __device__ __forceinline__ Words words(const Chunk& chunk) const { return words_of(chunk); }
    };

    __device__ static __forceinline__ Column column(const Matrix& matrix, int c, int n) {
        return {in_registers(matrix.low + c), in_registers(matrix.high + c), (unsigned)n, Bf12::of(matrix)};
    }
};

// Four chunks are a unit of three vectors, and a row is whole units:
//
//   vector 0   low0, low1, high of chunk 0, high of chunk 1
//   vector 1   low0, low1 of chunk 1, low0, low1 of chunk 2
//   vector 2   low0, low1, high of chunk 3, high of chunk 2
//
// So four lanes load the vectors 0, 1, 1, 2, and those of chunks 1 and 2 get a word from a neighbour.
struct Bf12Slices : Bf12 {
    static constexpr int TOGETHER = 4;

    typedef uint4 Chunk;  // a vector

    struct Matrix {
        const uint4* units;
        const uint4* escapes;
        unsigned long long base;
    };

    __device__ static __forceinline__ int pitch(int n) { return (n + 3) / 4 * 3; }

    // The place of a lane's chunk in its unit.
    struct Position {
        int c;

        __device__ __forceinline__ int vector() const { return (c + 1) / 2; }
        __device__ __forceinline__ Words words(const Chunk& v) const {
            const unsigned high = __shfl_sync(ALL_LANES, v.w, c == 1 ? 0 : 3, 4);
            return {c == 2 ? v.z : v.x, c == 2 ? v.w : v.y, c == 1 || c == 2 ? high : v.z};
        }
    };

    struct Row {
        const uint4* units;
        Position position;
        Bf12 code;

        __device__ __forceinline__ Row from(int c) const {
            return {units + c / 4 * 3 + Position{c % 4}.vector(), {c % 4}, code};
        }
        __device__ __forceinline__ Chunk load(int c) const { return load_once(units + c / 4 * 3); }
        __device__ __forceinline__ Words words(const Chunk& chunk) const { return position.words(chunk); }
    };

    __device__ static __forceinline__ Row row(const Matrix& matrix, int j, int n) {
        return {matrix.units + (long long)j * pitch(n), {0}, Bf12::of(matrix)};
    }

    struct Column {
        const uint4* vector;
        Position position;
        unsigned pitch;
        Bf12 code;

        __device__ __forceinline__ Chunk load(unsigned j) const {
            return load_once_with_neighbours(advanced(vector, j, 16 * pitch));
        }
        __device__ __forceinline__ Words words(const Chunk& chunk) const { return position.words(chunk); }
    };

    __device__ static __forceinline__ Column column(const Matrix& matrix, int c, int n) {
        const Position position = {c % 4};
        return {in_registers(matrix.units + c / 4 * 3 + position.vector()), position, (unsigned)pitch(n), Bf12::of(matrix)};
    }
};

#endif
