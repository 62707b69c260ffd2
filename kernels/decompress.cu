// decompress: weights in any format as they are, bit for bit.
//
//   w[j, c] = w_packed[j, c]        0 <= j < d_ff, 0 <= c < d_model
//
//   w_packed (d_ff, d_model) in format W_PACKED   w (d_ff, d_model), row-major, 16-byte aligned, every element written
//   launch   WARPS warps a block, one row a warp; grid ceil(d_ff / WARPS)

#include "elements.cuh"
#include "weights.cuh"

constexpr int LOADS = 4;  // chunks that a lane has in flight

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    decompress(W_PACKED::Matrix w_packed, scalar* __restrict__ w, int d_ff, int d_model) {
    const int row = blockIdx.x * WARPS + threadIdx.x / 32, chunks = D_MODEL(d_model) / VEC;
    if (row >= D_FF(d_ff)) return;

    const W_PACKED::Row packed = W_PACKED::row(w_packed, row, chunks);
    uint4* out = reinterpret_cast<uint4*>(w) + (long long)row * chunks;
#pragma unroll 1
    for (int first = threadIdx.x % 32; first - (int)(threadIdx.x % 32) < chunks; first += 32 * LOADS) {
        const W_PACKED::Row mine = packed.from(first);
        W_PACKED::Words words[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const bool is_stored = first + 32 * i < stored<W_PACKED>(chunks);
            words[i] = mine.words(is_stored ? mine.load(32 * i) : W_PACKED::Chunk{});
        }
        for_each_chunk<W_PACKED>(words, mine.code, [&](int i, const uint4& elements) {
            if (first + 32 * i < chunks) out[first + 32 * i] = elements;
        });
    }
}
