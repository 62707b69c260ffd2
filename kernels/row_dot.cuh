// dot(row, x) by one warp, for the operators that read whole rows.
//
//   LOADS   16-byte loads that a lane has in flight. One row is 8 to 10 KB: in one or two batches of loads its time is one or two trips
//           to memory.

#ifndef LOADS
#error "define LOADS"
#endif

// Partial sums of a lane, so that its additions do not all wait for each other. ffn_23 at 7B, 99 %, H100: 3.9 µs with one, 3.75 with two
// or four. The order of a sum depends on this and on nothing of the launch.
constexpr int SUMS = 2;

// row, x: `chunks` vectors each. The result is in every lane.
__device__ __forceinline__ float row_dot(const uint4* __restrict__ row, const uint4* x, int chunks) {
    const int lane = threadIdx.x % 32;
    float sums[SUMS] = {};
#pragma unroll 1
    for (int first = 0; first < chunks; first += 32 * LOADS) {
        uint4 w[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int c = first + 32 * i + lane;
            w[i] = c < chunks ? load_once(row + c) : uint4{0, 0, 0, 0};
        }
        // Or the compiler would start on the first vectors before it has asked for the last: ffn_23, 7B, 89 %, H100: 6.1 µs, not 5.6.
        __syncwarp();
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int c = first + 32 * i + lane;
            if (c >= chunks) break;
            const uint4 v = x[c];
#pragma unroll
            for (int e = 0; e < VEC; ++e) sums[e % SUMS] = fmaf(element(w[i], e), element(v, e), sums[e % SUMS]);
        }
    }
    return warp_sum(sums[0] + sums[1]);
}
