// ffn_23: (FAT)ReLU of the gate times the up-projection (formulas 2 and 3); rows of inactive neurons are not read.
//
//   x1[j] = active(gate[j]) ? gate[j] * dot(x, w_up[j, :]) : +0        0 <= j < d_ff
//   active(g) = not (g < threshold) and g != 0                         so NaN is active
//
//   gate (d_ff,)   x (d_model,) and w_up (d_ff, d_model) row-major, both 16-byte aligned   x1 (d_ff,), every element written
//   launch   WARPS warps a block, one row a warp; grid ceil(d_ff / WARPS). Blocks without an active row are gone at once, so the GPU's
//            own block scheduler balances any mask
//   numerics float32 accumulation and product, one rounding at the store; the gate is compared as float32, threshold >= +0

#include "common.cuh"
#include "row_dot.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
ffn_23(const scalar* gate, const scalar* x, const scalar* __restrict__ w_up,
       scalar* __restrict__ x1, float threshold, int d_ff, int d_model) {
    wait_for_predecessor();
    const int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= D_FF(d_ff)) return;

    const float s = to_float(gate[row]);
    float product = 0.0f;
    if (is_active(s, threshold)) {
        const int chunks = D_MODEL(d_model) / VEC;
        const uint4* weights = reinterpret_cast<const uint4*>(w_up) + (long long)row * chunks;
        product = s * row_dot(weights, reinterpret_cast<const uint4*>(x), chunks);
    }
    if (threadIdx.x % 32 == 0) x1[row] = from_float(product);
}
