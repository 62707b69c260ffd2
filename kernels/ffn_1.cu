// ffn_1: the gate projection, dense (formula 1).
//
//   gate[j] = dot(x, w_gate[j, :])        0 <= j < d_ff
//
//   x (d_model,) and w_gate (d_ff, d_model) row-major, both 16-byte aligned   gate (d_ff,), every element written
//   launch   WARPS warps a block, one row a warp; grid ceil(d_ff / WARPS)
//   numerics float32 accumulation, one rounding at the store

#include "common.cuh"
#include "row_dot.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
ffn_1(const scalar* x, const scalar* __restrict__ w_gate, scalar* __restrict__ gate, int d_ff, int d_model) {
    wait_for_predecessor();
    const int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= D_FF(d_ff)) return;

    const int chunks = D_MODEL(d_model) / VEC;
    const uint4* weights = reinterpret_cast<const uint4*>(w_gate) + (long long)row * chunks;
    const float sum = row_dot(weights, reinterpret_cast<const uint4*>(x), chunks);
    if (threadIdx.x % 32 == 0) gate[row] = from_float(sum);
}
