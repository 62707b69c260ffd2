// dot(row, x) by one warp, for the two operators that read whole rows.
//
//   LOADS   16-byte loads that a lane has in flight. One row is 8 to 10 KB: with all of its loads issued before the first use its
//           time is one trip to memory.

#ifndef LOADS
#error "define LOADS"
#endif

// row, x: `chunks` vectors each. The result is in every lane.
__device__ __forceinline__ float row_dot(const uint4* __restrict__ row, const uint4* __restrict__ x, int chunks) {
    const int lane = threadIdx.x % 32;
    float sum = 0.0f;
    for (int first = lane; first < chunks; first += 32 * LOADS) {
        uint4 w[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int c = first + 32 * i;
            w[i] = c < chunks ? load_once(row + c) : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int c = first + 32 * i;
            if (c >= chunks) break;
            const uint4 v = x[c];
#pragma unroll
            for (int e = 0; e < VEC; ++e) sum = fmaf(element(w[i], e), element(v, e), sum);
        }
    }
    return warp_sum(sum);
}
