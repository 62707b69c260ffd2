// weights: every format that weights may have, and what kernels do with the chunks of any. Kernels get the format as a define for
// each weight, such as W_UP=Plain.

#include "bf12.cuh"
#include "plain.cuh"
#include "warp.cuh"

// The chunks of a row as the format stores it.
template <class Format>
__device__ __forceinline__ int stored(int chunks) {
    return (chunks + Format::TOGETHER - 1) / Format::TOGETHER * Format::TOGETHER;
}

// Calls use(i, elements) for each of a lane's chunks. A warp that holds no escape, which is the rule, does not branch between
// them; for one that does, there is the same again with branches. All lanes of a warp call together.
template <class Format, int N, class Code, class Use>
__device__ __forceinline__ void for_each_chunk(const typename Format::Words (&words)[N], const Code& code, Use use) {
    if constexpr (Format::HAS_ESCAPES) {
        bool escaped = false;
#pragma unroll
        for (int i = 0; i < N; ++i) escaped |= words[i].escaped();
        if (__any_sync(ALL_LANES, escaped)) {
#pragma unroll
            for (int i = 0; i < N; ++i) use(i, words[i].escaped() ? code.escapes[words[i].low0] : code.plain(words[i]));
            return;
        }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) use(i, code.plain(words[i]));
}

// The elements of a lane's chunks, for whoever looks at them more than once. All lanes of a warp call together.
template <class Format, int N, class Code>
__device__ __forceinline__ void decode(const typename Format::Words (&words)[N], const Code& code, uint4 (&elements)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) elements[i] = code.plain(words[i]);
    if constexpr (Format::HAS_ESCAPES) {
        bool escaped = false;
#pragma unroll
        for (int i = 0; i < N; ++i) escaped |= words[i].escaped();
        if (!__any_sync(ALL_LANES, escaped)) return;
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (words[i].escaped()) elements[i] = code.escapes[words[i].low0];
    }
}
