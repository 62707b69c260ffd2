// ffn_4: the down-projection (formula 4); weights of inactive inputs are not read.
//
//   y[c] = sum over the j with x1[j] != 0 of x1[j] * w_down_t[j, c]        0 <= c < d_model
//
//   x1 (d_ff,)   w_down_t (d_ff, d_model) row-major, 16-byte aligned   y (d_model,), every element written
//   launch   WARPS warps a block; a block owns LANES * 16 bytes of every row, so all blocks do the same work whatever the mask, and no
//            sum crosses blocks; grid ceil(d_model / (LANES * VEC))
//   numerics float32 accumulation in an order that only the mask and the launch shape decide, one rounding at the store

#include "common.cuh"

#if !defined(LANES) || !defined(LOADS)
#error "define LANES and LOADS"
#endif

constexpr int THREADS = 32 * WARPS;
constexpr int GROUPS = THREADS / LANES;  // groups of LANES lanes, each reading its own row
constexpr int SLICE = LANES * VEC;       // columns of a block
constexpr int EACH = WARPS > 16 ? 16 : 32;  // rows a thread lists at a time, one bit each
constexpr int TILE = EACH * THREADS;
static_assert(32 % LANES == 0, "a row segment must not straddle warps");
static_assert(TILE <= 65536, "the list holds 16-bit row numbers");

// Writes to `list` the rows of x1[0 : rows] that are not zero, in a fixed order, and returns how many there are. Its first barrier
// also keeps the next tile's list from overwriting one that is still read.
__device__ __forceinline__ int list_active(const scalar* __restrict__ x1, int rows, unsigned short* list, int* warp_counts) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned mine = 0;  // bit k: row threadIdx.x + k * THREADS is active
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int row = threadIdx.x + k * THREADS;
        if (row < rows && is_nonzero(x1[row])) mine |= 1u << k;
    }
    const int count = __popc(mine);
    int upto = count;  // inclusive sum of the counts over the warp's lanes
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int lower = __shfl_up_sync(ALL_LANES, upto, step);
        if (lane >= step) upto += lower;
    }
    if (lane == 31) warp_counts[warp] = upto;
    __syncthreads();

    int position = upto - count, total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        if (w < warp) position += warp_counts[w];
        total += warp_counts[w];
    }
    for (; mine != 0; mine &= mine - 1) list[position++] = threadIdx.x + (__ffs(mine) - 1) * THREADS;
    __syncthreads();
    return total;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
ffn_4(const scalar* __restrict__ x1, const scalar* __restrict__ w_down_t, scalar* __restrict__ y, int d_ff, int d_model) {
    __shared__ unsigned short list[TILE];
    __shared__ int warp_counts[WARPS];
    __shared__ float partial[WARPS][SLICE + 1];

    const int rows = D_FF(d_ff), chunks = D_MODEL(d_model) / VEC;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int chunk = blockIdx.x * LANES + threadIdx.x % LANES;
    const uint4* weights = reinterpret_cast<const uint4*>(w_down_t) + chunk;

    float sum[VEC] = {};
    for (int tile = 0; tile < rows; tile += TILE) {
        const int active = list_active(x1 + tile, min(rows - tile, TILE), list, warp_counts);
        for (int first = threadIdx.x / LANES; first < active; first += GROUPS * LOADS) {
            uint4 w[LOADS];
            float s[LOADS];
#pragma unroll
            for (int i = 0; i < LOADS; ++i) {
                const bool valid = first + i * GROUPS < active && chunk < chunks;
                const int row = tile + (valid ? list[first + i * GROUPS] : 0);
                w[i] = valid ? load_once(weights + (long long)row * chunks) : uint4{0, 0, 0, 0};
                s[i] = valid ? to_float(x1[row]) : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < LOADS; ++i)
#pragma unroll
                for (int e = 0; e < VEC; ++e) sum[e] = fmaf(s[i], element(w[i], e), sum[e]);
        }
    }

    // First over the warp's groups, then over the warps.
#pragma unroll
    for (int e = 0; e < VEC; ++e) {
#pragma unroll
        for (int step = LANES; step < 32; step *= 2) sum[e] += __shfl_xor_sync(ALL_LANES, sum[e], step);
        if (lane < LANES) partial[warp][lane * VEC + e] = sum[e];
    }
    __syncthreads();
    for (int column = warp; column < SLICE; column += WARPS) {
        const float total = warp_sum(lane < WARPS ? partial[lane][column] : 0.0f);
        const int c = blockIdx.x * SLICE + column;
        if (lane == 0 && c < D_MODEL(d_model)) y[c] = from_float(total);
    }
}
