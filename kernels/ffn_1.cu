// ffn_1: the gate projection, dense (formula 1).
//
//   gate[t, j] = dot(x[t, :], w_gate[j, :]) + bias[j]        0 <= t < TOKENS, 0 <= j < d_ff
//
//   x (TOKENS, d_model), 16-byte aligned   w_gate (d_ff, d_model) in format W_GATE   gate (TOKENS, d_ff), every element written
//   bias (d_ff,) if GATE_BIAS
//   launch   WARPS warps a block, ABREAST rows a warp, or two warps with several tokens; grid ceil(d_ff / (that of a block))
//   numerics float32 accumulation, one rounding at the store, or none if PARTIAL

#include "bias.cuh"
#include "elements.cuh"
#include "programmatic.cuh"
#include "row_dot.cuh"
#include "weights.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    ffn_1(const scalar* x, W_GATE::Matrix w_gate, result* __restrict__ gate, int d_ff, int d_model, const scalar* bias) {
    wait_for_predecessor();
    const int rows = D_FF(d_ff), first = (blockIdx.x * WARPS + threadIdx.x / 32) / SHARING * ABREAST;
    if (first >= rows) return;

    const int chunks = D_MODEL(d_model) / VEC;
    const float dot = row_dots<W_GATE>(rows_from<W_GATE, ABREAST>(w_gate, first, rows, chunks).at, chunks_of(x), chunks);
    const Place place = place_of<ABREAST>(first, rows);
    if (place.exists && threadIdx.x / 32 % SHARING == 0)
        gate[(long long)place.token * rows + place.row] = to_result(biased<GATE_BIAS>(dot, bias, place.row));
}
