// ffn_23: (FAT)ReLU of the gate times the up-projection (formulas 2 and 3); rows of inactive neurons are not read.
//
//   x1[j] = active(gate[j]) ? gate[j] * dot(x, w_up[j, :]) : +0        0 <= j < d_ff
//   active(g) = not (g < threshold) and g != 0                         so NaN is active
//
//   gate (d_ff,)   x (d_model,) and w_up (d_ff, d_model) row-major, both 16-byte aligned   x1 (d_ff,), every element written
//   launch   WARPS warps and ROWS rows a block (at most 32); grid ceil(d_ff / ROWS). Where both are the same, a warp has one row; where
//            there are more rows, the active ones go round the warps. Blocks without an active row are gone at once, so the GPU's own
//            block scheduler balances any mask
//   numerics float32 accumulation and product, one rounding at the store; the gate is compared as float32, threshold >= +0

#include "common.cuh"
#include "row_dot.cuh"

#ifndef ROWS
#error "define ROWS"
#endif
static_assert(WARPS <= ROWS && ROWS <= 32, "a warp has a row, and a lane a gate");

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
ffn_23(const scalar* gate, const scalar* x, const scalar* __restrict__ w_up,
       scalar* __restrict__ x1, float threshold, int d_ff, int d_model) {
    wait_for_predecessor();
    const int chunks = D_MODEL(d_model) / VEC;

#if ROWS == WARPS
    const int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= D_FF(d_ff)) return;

    const float s = to_float(gate[row]);
    float product = 0.0f;
    if (is_active(s, threshold)) {
        const uint4* weights = reinterpret_cast<const uint4*>(w_up) + (long long)row * chunks;
        product = s * row_dot(weights, reinterpret_cast<const uint4*>(x), chunks);
    }
    if (threadIdx.x % 32 == 0) x1[row] = from_float(product);
#else
    // Every warp looks at the gates of all rows, a lane at one; the n-th active row is that of warp n % WARPS.
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = blockIdx.x * ROWS;
    const bool exists = lane < ROWS && first + lane < D_FF(d_ff);
    const float gates = exists ? to_float(gate[first + lane]) : 0.0f;
    const bool active = is_active(gates, threshold);
    const int n = __popc(__ballot_sync(ALL_LANES, active) & ((1u << lane) - 1));
    unsigned mine = __ballot_sync(ALL_LANES, active && n % WARPS == warp);
    if (exists && !active && warp == WARPS - 1) x1[first + lane] = from_float(0.0f);
    for (; mine != 0; mine &= mine - 1) {
        const int i = __ffs(mine) - 1, row = first + i;
        const float s = __shfl_sync(ALL_LANES, gates, i);
        const uint4* weights = reinterpret_cast<const uint4*>(w_up) + (long long)row * chunks;
        const float product = s * row_dot(weights, reinterpret_cast<const uint4*>(x), chunks);
        if (lane == 0) x1[row] = from_float(product);
    }
#endif
}
