// ffn_23: (FAT)ReLU of the gate times the up-projection (formulas 2 and 3); rows of inactive neurons are not read.
//
//   x1[j] = active(gate[j]) ? gate[j] * dot(x, w_up[j, :]) : +0        0 <= j < d_ff
//   active(g) = not (g < threshold) and g != 0                         so NaN is active
//
//   gate (d_ff,), x (d_model,) and w_up (d_ff, d_model) row-major, all 16-byte aligned   x1 (d_ff,), every element written
//   launch   WARPS warps a block, one wave of blocks, a multiple of SETS. Block b lists the active rows of set b % SETS, as the other
//            blocks of that set do, and they take turns at them, a row a warp: any mask loads all SMs alike
//   numerics float32 accumulation and product, one rounding at the store; the gate is compared as float32, threshold >= +0. A row
//            is one warp's, so the bits do not depend on the grid

#include "common.cuh"
#include "active_rows.cuh"
#include "row_dot.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
ffn_23(const scalar* __restrict__ gate, const scalar* __restrict__ x, const scalar* __restrict__ w_up,
       scalar* __restrict__ x1, float threshold, int d_ff, int d_model) {
    __shared__ unsigned short list[TILE_ROWS];
    __shared__ int warp_counts[WARPS];

    const int rows = D_FF(d_ff), chunks = D_MODEL(d_model) / VEC, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int set = blockIdx.x % SETS, member = blockIdx.x / SETS, members = gridDim.x / SETS;
    let_next_start();
    wait_for_previous();
    for (int tile = 0; tile < (rows + VEC - 1) / VEC; tile += SETS * TILE_VECTORS) {
        const unsigned bits =
            active_bits(gate, rows, tile, set, [=](scalar g) { return is_active(to_float(g), threshold); });
        // Zeros, early, so that they are on their way while rows are read; a set's vectors are dealt to its blocks.
#pragma unroll
        for (int k = 0; k < EACH; ++k) {
            const int i = k * THREADS + threadIdx.x, row = first_row(tile, set, i);
            if (row >= rows || i % members != member) continue;
#pragma unroll
            for (int e = 0; e < VEC; ++e)
                if (row + e < rows && !(bits >> (k * VEC + e) & 1)) x1[row + e] = 0;
        }
        const int active = list_rows(bits, list, warp_counts);
        for (int i = member + warp * members; i < active; i += WARPS * members) {
            const int row = row_of(tile, set, list[i]);
            const uint4* weights = reinterpret_cast<const uint4*>(w_up) + (long long)row * chunks;
            const float product = to_float(gate[row]) * row_dot(weights, reinterpret_cast<const uint4*>(x), chunks);
            if (lane == 0) x1[row] = from_float(product);
        }
    }
}
