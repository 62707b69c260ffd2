// ffn_4: the down-projection (formula 4); weights of inactive inputs are not read.
//
//   y[c] = sum over the j with x1[j] != 0 of x1[j] * w_down_t[j, c]        0 <= c < d_model
//
//   x1 (d_ff,) and w_down_t (d_ff, d_model) row-major, both 16-byte aligned   y (d_model,), every element written
//   launch   WARPS warps a block; a block owns LANES * 16 bytes of every row, so all blocks do the same work whatever the mask, and no
//            sum crosses blocks; grid ceil(d_model / (LANES * VEC))
//   numerics float32 accumulation in an order that only the mask and the launch shape decide, one rounding at the store

#include "common.cuh"
#include "active_rows.cuh"

#if !defined(LANES) || !defined(LOADS)
#error "define LANES and LOADS"
#endif

constexpr int GROUPS = THREADS / LANES;  // groups of LANES lanes, each reading its own row
constexpr int SLICE = LANES * VEC;       // columns of a block
static_assert(32 % LANES == 0, "a row segment must not straddle warps");
static_assert(SLICE <= THREADS, "a thread writes one column");
static_assert(SETS == 1, "a block lists every row");

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
ffn_4(const scalar* __restrict__ x1, const scalar* __restrict__ w_down_t, scalar* __restrict__ y, int d_ff, int d_model) {
    __shared__ unsigned short list[TILE_ROWS];
    __shared__ int warp_counts[WARPS];
    __shared__ float partial[WARPS][SLICE + 1];

    const int rows = D_FF(d_ff), columns = D_MODEL(d_model), chunks = columns / VEC;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int chunk = blockIdx.x * LANES + threadIdx.x % LANES;
    const uint4* weights = reinterpret_cast<const uint4*>(w_down_t) + chunk;

    float sum[VEC] = {};
    wait_for_previous();
    for (int tile = 0; tile < (rows + VEC - 1) / VEC; tile += TILE_VECTORS) {
        const int active = list_rows(active_bits(x1, rows, tile, 0, is_nonzero), list, warp_counts);
        for (int first = threadIdx.x / LANES; first < active; first += GROUPS * LOADS) {
            uint4 w[LOADS];
            float s[LOADS];
#pragma unroll
            for (int i = 0; i < LOADS; ++i) {
                const bool valid = first + i * GROUPS < active && chunk < chunks;
                const int row = valid ? row_of(tile, 0, list[first + i * GROUPS]) : 0;
                w[i] = valid ? load_once(weights + (long long)row * chunks) : uint4{0, 0, 0, 0};
                s[i] = valid ? to_float(x1[row]) : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < LOADS; ++i)
#pragma unroll
                for (int e = 0; e < VEC; ++e) sum[e] = fmaf(s[i], element(w[i], e), sum[e]);
        }
    }

    // Over the warp's groups: at each step a lane passes on half of the columns that it still holds and adds to the other half.
    int held = VEC, column = threadIdx.x % LANES * VEC;
#pragma unroll
    for (int step = 16; step >= LANES; step /= 2) {
        const bool upper = lane & step;
        if (held == 1) {
            sum[0] += __shfl_xor_sync(ALL_LANES, sum[0], step);
            continue;
        }
        held /= 2;
        if (upper) column += held;
#pragma unroll
        for (int e = 0; e < held; ++e) {
            const float keep = upper ? sum[e + held] : sum[e], pass = upper ? sum[e] : sum[e + held];
            sum[e] = keep + __shfl_xor_sync(ALL_LANES, pass, step);
        }
    }
#pragma unroll
    for (int e = 0; e < held; ++e) partial[warp][column + e] = sum[e];
    __syncthreads();

    // Over the warps.
    const int c = blockIdx.x * SLICE + threadIdx.x;
    if (threadIdx.x >= SLICE || c >= columns) return;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += partial[w][threadIdx.x];
    y[c] = from_float(total);
}
