// activation: formula 2, the one place in the kernels that knows it.
//
//   ACTIVATION_RELU    x1 = g * up                                           ReLU, and FATReLU with a threshold above zero
//   ACTIVATION_RELU2   x1 = g^2 * up                                         squared ReLU
//   ACTIVATION_DRELU   x1 = up > 0 ? g * up : +0                             dReLU (arXiv 2406.05955): both projections are rectified
//
//   all of an active neuron, whose g is not below the threshold and not zero; x1 is +0 of any other. NaN is active. Without a
//   gate up is 1. threshold >= +0; it moves the gate's activation alone (arXiv 2402.13516, activation threshold shifting)

#if defined(ACTIVATION_RELU) + defined(ACTIVATION_RELU2) + defined(ACTIVATION_DRELU) != 1
#error "define exactly one of ACTIVATION_RELU, ACTIVATION_RELU2, ACTIVATION_DRELU"
#endif

// Decided on the bits: -ftz=true, which CuPy always passes, would make a comparison of floats flush subnormal gates. For
// threshold >= +0 the bits of positive floats order as the floats do.
__device__ __forceinline__ bool is_active(float gate, float threshold) {
    const unsigned bits = __float_as_uint(gate);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return nan | (((int)bits > 0) & (bits >= __float_as_uint(threshold)));
}

// s of an active gate.
__device__ __forceinline__ float activate(float gate) {
#ifdef ACTIVATION_RELU2
    return gate * gate;
#else
    return gate;
#endif
}

// x1 of an active gate and its up-projection, before it is rounded.
__device__ __forceinline__ float combine(float gate, float up) {
#ifdef ACTIVATION_DRELU
    if (!is_active(up, 0.0f)) return 0.0f;
#endif
    return activate(gate) * up;
}
