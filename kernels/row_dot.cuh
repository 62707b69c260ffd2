// dot(row, x) by one warp, or half of it by each of two, for the operators that read whole rows.
//
//   LOADS   16-byte loads that a lane has in flight. One row is 8 to 10 KB: in one or two batches of loads its time is one or two trips
//           to memory.
//
// A lane sums its even and its odd loads apart, and of those even and odd elements: so its additions do not all wait for each other, two
// warps can have half of a row each, and the order of a sum, so its bits, depends on nothing of the launch.

#ifndef LOADS
#error "define LOADS"
#endif
#ifdef COL_OPT
static_assert(LOADS % 2 == 0 || COL_OPT / VEC <= 32 * LOADS, "even loads are even in every batch");
#else
static_assert(LOADS % 2 == 0, "even loads are even in every batch");
#endif

// Whether the row has vector c of a batch of every STEP-th load that starts inside it. No check is left where rows are whole batches.
template <int STEP>
__device__ __forceinline__ bool exists(int c, int chunks) {
#ifdef COL_OPT
    if (COL_OPT / VEC % (32 * STEP * LOADS) == 0) return true;
#endif
    return c < chunks;
}

// Adds the products of a batch of every STEP-th load, from vector `first` of the row on.
template <int STEP>
__device__ __forceinline__ void add_batch(float (&even)[2], float (&odd)[2], const uint4* __restrict__ row, const uint4* x, int first,
                                          int chunks) {
    const int own = first + threadIdx.x % 32;
    row += own;
    x += own;
    uint4 w[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
        w[i] = exists<STEP>(own + 32 * STEP * i, chunks) ? load_once(row + 32 * STEP * i) : uint4{0, 0, 0, 0};
    // Or the compiler would start on the first vectors before it has asked for the last: ffn_23, 7B, 89 %, H100: 6.1 µs, not 5.6.
    __syncwarp();
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        if (!exists<STEP>(own + 32 * STEP * i, chunks)) break;
        const uint4 v = x[32 * STEP * i];
        float(&sums)[2] = STEP == 2 || i % 2 == 0 ? even : odd;
#pragma unroll
        for (int e = 0; e < VEC; ++e) sums[e % 2] = fmaf(element(w[i], e), element(v, e), sums[e % 2]);
    }
}

// row, x: `chunks` vectors each. The result is in every lane.
__device__ __forceinline__ float row_dot(const uint4* __restrict__ row, const uint4* x, int chunks) {
    float even[2] = {}, odd[2] = {};
#pragma unroll 1
    for (int first = 0; first < chunks; first += 32 * LOADS) add_batch<1>(even, odd, row, x, first, chunks);
    return warp_sum((even[0] + even[1]) + (odd[0] + odd[1]));
}

// The lane's sum over its even (half 0) or odd (half 1) loads: warp_sum of both added is row_dot, to the bit.
__device__ __forceinline__ float half_row(const uint4* __restrict__ row, const uint4* x, int half, int chunks) {
    float sums[2] = {};
#pragma unroll 1
    for (int first = 32 * half; first < chunks; first += 64 * LOADS) add_batch<2>(sums, sums, row, x, first, chunks);
    return sums[0] + sums[1];
}
