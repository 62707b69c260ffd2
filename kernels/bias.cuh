// bias: what a projection adds to its sum before it is rounded.
//
//   GATE_BIAS, UP_BIAS, DOWN_BIAS   1 if the projection has one, else 0; without one the argument is not looked at

#include "elements.cuh"

template <int HAS_BIAS>
__device__ __forceinline__ float biased(float sum, const scalar* bias, int i) {
    if constexpr (HAS_BIAS) return sum + to_float(bias[i]);
    return sum;
}
