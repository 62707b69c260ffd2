// ffn_123: ffn_1 and ffn_23 in one launch (formulas 1 to 3): a warp whose gate turns out active goes on to up_proj's row.
//
//   g     = dot(x, w_gate[j, :]) + gate_bias[j], rounded
//   x1[j] = active(g) ? combine(g, dot(x, w_up[j, :]) + up_bias[j]) : +0        0 <= j < d_ff
//   combine(g, up) is g * up for ReLU, see activation.cuh; active(g) = not (g < threshold) and g != 0, so NaN is active
//
//   x (d_model,), w_gate and w_up (d_ff, d_model) in formats W_GATE and W_UP, all 16-byte aligned
//   x1 (d_ff,), every element written   gate_bias and up_bias (d_ff,) if GATE_BIAS and UP_BIAS
//   launch   WARPS warps a block, one neuron a warp; grid ceil(d_ff / WARPS)
//   numerics as ffn_1 followed by ffn_23, to the bit: float32 accumulation, one rounding of the gate and one of x1

#include "activation.cuh"
#include "bias.cuh"
#include "elements.cuh"
#include "programmatic.cuh"
#include "row_dot.cuh"
#include "weights.cuh"

static_assert(TOKENS == 1, "one token so far");

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    ffn_123(const scalar* x, W_GATE::Matrix w_gate, W_UP::Matrix w_up, scalar* __restrict__ x1, float threshold, int d_ff,
            int d_model, const scalar* gate_bias, const scalar* up_bias) {
    wait_for_predecessor();
    const int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= D_FF(d_ff)) return;

    const int chunks = D_MODEL(d_model) / VEC;
    float dots[1], product = 0.0f;
    row_dot<W_GATE>(W_GATE::row(w_gate, row, chunks), chunks_of(x), chunks, dots);
    const float gate = to_float(from_float(biased<GATE_BIAS>(dots[0], gate_bias, row)));
    if (is_active(gate, threshold)) {
        row_dot<W_UP>(W_UP::row(w_up, row, chunks), chunks_of(x), chunks, dots);
        product = combine(gate, biased<UP_BIAS>(dots[0], up_bias, row));
    }
    let_successor_in();
    if (threadIdx.x % 32 == 0) x1[row] = from_float(product);
}
