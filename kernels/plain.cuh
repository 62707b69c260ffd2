// plain: the format of weights that lie in memory as they are, (d_ff, d_model), row-major, at a multiple of 16 bytes.
//
// A format is a struct, and its header the only place that knows how weights lie in memory. The kernels use
//
//   Matrix              a weight argument
//   row(matrix, j, n)   row j, n chunks long
//   Row::from(c)        the row from its chunk c on
//   Row::load(c)        its chunk c, a multiple of 32, from there on: VEC weights, read once
//   column(matrix, c, n)   chunk c of every row
//   Column::load(j)     that of row j, where neighbouring blocks read the chunks beside it
//   words(chunk)        of a row or a column: the chunk's own words; all lanes of a warp ask together
//   TOGETHER            neighbouring chunks whose lanes must all have loaded before: rows are stored as a multiple of them
//   Chunk{}             VEC weights whose product with zero is zero
//   code.plain(words)   of a row or a column: 16 bytes of elements; words that have `escaped` are code.escapes[words.low0] instead
//   HAS_ESCAPES         whether any can have

#include "elements.cuh"
#include "memory.cuh"

struct Plain {
    static constexpr bool HAS_ESCAPES = false;
    static constexpr int TOGETHER = 1;
    typedef uint4 Chunk;

    struct Matrix {
        const scalar* weights;
    };

    struct Words {
        uint4 elements;
    };

    struct Code {
        __device__ __forceinline__ uint4 plain(const Words& w) const { return w.elements; }
    };

    struct Row {
        const uint4* chunks;
        static constexpr Code code = {};

        __device__ __forceinline__ Row from(int c) const { return {chunks + c}; }
        __device__ __forceinline__ Chunk load(int c) const { return load_once(chunks + c); }
        __device__ __forceinline__ Words words(const Chunk& chunk) const { return {chunk}; }
    };

    __device__ static __forceinline__ Row row(const Matrix& matrix, int j, int n) {
        return {chunks_of(matrix.weights) + (long long)j * n};
    }

    struct Column {
        const uint4* chunk;
        unsigned pitch;
        static constexpr Code code = {};

        __device__ __forceinline__ Chunk load(unsigned j) const {
            return load_once_with_neighbours(advanced(chunk, j, 16 * pitch));
        }
        __device__ __forceinline__ Words words(const Chunk& chunk) const { return {chunk}; }
    };

    __device__ static __forceinline__ Column column(const Matrix& matrix, int c, int n) {
        return {in_registers(chunks_of(matrix.weights) + c), (unsigned)n};
    }
};
