// pack_down: nn.Linear's down-projection weight into the layout of ffn_4, a transpose.
//
//   w_down_t[j, c] = w_down[c, j]        0 <= j < d_ff, 0 <= c < d_model
//
//   w_down (d_model, d_ff) and w_down_t (d_ff, d_model), both row-major; every element written
//   launch   block (32, WARPS); one 32 x 32 tile a block; grid (ceil(d_ff / 32), ceil(d_model / 32))

#include "elements.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    pack_down(const scalar* __restrict__ w_down, scalar* __restrict__ w_down_t, int d_ff, int d_model) {
    __shared__ scalar tile[32][33];  // 33: a column then lies in 32 different banks

    const int rows = D_FF(d_ff), columns = D_MODEL(d_model);
    const int j0 = blockIdx.x * 32, c0 = blockIdx.y * 32;
    for (int i = threadIdx.y; i < 32; i += WARPS)
        if (c0 + i < columns && j0 + threadIdx.x < rows)
            tile[i][threadIdx.x] = w_down[(long long)(c0 + i) * rows + j0 + threadIdx.x];
    __syncthreads();
    for (int i = threadIdx.y; i < 32; i += WARPS)
        if (j0 + i < rows && c0 + threadIdx.x < columns)
            w_down_t[(long long)(j0 + i) * columns + c0 + threadIdx.x] = tile[threadIdx.x][i];
}
