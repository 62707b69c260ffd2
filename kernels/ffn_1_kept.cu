// ffn_1_kept: ffn_1 of five to eight tokens, to the bit, by blocks that keep the tokens (formula 1).
//
//   gate[t, j] = dot(x[t, :], w_gate[j, :]) + bias[j]        0 <= t < TOKENS, 0 <= j < d_ff
//
//   x (TOKENS, d_model) and w_gate (d_ff, d_model), both 16-byte aligned   gate (TOKENS, d_ff), every element written
//   bias (d_ff,) if GATE_BIAS
//   launch   WARPS warps a block, grid of any size, SHARED_BYTES for what a block keeps
//   numerics as ffn_1: float32 accumulation, one rounding at the store, or none if PARTIAL

#include "bias.cuh"
#include "elements.cuh"
#include "kept.cuh"
#include "programmatic.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    ffn_1_kept(const scalar* x, const scalar* w_gate, result* __restrict__ gate, int, int, const scalar* bias) {
    wait_for_predecessor();
    for_each_group(*dynamic_shared<Kept>(), x, w_gate, [=](float dot, int row) {
        const Place place = place_of(row);
        if (place.exists)
            gate[(long long)place.token * ROW_OPT + place.row] = to_result(biased<GATE_BIAS>(dot, bias, place.row));
    });
}
