// ffn_23: the activation of the gate times the up-projection (formulas 2 and 3); rows of inactive neurons are not read.
//
//   x1[j] = active(gate[j]) ? combine(gate[j], dot(x, w_up[j, :]) + bias[j]) : +0        0 <= j < d_ff
//   combine(g, up) is g * up for ReLU, see activation.cuh; active(g) = not (g < threshold) and g != 0, so NaN is active
//
//   gate (d_ff,)   x (d_model,) and w_up (d_ff, d_model) in format W_UP, both 16-byte aligned
//   x1 (d_ff,), every element written   bias (d_ff,) if UP_BIAS
//   launch   WARPS warps a block. Without ROWS a row a warp, grid ceil(d_ff / WARPS). With it the warps of a block share the
//            active ones of its ROWS rows (at most 32), and where these are few a row has two warps; grid ceil(d_ff / ROWS).
//            Blocks without an active row are gone at once, so the GPU's own block scheduler balances any mask
//   numerics float32 accumulation and product, one rounding at the store; the gate is compared as float32, threshold >= +0

#include "activation.cuh"
#include "bias.cuh"
#include "elements.cuh"
#include "programmatic.cuh"
#include "row_dot.cuh"
#include "weights.cuh"

static_assert(TOKENS == 1, "one token so far");

constexpr int EARLY = LOADS <= 8 ? 2 : 0;  // chunks of x that a lane fetches with the weights: registers are few

#ifndef ROWS

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    ffn_23(const scalar* gate, const scalar* x, W_UP::Matrix w_up, scalar* __restrict__ x1, float threshold, int d_ff,
           int d_model, const scalar* bias) {
    wait_for_predecessor();
    const int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= D_FF(d_ff)) return;

    const float s = to_float(gate[row]);
    float product = 0.0f;
    if (is_active(s, threshold)) {
        const int chunks = D_MODEL(d_model) / VEC;
        float dots[1];
        row_dot<W_UP, EARLY>(W_UP::row(w_up, row, chunks), chunks_of(x), chunks, dots);
        product = combine(s, biased<UP_BIAS>(dots[0], bias, row));
    }
    if (threadIdx.x % 32 == 0) x1[row] = from_float(product);
}

#else

static_assert(WARPS % 2 == 0 && ROWS <= 32, "warps come in pairs, and a lane has a gate");

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    ffn_23(const scalar* gate, const scalar* x, W_UP::Matrix w_up, scalar* __restrict__ x1, float threshold, int d_ff,
           int d_model, const scalar* bias) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = blockIdx.x * ROWS;
    const int chunks = D_MODEL(d_model) / VEC;

    // Every warp looks at the gates of all rows, a lane at one, so that all know which rows are active.
    wait_for_predecessor();
    const bool in_block = lane < ROWS && first + lane < D_FF(d_ff);
    const float gates = in_block ? to_float(gate[first + lane]) : 0.0f;
    const bool active = is_active(gates, threshold);
    const unsigned rows = __ballot_sync(ALL_LANES, active);
    if (in_block && !active && warp == WARPS - 1) x1[first + lane] = from_float(0.0f);
    if (rows == 0) return;

    fetch_into_l1<32 * WARPS>(x, D_MODEL(d_model));
    const int n = __popc(rows & ((1u << lane) - 1));  // active rows before the lane's own
    if (__popc(rows) > WARPS / 2) {
        // The n-th active row is that of warp n % WARPS, and the only one where there are no more rows than warps.
        unsigned mine = __ballot_sync(ALL_LANES, active && n % WARPS == warp);
        for (; mine != 0; mine = ROWS > WARPS ? mine & (mine - 1) : 0) {
            const int i = __ffs(mine) - 1, row = first + i;
            const float s = __shfl_sync(ALL_LANES, gates, i);
            float dots[1];
            row_dot<W_UP, EARLY>(W_UP::row(w_up, row, chunks), chunks_of(x), chunks, dots);
            if (lane == 0) x1[row] = from_float(combine(s, biased<UP_BIAS>(dots[0], bias, row)));
        }
        end_fetch();
        return;
    }

    // The n-th active row is that of warps 2 n and 2 n + 1, half of it each.
    __shared__ float even[WARPS / 2][32];
    const unsigned mine = __ballot_sync(ALL_LANES, active && n == warp / 2);
    const int i = mine != 0 ? __ffs(mine) - 1 : 0, row = first + i, half = warp % 2;
    const float s = __shfl_sync(ALL_LANES, gates, i);
    const float sum = mine != 0 ? half_row<W_UP, EARLY>(W_UP::row(w_up, row, chunks), chunks_of(x), half, chunks) : 0.0f;
    if (half == 0) even[warp / 2][lane] = sum;
    end_fetch();
    __syncthreads();
    if (mine == 0 || half == 0) return;
    const float up = biased<UP_BIAS>(warp_sum(even[warp / 2][lane] + sum), bias, row);
    if (lane == 0) x1[row] = from_float(combine(s, up));
}

#endif
