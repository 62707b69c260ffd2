// ffn_12: up-projection, bias and activation in one launch: the first half of an FFN without a gate (formulas 1 and 2).
//
//   g        = dot(x[t, :], w_up[j, :]) + bias[j], rounded
//   x1[t, j] = active(g) ? activate(g) : +0                            0 <= t < TOKENS, 0 <= j < d_ff
//   activate(g) is g for ReLU, see activation.cuh; active(g) = not (g < threshold) and g != 0, so NaN is active
//
//   x (TOKENS, d_model), w_up (d_ff, d_model) in format W_UP, both 16-byte aligned
//   x1 (TOKENS, d_ff), every element written   bias (d_ff,) if UP_BIAS
//   launch   WARPS warps a block, ABREAST neurons a warp, or two warps with several tokens; grid ceil(d_ff / (that of a block))
//            EARLY_SUCCESSOR: the next launch, which is ffn_4, may start with the first warps that are done: ffn_4 waits before
//            it writes, so what other warps still read is safe
//   numerics float32 accumulation as in ffn_1, one rounding before the activation and one of x1

#include "activation.cuh"
#include "bias.cuh"
#include "elements.cuh"
#include "programmatic.cuh"
#include "row_dot.cuh"
#include "weights.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    ffn_12(const scalar* x, W_UP::Matrix w_up, scalar* __restrict__ x1, float threshold, int d_ff, int d_model,
           const scalar* bias) {
    wait_for_predecessor();
    const int rows = D_FF(d_ff), first = (blockIdx.x * WARPS + threadIdx.x / 32) / SHARING * ABREAST;
    if (first >= rows) return;

    const int chunks = D_MODEL(d_model) / VEC;
    const float dot = row_dots<W_UP>(rows_from<W_UP, ABREAST>(w_up, first, rows, chunks).at, chunks_of(x), chunks);
    const Place place = place_of<ABREAST>(first, rows);
    const float g = to_float(from_float(biased<UP_BIAS>(dot, bias, place.row)));
#ifdef EARLY_SUCCESSOR
    let_successor_in();
#endif
    if (place.exists && threadIdx.x / 32 % SHARING == 0)
        x1[(long long)place.token * rows + place.row] = from_float(is_active(g, threshold) ? activate(g) : 0.0f);
}
