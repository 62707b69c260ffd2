// warp: what the lanes of a warp do together.

constexpr unsigned ALL_LANES = 0xffffffffu;

// All threads of two neighbouring warps, the first of an even number, wait for one another, whatever the block's others do. A block has
// barriers for 30 warps.
__device__ __forceinline__ void sync_pair() { __barrier_sync_count(threadIdx.x / 64 + 1, 64); }

// Adds the lanes' values over those that differ in bits LEAST to 16 of their number, in a fixed tree. At each step a lane passes
// on half of the values that it still holds and adds to the other half. It ends with max(1, N * LEAST / 32) of them, from values[0]
// on: those from the returned index on.
template <int LEAST, int HELD, int STEP = 16, int N>
__device__ __forceinline__ int add_lanes(float (&values)[N]) {
    if constexpr (STEP < LEAST) {
        return 0;
    } else if constexpr (HELD == 1) {
        values[0] += __shfl_xor_sync(ALL_LANES, values[0], STEP);
        return add_lanes<LEAST, 1, STEP / 2>(values);
    } else {
        const bool upper = threadIdx.x & STEP;
#pragma unroll
        for (int e = 0; e < HELD / 2; ++e) {
            const float keep = upper ? values[e + HELD / 2] : values[e], pass = upper ? values[e] : values[e + HELD / 2];
            values[e] = keep + __shfl_xor_sync(ALL_LANES, pass, STEP);
        }
        return (upper ? HELD / 2 : 0) + add_lanes<LEAST, HELD / 2, STEP / 2>(values);
    }
}

// The sum over the warp, in every lane; the tree is fixed, so the bits are.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

// The warp_sum of values[l % N], to the bit, in lane l. N is a power of two, at most 32.
template <int N>
__device__ __forceinline__ float warp_sums(float (&values)[N]) {
    add_lanes<1, N>(values);
    return N == 1 ? values[0] : __shfl_sync(ALL_LANES, values[0], threadIdx.x % N * (32 / N));
}
