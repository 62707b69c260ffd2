// ffn_23: the activation of the gate times the up-projection (formulas 2 and 3); rows of neurons that are
// inactive for every token are not read.
//
//   x1[t, j] = active(gate[t, j]) ? combine(gate[t, j], dot(x[t, :], w_up[j, :]) + bias[j]) : +0     0 <= t < TOKENS, 0 <= j < d_ff
//   combine(g, up) is g * up for ReLU, see activation.cuh; active(g) = not (g < threshold) and g != 0, so NaN is active
//
//   gate (TOKENS, d_ff)   x (TOKENS, d_model) and w_up (d_ff, d_model) in format W_UP, both 16-byte aligned
//   x1 (TOKENS, d_ff), every element written   bias (d_ff,) if UP_BIAS
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

constexpr int EARLY = LOADS <= 8 ? 2 : 0;  // chunks of x that a lane fetches with the weights: registers are few

// The element of a token and a row.
template <class T>
__device__ __forceinline__ T& element_of(T* vectors, int token, int row, int rows) {
    return vectors[TOKENS == 1 ? row : (long long)token * rows + row];
}

// Writes x1 of a row from its dot products, which lie as row_dots leaves them, where lane l has the gate of token l % PLACES.
__device__ __forceinline__ void write_active(scalar* x1, float s, float dot, unsigned tokens, int row, int rows,
                                             const scalar* bias) {
    const int lane = threadIdx.x % 32;
    if (lane < TOKENS && tokens >> lane & 1)
        element_of(x1, lane, row, rows) = from_float(combine(s, biased<UP_BIAS>(dot, bias, row)));
}

#ifndef ROWS

static_assert(TOKENS == 1 || WARPS == 2, "warps that share a row end together");

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    ffn_23(const scalar* gate, const scalar* x, W_UP::Matrix w_up, scalar* __restrict__ x1, float threshold, int d_ff,
           int d_model, const scalar* bias) {
    wait_for_predecessor();
    const int rows = D_FF(d_ff), row = (blockIdx.x * WARPS + threadIdx.x / 32) / SHARING, lane = threadIdx.x % 32;
    if (row >= rows) return;

    const int token = lane % PLACES;
    const float s = token < TOKENS ? to_float(element_of(gate, token, row, rows)) : 0.0f;
    const unsigned tokens = __ballot_sync(ALL_LANES, is_active(s, threshold)) & ALL_TOKENS;
    const bool writes = threadIdx.x % (32 * SHARING) < TOKENS;
    if (tokens != ALL_TOKENS && writes && !(tokens >> lane & 1)) element_of(x1, lane, row, rows) = from_float(0.0f);
    if (tokens == 0) return;
    const int chunks = D_MODEL(d_model) / VEC;
    const float dot = row_dots<W_UP, EARLY>({W_UP::row(w_up, row, chunks)}, chunks_of(x), chunks, tokens);
    if (TOKENS == 1 || writes) write_active(x1, s, dot, tokens, row, rows, bias);
}

#else

static_assert(WARPS % 2 == 0 && ROWS <= 32, "warps come in pairs, and a lane has a row");

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    ffn_23(const scalar* gate, const scalar* x, W_UP::Matrix w_up, scalar* __restrict__ x1, float threshold, int d_ff,
           int d_model, const scalar* bias) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = blockIdx.x * ROWS;
    const int rows = D_FF(d_ff), chunks = D_MODEL(d_model) / VEC;

    // Every warp looks at the gates of all rows, a lane at those of one, so that all know which rows are active for which tokens.
    wait_for_predecessor();
    const bool in_block = lane < ROWS && first + lane < rows;
    float gates[TOKENS];
    unsigned mine = 0;  // tokens for which the lane's row is active
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        gates[t] = in_block ? to_float(element_of(gate, t, first + lane, rows)) : 0.0f;
        mine |= (unsigned)is_active(gates[t], threshold) << t;
    }
    const unsigned active = __ballot_sync(ALL_LANES, mine != 0);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t)
        if (in_block && !(mine >> t & 1) && warp == WARPS - 1) element_of(x1, t, first + lane, rows) = from_float(0.0f);
    if (active == 0) return;

    unsigned in_use = mine;  // tokens for which any row is active
    if constexpr (TOKENS > 1) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) in_use |= __shfl_xor_sync(ALL_LANES, in_use, step);
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t)
        if (TOKENS == 1 || in_use >> t & 1) fetch_into_l1<32 * WARPS>(x + t * D_MODEL(d_model), D_MODEL(d_model));

    const int n = __popc(active & ((1u << lane) - 1));  // active rows before the lane's own
#if TOKENS == 1
    if (__popc(active) > WARPS / 2) {
        // The n-th active row is that of warp n % WARPS, and the only one where there are no more rows than warps.
        unsigned own = __ballot_sync(ALL_LANES, mine != 0 && n % WARPS == warp);
        for (; own != 0; own = ROWS > WARPS ? own & (own - 1) : 0) {
            const int i = __ffs(own) - 1, row = first + i;
            const float s = __shfl_sync(ALL_LANES, gates[0], i);
            const float dot = row_dots<W_UP, EARLY>({W_UP::row(w_up, row, chunks)}, chunks_of(x), chunks);
            write_active(x1, s, dot, 1, row, rows, bias);
        }
        end_fetch();
        return;
    }

    // The n-th active row is that of warps 2 n and 2 n + 1, half of it each.
    __shared__ float even[WARPS / 2][32];
    const unsigned own = __ballot_sync(ALL_LANES, mine != 0 && n == warp / 2);
    const int i = own != 0 ? __ffs(own) - 1 : 0, row = first + i, half = warp % 2;
    const float s = __shfl_sync(ALL_LANES, gates[0], i);
    float sum[1] = {};
    if (own != 0) half_rows<W_UP, EARLY>({W_UP::row(w_up, row, chunks)}, chunks_of(x), half, chunks, 1, sum);
    if (half == 0) even[warp / 2][lane] = sum[0];
    end_fetch();
    __syncthreads();
    if (own == 0 || half == 0) return;
    write_active(x1, s, warp_sum(even[warp / 2][lane] + sum[0]), 1, row, rows, bias);
#else
    // The n-th active row is that of a pair of warps, half of it each.
#pragma unroll 1
    for (int begin = 0; begin < __popc(active); begin += WARPS / 2) {
        const unsigned own = __ballot_sync(ALL_LANES, mine != 0 && n == begin + warp / 2);
        const int i = own != 0 ? __ffs(own) - 1 : 0, row = first + i;
        const unsigned tokens = __shfl_sync(ALL_LANES, mine, i);
        const float s = lane < TOKENS ? to_float(element_of(gate, lane, row, rows)) : 0.0f;
        float sums[PLACES] = {};
        if (own != 0) half_rows<W_UP, EARLY>({W_UP::row(w_up, row, chunks)}, chunks_of(x), warp % 2, chunks, tokens, sums);
        if (begin == 0) end_fetch();
        add_other_half(sums);
        if (own != 0 && warp % 2 == 1) write_active(x1, s, warp_sums(sums), tokens, row, rows, bias);
    }
#endif
}

#endif
