// ffn_12: up-projection, bias and activation in one launch: the first half of an FFN without a gate (formulas 1 and 2).
//
//   g     = dot(x, w_up[j, :]) + bias[j], rounded
//   x1[j] = active(g) ? activate(g) : +0                               0 <= j < d_ff
//   activate(g) is g for ReLU, see activation.cuh; active(g) = not (g < threshold) and g != 0, so NaN is active
//
//   x (d_model,), w_up (d_ff, d_model) in format W_UP, both 16-byte aligned
//   x1 (d_ff,), every element written   bias (d_ff,) if UP_BIAS
//   launch   WARPS warps a block, one neuron a warp; grid ceil(d_ff / WARPS)
//   numerics float32 accumulation as in ffn_1, one rounding before the activation and one of x1

#include "activation.cuh"
#include "bias.cuh"
#include "elements.cuh"
#include "programmatic.cuh"
#include "row_dot.cuh"
#include "weights.cuh"

static_assert(TOKENS == 1, "one token so far");

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    ffn_12(const scalar* x, W_UP::Matrix w_up, scalar* __restrict__ x1, float threshold, int d_ff, int d_model,
           const scalar* bias) {
    wait_for_predecessor();
    const int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= D_FF(d_ff)) return;

    const int chunks = D_MODEL(d_model) / VEC;
    float dots[1];
    row_dot<W_UP>(W_UP::row(w_up, row, chunks), chunks_of(x), chunks, dots);
    const float g = to_float(from_float(biased<UP_BIAS>(dots[0], bias, row)));
    let_successor_in();
    if (threadIdx.x % 32 == 0) x1[row] = from_float(is_active(g, threshold) ? activate(g) : 0.0f);
}
