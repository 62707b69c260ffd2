// ffn_123_kept: ffn_123 of five to eight tokens, to the bit, by blocks that keep the tokens (formulas 1 to 3).
//
//   g        = dot(x[t, :], w_gate[j, :]) + gate_bias[j], rounded
//   x1[t, j] = active(g) ? combine(g, dot(x[t, :], w_up[j, :]) + up_bias[j]) : +0        0 <= t < TOKENS, 0 <= j < d_ff
//   combine(g, up) is g * up for ReLU, see activation.cuh; active(g) = not (g < threshold) and g != 0, so NaN is active
//
//   x (TOKENS, d_model), w_gate and w_up (d_ff, d_model), all 16-byte aligned
//   x1 (TOKENS, d_ff), every element written   gate_bias and up_bias (d_ff,) if GATE_BIAS and UP_BIAS
//   launch   as ffn_1_kept. A warp goes on to the up_proj rows of the neurons whose gates it ends with, while gate_proj's next rows are on
//            their way
//   numerics as ffn_1 followed by ffn_23, to the bit: float32 accumulation, one rounding of the gate and one of x1

#include "activation.cuh"
#include "bias.cuh"
#include "elements.cuh"
#include "kept.cuh"
#include "programmatic.cuh"

// A row, all of it on its way at once.
struct Row {
    uint4 even[STEPS], odd[STEPS];  // loads
};

__device__ __forceinline__ Row load_row(const scalar* weights, int row) {
    const uint4* at = chunks_of(weights) + (long long)row * CHUNKS + threadIdx.x % 32;
    Row found;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) found.even[i] = load_once(at + 64 * i), found.odd[i] = load_once(at + 64 * i + 32);
    return found;
}

// The lowest token of a set, or -1 if it is empty.
__device__ __forceinline__ int lowest(unsigned tokens) { return __ffs(tokens) - 1; }

// The dot products of a row with N tokens, for which each weight is made a float once: those of row_dots, to the bit.
template <int N>
__device__ __forceinline__ void dots(float* found, const Row& row, const Kept& kept, const int* tokens) {
    const int lane = threadIdx.x % 32;
    float even[N][2] = {}, odd[N][2] = {};  // of even loads and of odd ones, each of even and odd elements
    const auto add = [&](float (&sums)[N][2], const uint4& chunk, int c) {
#pragma unroll
        for (int p = 0; p < PLANES; ++p)
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float4 four = kept.tokens[tokens[i]][p][c];
                const float v[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[i][e % 2] = fmaf(element(chunk, 4 * p + e), v[e], sums[i][e % 2]);
            }
    };
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        add(even, row.even[i], lane + 64 * i);
        add(odd, row.odd[i], lane + 64 * i + 32);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) found[i] = warp_sum((even[i][0] + even[i][1]) + (odd[i][0] + odd[i][1]));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    ffn_123_kept(const scalar* x, const scalar* w_gate, const scalar* w_up, scalar* __restrict__ x1, float threshold, int, int,
                 const scalar* gate_bias, const scalar* up_bias) {
    wait_for_predecessor();
    const Kept& kept = *dynamic_shared<Kept>();
    const int lane = threadIdx.x % 32;
    for_each_group(kept, x, w_gate, [&](float dot, int row) {
        const Place place = place_of(row);
        const float gate = to_float(from_float(biased<GATE_BIAS>(dot, gate_bias, place.row)));
        const unsigned active = __ballot_sync(ALL_LANES, place.exists && is_active(gate, threshold));
        float product = 0.0f;
#pragma unroll 1
        for (int r = 0; r < ABREAST / 2; ++r) {
            unsigned tokens = active >> r * PLACES & ALL_TOKENS;
            if (tokens == 0) continue;
            const Row up = load_row(w_up, row + r);
#pragma unroll 1
            while (tokens != 0) {  // two at a time
                const int these[2] = {lowest(tokens), lowest(tokens & (tokens - 1))};
                float sums[2];
                if (these[1] < 0)
                    dots<1>(sums, up, kept, these);
                else
                    dots<2>(sums, up, kept, these);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (these[i] >= 0 && lane == r * PLACES + these[i])
                        product = combine(gate, biased<UP_BIAS>(sums[i], up_bias, row + r));
                    tokens &= tokens - 1;
                }
            }
        }
        if (place.exists) x1[(long long)place.token * ROW_OPT + place.row] = from_float(product);
    });
}
