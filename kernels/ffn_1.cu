// ffn_1: the gate projection, dense (formula 1).
//
//   gate[t, j] = dot(x[t, :], w_gate[j, :]) + bias[j]        0 <= t < TOKENS, 0 <= j < d_ff
//
//   x (TOKENS, d_model), 16-byte aligned   w_gate (d_ff, d_model) in format W_GATE   gate (TOKENS, d_ff), every element written
//   bias (d_ff,) if GATE_BIAS
//   launch   WARPS warps a block, one row a warp; grid ceil(d_ff / WARPS)
//   numerics float32 accumulation, one rounding at the store

#include "bias.cuh"
#include "elements.cuh"
#include "programmatic.cuh"
#include "row_dot.cuh"
#include "weights.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    ffn_1(const scalar* x, W_GATE::Matrix w_gate, scalar* __restrict__ gate, int d_ff, int d_model, const scalar* bias) {
    wait_for_predecessor();
    const int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= D_FF(d_ff)) return;

    const int chunks = D_MODEL(d_model) / VEC;
    float dots[TOKENS];
    row_dot<W_GATE>(W_GATE::row(w_gate, row, chunks), chunks_of(x), chunks, dots);
    if (threadIdx.x % 32 != 0) return;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) gate[t * D_FF(d_ff) + row] = from_float(biased<GATE_BIAS>(dots[t], bias, row));
}
