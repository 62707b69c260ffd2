// plain: the format of weights that lie in memory as they are, (d_ff, d_model), row-major, at a multiple of 16 bytes.
//
// A format is a struct, and its header the only place that knows how weights lie in memory. The kernels use
//
//   Matrix              a weight argument
//   row(matrix, j, n)   where row j is, n chunks long
//   Row::from(c)        the row from its chunk c on
//   Row::load(c)        chunk c of the row: VEC weights, read once
//   Row::load_with_neighbours(c)   the same, if neighbouring blocks read the chunks beside it
//   Chunk{}             VEC weights that are zero
//   weight(chunk, e)    its weight e as a float

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
        __device__ __forceinline__ Chunk load_with_neighbours(int c) const { return load_once_with_neighbours(chunks + c); }
    };

    __device__ static __forceinline__ Row row(Matrix matrix, int j, int n) {
        return {chunks_of(matrix.weights) + (long long)j * n};
    }

    __device__ static __forceinline__ float weight(const Chunk& chunk, int e) { return element(chunk, e); }
};
