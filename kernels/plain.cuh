// plain: the format of weights that lie in memory as they are, (d_ff, d_model), row-major, at a multiple of 16 bytes.
//
// A format is a struct, and its header the only place that knows how weights lie in memory. The kernels use
//
//   Matrix              a weight argument
//   row(matrix, j, n)   where row j is, n chunks long
//   Row::from(c)        the row from its chunk c on
//   Row::load(c)        its chunk c, a multiple of 32, from there on: VEC weights, read once
//   Row::load_with_neighbours()   its first chunk from there on, if neighbouring blocks read the chunks beside it
//   Chunk{}             VEC weights whose product with zero is zero
//   Row::plain(chunk)   the chunk's weights as 16 bytes of elements; all lanes of a warp ask together
//   escapes(matrix, c, d)   what the chunks from c up to d of all rows keep elsewhere; `fetch()` brings it near

#include "elements.cuh"
#include "memory.cuh"

struct Plain {
    typedef uint4 Chunk;

    struct Matrix {
        const scalar* weights;
    };

    struct Row {
        const uint4* chunks;
        __device__ __forceinline__ Row from(int c) const { return {chunks + c}; }
        __device__ __forceinline__ Chunk load(int c) const { return load_once(chunks + c); }
        __device__ __forceinline__ Chunk load_with_neighbours() const { return load_once_with_neighbours(chunks); }
        __device__ __forceinline__ uint4 plain(const Chunk& chunk) const { return chunk; }
    };

    struct Escapes {
        __device__ __forceinline__ void fetch() const {}
    };

    __device__ static __forceinline__ Escapes escapes(const Matrix&, int, int) { return {}; }

    __device__ static __forceinline__ Row row(const Matrix& matrix, int j, int n) {
        return {chunks_of(matrix.weights) + (long long)j * n};
    }
};
