// activation: formula 2, the one place in the kernels that knows it.
//
//   ACTIVATION_RELU   s = gate if active(gate) else +0        active(gate) = not (gate < threshold) and gate != 0, so NaN is
//                     active
//
//   threshold >= +0; a threshold above zero makes it FATReLU (arXiv 2402.13516)

#ifndef ACTIVATION_RELU
#error "define ACTIVATION_RELU"
#endif

// Decided on the bits: -ftz=true, which CuPy always passes, would make a comparison of floats flush subnormal gates. For
// threshold >= +0 the bits of positive floats order as the floats do.
__device__ __forceinline__ bool is_active(float gate, float threshold) {
    const unsigned bits = __float_as_uint(gate);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return nan | (((int)bits > 0) & (bits >= __float_as_uint(threshold)));
}

// s of an active gate.
__device__ __forceinline__ float activate(float gate) { return gate; }
