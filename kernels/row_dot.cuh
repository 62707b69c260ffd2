// row_dot: dot(row, x) by one warp, or half of it by each of two, for the operators that read whole rows.
//
//   LOADS   chunks that a lane has in flight. A row is 8 to 10 KB: read in one or two batches, it takes one or two trips to
//           memory.
//
// Even and odd loads accumulate separately, and of those even and odd elements. This shortens the chain of dependent additions,
// lets two warps split a row, and makes the rounding independent of the launch shape.

#include "elements.cuh"
#include "warp.cuh"
#include "weights.cuh"

#ifndef LOADS
#error "define LOADS"
#endif
#ifdef COL_OPT
static_assert(LOADS % 2 == 0 || COL_OPT / VEC <= 32 * LOADS, "even loads are even in every batch");
#else
static_assert(LOADS % 2 == 0, "even loads are even in every batch");
#endif

// A lane's sums for one token.
struct Sums {
    float even[2], odd[2];
};

// Whether the row has chunk c of a batch of every STEP-th load that starts inside it. No check is left if rows are whole
// batches.
template <int STEP>
__device__ __forceinline__ bool exists(int c, int chunks) {
#ifdef COL_OPT
    if (COL_OPT / VEC % (32 * STEP * LOADS) == 0) return true;
#endif
    return c < chunks;
}

// Adds the products of a batch of every STEP-th load, from chunk `first` of the row on. So many chunks of x are fetched EARLY:
// behind the branch for escapes, the compiler would leave all loads of x until the weights have come.
template <class Format, int STEP, int EARLY>
__device__ __forceinline__ void add_batch(Sums (&sums)[TOKENS], const typename Format::Row& row, const uint4* x, int first,
                                          int chunks) {
    const int own = first + threadIdx.x % 32;
    const typename Format::Row mine = row.from(own);
    x += own;
    typename Format::Chunk w[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
        w[i] = exists<STEP>(own + 32 * STEP * i, stored<Format>(chunks)) ? mine.load(32 * STEP * i) : typename Format::Chunk{};
    constexpr int KEPT = Format::HAS_ESCAPES ? (EARLY < LOADS ? EARLY : LOADS) : 0;
    uint4 early[KEPT + 1];
#pragma unroll
    for (int i = 0; i < KEPT; ++i)
        if (exists<STEP>(own + 32 * STEP * i, chunks)) early[i] = x[32 * STEP * i];
    // Keep all loads ahead of the first use; without this barrier NVRTC interleaves them.
    __syncwarp();
    typename Format::Words words[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) words[i] = mine.words(w[i]);
    for_each_chunk<Format>(words, mine.code, [&](int i, const uint4& weights) {
        if (!exists<STEP>(own + 32 * STEP * i, chunks)) return;
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            const uint4 v = t == 0 && i < KEPT ? early[i] : x[t * chunks + 32 * STEP * i];
            float (&sum)[2] = STEP == 2 || i % 2 == 0 ? sums[t].even : sums[t].odd;
#pragma unroll
            for (int e = 0; e < VEC; ++e) sum[e % 2] = fmaf(element(weights, e), element(v, e), sum[e % 2]);
        }
    });
}

// The dot products of a row with every token's x, `chunks` vectors each, in every lane.
template <class Format, int EARLY = LOADS>
__device__ __forceinline__ void row_dot(const typename Format::Row& row, const uint4* x, int chunks, float (&dots)[TOKENS]) {
    Sums sums[TOKENS] = {};
#pragma unroll 1
    for (int first = 0; first < chunks; first += 32 * LOADS) add_batch<Format, 1, EARLY>(sums, row, x, first, chunks);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t)
        dots[t] = warp_sum((sums[t].even[0] + sums[t].even[1]) + (sums[t].odd[0] + sums[t].odd[1]));
}

// The lane's sum for one token over its even (half 0) or odd (half 1) loads: warp_sum of both added is row_dot, to the bit.
template <class Format, int EARLY = LOADS>
__device__ __forceinline__ float half_row(const typename Format::Row& row, const uint4* x, int half, int chunks) {
    Sums sums[TOKENS] = {};
#pragma unroll 1
    for (int first = 32 * half; first < chunks; first += 64 * LOADS) add_batch<Format, 2, EARLY>(sums, row, x, first, chunks);
    return sums[0].even[0] + sums[0].even[1];
}
