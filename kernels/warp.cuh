// warp: what the lanes of a warp do together.

constexpr unsigned ALL_LANES = 0xffffffffu;

// The sum over the warp, in every lane; the tree is fixed, so the bits are.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}
