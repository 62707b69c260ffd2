// ffn_123: ffn_1 and ffn_23 in one launch (formulas 1 to 3): a warp whose gate turns out active, for any token, goes on
// to up_proj's row.
//
//   g        = dot(x[t, :], w_gate[j, :]) + gate_bias[j], rounded
//   x1[t, j] = active(g) ? combine(g, dot(x[t, :], w_up[j, :]) + up_bias[j]) : +0        0 <= t < TOKENS, 0 <= j < d_ff
//   combine(g, up) is g * up for ReLU, see activation.cuh; active(g) = not (g < threshold) and g != 0, so NaN is active
//
//   x (TOKENS, d_model), w_gate and w_up (d_ff, d_model) in formats W_GATE and W_UP, all 16-byte aligned
//   x1 (TOKENS, d_ff), every element written   gate_bias and up_bias (d_ff,) if GATE_BIAS and UP_BIAS
//   launch   WARPS warps a block, ABREAST neurons a warp, or two warps with several tokens; grid ceil(d_ff / (that of a block))
//            EARLY_SUCCESSOR: the next launch, which is ffn_4, may start with the first warps that are done: ffn_4 waits before
//            it writes, so what other warps still read is safe
//   numerics as ffn_1 followed by ffn_23, to the bit: float32 accumulation, one rounding of the gate and one of x1

#include "activation.cuh"
#include "bias.cuh"
#include "elements.cuh"
#include "programmatic.cuh"
#include "row_dot.cuh"
#include "weights.cuh"

static_assert(TOKENS == 1 || WARPS == 2, "warps that share rows go on to the same ones");

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    ffn_123(const scalar* x, W_GATE::Matrix w_gate, W_UP::Matrix w_up, scalar* __restrict__ x1, float threshold, int d_ff,
            int d_model, const scalar* gate_bias, const scalar* up_bias) {
    wait_for_predecessor();
    const int rows = D_FF(d_ff), first = (blockIdx.x * WARPS + threadIdx.x / 32) / SHARING * ABREAST;
    if (first >= rows) return;

    const int chunks = D_MODEL(d_model) / VEC;
    const float dot = row_dots<W_GATE>(rows_from<W_GATE, ABREAST>(w_gate, first, rows, chunks).at, chunks_of(x), chunks);
    const Place place = place_of<ABREAST>(first, rows);
    const float gate = to_float(from_float(biased<GATE_BIAS>(dot, gate_bias, place.row)));
    const unsigned active = __ballot_sync(ALL_LANES, place.exists && is_active(gate, threshold));
    float products[ABREAST];
#pragma unroll
    for (int r = 0; r < ABREAST; ++r) {
        const unsigned tokens = active >> r * PLACES & ALL_TOKENS;
        products[r] = 0.0f;
        if (tokens == 0) continue;
        const float up = row_dots<W_UP>({W_UP::row(w_up, first + r, chunks)}, chunks_of(x), chunks, tokens);
        const float g = ABREAST == 1 ? gate : __shfl_sync(ALL_LANES, gate, r * PLACES + threadIdx.x % PLACES);
        if (tokens >> threadIdx.x % PLACES & 1) products[r] = combine(g, biased<UP_BIAS>(up, up_bias, first + r));
    }
#ifdef EARLY_SUCCESSOR
    let_successor_in();
#endif
#pragma unroll
    for (int r = 0; r < ABREAST; ++r)
        if (threadIdx.x % (32 * SHARING) < TOKENS && first + r < rows)
            x1[(long long)(threadIdx.x % 32) * rows + first + r] = from_float(products[r]);
}
