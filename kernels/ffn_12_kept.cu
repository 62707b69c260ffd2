// ffn_12_kept: ffn_12 of five to eight tokens, to the bit, by blocks that keep the tokens (formulas 1 and 2).
//
//   g        = dot(x[t, :], w_up[j, :]) + bias[j], rounded
//   x1[t, j] = active(g) ? activate(g) : +0                            0 <= t < TOKENS, 0 <= j < d_ff
//   activate(g) is g for ReLU, see activation.cuh; active(g) = not (g < threshold) and g != 0, so NaN is active
//
//   x (TOKENS, d_model) and w_up (d_ff, d_model), both 16-byte aligned   x1 (TOKENS, d_ff), every element written
//   bias (d_ff,) if UP_BIAS
//   launch   as ffn_1_kept
//   numerics as ffn_12: one rounding before the activation and one of x1

#include "activation.cuh"
#include "bias.cuh"
#include "elements.cuh"
#include "kept.cuh"
#include "programmatic.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    ffn_12_kept(const scalar* x, const scalar* w_up, scalar* __restrict__ x1, float threshold, int, int, const scalar* bias) {
    wait_for_predecessor();
    for_each_group(*dynamic_shared<Kept>(), x, w_up, [=](float dot, int row) {
        const Place place = place_of(row);
        if (!place.exists) return;
        const float g = to_float(from_float(biased<UP_BIAS>(dot, bias, place.row)));
        x1[(long long)place.token * ROW_OPT + place.row] = from_float(is_active(g, threshold) ? activate(g) : 0.0f);
    });
}
