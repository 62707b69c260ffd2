// ffn_4: the down-projection (formula 4); weights of inactive inputs are not read.
//
//   y[c] = sum over the j with x1[j] != 0 of x1[j] * w_down_t[j, c], + bias[c]                        0 <= c < d_model
//   y[c] = r * sum over the same of x1[j] * norm_weight[j] * w_down_t[j, c], + bias[c]                if NORM_WEIGHT
//   r    = 1 / sqrt(mean over all j of x1[j]^2 + norm_eps): RMS normalisation, which leaves zeros zeros
//
//   x1 (d_ff,) and w_down_t (d_ff, d_model) in format W_DOWN, both 16-byte aligned   y (d_model,), every element written
//   bias (d_model,) if DOWN_BIAS   norm_weight (d_ff,) if NORM_WEIGHT
//   launch   WARPS warps a block; a block owns LANES * 16 bytes of every row, so all blocks do the same work whatever the mask,
//            and no sum crosses blocks; grid ceil(d_model / (LANES * VEC)). A warp lists the active ones among its own rows and
//            reads those: no barrier before the first weight
//            EACH: 16-byte vectors of x1 that a thread looks at before its warp writes down the active rows, a tile
//            UNIT: neighbouring vectors of x1 that go to one warp
//            LISTED: rows of a tile that a warp has at most
//   numerics float32 accumulation in an order that only the mask, d_ff, d_model and the dtype decide, one rounding at the store;
//            bias and norm are applied before it, in float32

#include "bias.cuh"
#include "elements.cuh"
#include "programmatic.cuh"
#include "warp.cuh"
#include "weights.cuh"

static_assert(TOKENS == 1, "one token so far");

#if !defined(LANES) || !defined(LOADS) || !defined(EACH) || !defined(UNIT) || !defined(LISTED)
#error "define LANES, LOADS, EACH, UNIT and LISTED"
#endif
#ifndef NORM_WEIGHT
#error "define NORM_WEIGHT as 0 or 1"
#endif

constexpr int THREADS = 32 * WARPS;
constexpr int GROUPS = 32 / LANES;          // of a warp, each reading its own row
constexpr int SLICE = LANES * VEC;          // columns of a block
constexpr int TILE = EACH * VEC * THREADS;  // rows of a tile
#ifdef COL_OPT
constexpr bool WHOLE_SLICES = COL_OPT % SLICE == 0;
#else
constexpr bool WHOLE_SLICES = false;
#endif
static_assert(32 % LANES == 0, "a row segment must not straddle warps");
static_assert(32 % UNIT == 0, "a unit must not straddle warps, nor the vectors of a thread");
static_assert(SLICE <= THREADS, "a thread writes one column");
static_assert(EACH * VEC <= 64, "a thread keeps a bit per row");
static_assert(LISTED * WARPS <= 20480, "a tile's list must fit static shared memory");
static_assert(TILE <= 65536, "the list holds 16-bit row numbers");

template <bool WIDE>
struct Mask {
    typedef unsigned Bits;
};
template <>
struct Mask<true> {
    typedef unsigned long long Bits;
};
typedef Mask<(EACH * VEC > 32)>::Bits Bits;  // of a thread's rows in a tile

__device__ __forceinline__ int count(unsigned bits) { return __popc(bits); }
__device__ __forceinline__ int count(unsigned long long bits) { return __popcll(bits); }
__device__ __forceinline__ unsigned lowest(unsigned bits) { return __ffs(bits) - 1; }
__device__ __forceinline__ unsigned lowest(unsigned long long bits) { return __ffsll(bits) - 1; }

// First row of the thread's k-th vector in a tile. Units go round the warps, so that a mask with its active rows side by side
// loads all warps alike.
__device__ __forceinline__ unsigned first_row(unsigned k) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    return k * (THREADS * VEC) + ((lane / UNIT * WARPS + warp) * UNIT + lane % UNIT) * VEC;
}

// Bit k * VEC + e: whether x1[first_row(k) + e] is not zero. With a norm, adds their squares to the thread's `squares`.
__device__ __forceinline__ Bits active_bits(const scalar* x1, int rows, float (&squares)[2]) {
    uint4 v[EACH];  // all loads before the first use
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int row = first_row(k);
        v[k] = row + VEC <= rows ? *reinterpret_cast<const uint4*>(x1 + row) : uint4{0, 0, 0, 0};
    }
    Bits bits = 0;
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int row = first_row(k);
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
            scalar value = raw_element(v[k], e);
            if (rows % VEC != 0 && row + VEC > rows && row + e < rows) value = x1[row + e];  // the vector that d_ff cuts off
            bits |= (Bits)is_nonzero(value) << (k * VEC + e);
            if constexpr (NORM_WEIGHT) squares[e % 2] = fmaf(to_float(value), to_float(value), squares[e % 2]);
        }
    }
    return bits;
}

// Writes the rows behind the warp's bits to its `list`, in an order that only the bits decide, and returns how many there are.
// The first barrier keeps the list of one tile from overwriting that of another, which may still be read.
__device__ __forceinline__ int list_rows(Bits bits, unsigned short* list) {
    const int lane = threadIdx.x % 32, own = count(bits);
    int upto = own;  // inclusive sum of the counts over the lanes
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int lower = __shfl_up_sync(ALL_LANES, upto, step);
        if (lane >= step) upto += lower;
    }
    const int total = __shfl_sync(ALL_LANES, upto, 31);
    unsigned position = upto - own;
    __syncwarp();
    const unsigned base = first_row(0);
    for (; bits != 0; bits &= bits - 1) {
        const unsigned bit = lowest(bits);
        list[position++] = base + bit / VEC * (THREADS * VEC) + bit % VEC;
    }
    __syncwarp();
    return total;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    ffn_4(const scalar* x1, W_DOWN::Matrix w_down_t, scalar* __restrict__ y, int d_ff, int d_model, const scalar* bias,
          const scalar* norm_weight, float norm_eps) {
    __shared__ unsigned short lists[WARPS][LISTED];
    __shared__ float partial[WARPS][SLICE];
    __shared__ float squares_of[WARPS];

    const int rows = D_FF(d_ff), columns = D_MODEL(d_model), chunks = columns / VEC;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    const int chunk = blockIdx.x * LANES + threadIdx.x % LANES;
    const bool is_column = WHOLE_SLICES || chunk < stored<W_DOWN>(chunks);
    const W_DOWN::Column mine = W_DOWN::column(w_down_t, chunk, chunks);
    wait_for_predecessor();
    unsigned short* list = lists[warp];
    float sum[VEC] = {}, squares[2] = {};
    for (int tile = 0; tile < rows; tile += TILE) {
        const int active = list_rows(active_bits(x1 + tile, rows - tile, squares), list);
        for (int begin = 0; begin < active; begin += GROUPS * LOADS) {  // all lanes stay together
            const int first = begin + lane / LANES, left = active - first;
            W_DOWN::Chunk w[LOADS];
            float s[LOADS];
#pragma unroll
            for (int i = 0; i < LOADS; ++i) {
                const bool valid = left > i * GROUPS && is_column;
                const unsigned row = tile + (valid ? list[first + i * GROUPS] : 0u);
                w[i] = valid ? mine.load(row) : W_DOWN::Chunk{};
                s[i] = valid ? to_float(*advanced(x1, row, sizeof(scalar))) : 0.0f;
                if constexpr (NORM_WEIGHT)
                    if (valid) s[i] *= to_float(*advanced(norm_weight, row, sizeof(scalar)));
            }
            W_DOWN::Words words[LOADS];
#pragma unroll
            for (int i = 0; i < LOADS; ++i) words[i] = mine.words(w[i]);
            for_each_chunk<W_DOWN>(words, mine.code, [&](int i, const uint4& weights) {
#pragma unroll
                for (int e = 0; e < VEC; ++e) sum[e] = fmaf(s[i], element(weights, e), sum[e]);
            });
        }
    }

    // Over the warp's groups: at each step a lane passes on half of the columns that it still holds and adds to the other half.
    int held = VEC, column = threadIdx.x % LANES * VEC;
#pragma unroll
    for (int step = 16; step >= LANES; step /= 2) {
        const bool upper = lane & step;
        if (held == 1) {
            sum[0] += __shfl_xor_sync(ALL_LANES, sum[0], step);
            continue;
        }
        held /= 2;
        if (upper) column += held;
#pragma unroll
        for (int e = 0; e < held; ++e) {
            const float keep = upper ? sum[e + held] : sum[e], pass = upper ? sum[e] : sum[e + held];
            sum[e] = keep + __shfl_xor_sync(ALL_LANES, pass, step);
        }
    }
#pragma unroll
    for (int e = 0; e < held; ++e) partial[warp][column + e] = sum[e];
    if constexpr (NORM_WEIGHT) {
        const float all = warp_sum(squares[0] + squares[1]);
        if (lane == 0) squares_of[warp] = all;
    }
    __syncthreads();

    // Over the warps.
    const int c = blockIdx.x * SLICE + threadIdx.x;
    if (threadIdx.x >= SLICE || c >= columns) return;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += partial[w][threadIdx.x];
    if constexpr (NORM_WEIGHT) {
        float all = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) all += squares_of[w];
        if (total != 0.0f) total *= 1.0f / sqrtf(all / rows + norm_eps);  // where nothing is active r may be infinite
    }
    y[c] = from_float(biased<DOWN_BIAS>(total, bias, c));
}
