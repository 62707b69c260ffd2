// ffn_4: the down-projection (formula 4); weights of inputs that are inactive for every token are not read.
//
//   y[t, c] = sum over the j with x1[t, j] != 0 of x1[t, j] * w_down_t[j, c], + bias[c]        0 <= t < TOKENS, 0 <= c < d_model
//   y[t, c] = r[t] * sum over the same of x1[t, j] * norm_weight[j] * w_down_t[j, c], + bias[c]                if NORM_WEIGHT
//   r[t]    = 1 / sqrt(mean over all j of x1[t, j]^2 + norm_eps): RMS normalisation, which leaves zeros zeros
//
//   x1 (TOKENS, d_ff) and w_down_t (d_ff, d_model) in format W_DOWN, both 16-byte aligned
//   y (TOKENS, d_model), every element written   bias (d_model,) if DOWN_BIAS   norm_weight (d_ff,) if NORM_WEIGHT
//   launch   WARPS warps a block; a block owns a slice, LANES * 16 bytes of every row, so all blocks do the same work whatever the
//            mask, and no sum crosses blocks; grid ceil(d_model / (LANES * VEC)) * ceil(TOKENS / HERE), slice after slice, so
//            that blocks with other tokens of a slice run at the same time, and find its rows in L2
//            SHARES: rows are dealt out in so many shares, each a warp's, or several warps' which divide the tokens. A warp lists
//            the active ones among the rows of its share and reads those: no barrier before the first weight. It goes through
//            its tokens one by one, so that each is added up as if it were alone; a row that others have read is in the cache
//            EACH: 16-byte vectors of x1 that a thread looks at before its warp writes down the active rows, a tile
//            UNIT: neighbouring vectors of x1 that go to one share
//            LISTED: rows of a tile that a share has at most
//            LISTS: tokens whose rows a warp reads side by side, 1 or 2
//            HERE: tokens of a block
//            SHARED_BYTES: dynamic shared memory of a block, if it needs more than it has without
//   numerics float32 accumulation in an order that only the token's mask, d_ff, d_model and the dtype decide, one rounding at the
//            store, or none if PARTIAL; bias and norm are applied before it, in float32

#include "bias.cuh"
#include "elements.cuh"
#include "programmatic.cuh"
#include "warp.cuh"
#include "weights.cuh"

#if !defined(LANES) || !defined(LOADS) || !defined(EACH) || !defined(UNIT) || !defined(LISTED) || !defined(SHARES) || \
    !defined(LISTS) || !defined(HERE)
#error "define LANES, LOADS, EACH, UNIT, LISTED, SHARES, LISTS and HERE"
#endif
#ifndef NORM_WEIGHT
#error "define NORM_WEIGHT as 0 or 1"
#endif

constexpr int THREADS = 32 * WARPS;
constexpr int GROUPS = 32 / LANES;       // of a warp, each reading its own row
constexpr int SLICE = LANES * VEC;       // columns of a block
constexpr int STEP = VEC * 32 * SHARES;  // rows between a thread's vectors of x1
constexpr int TILE = EACH * STEP;        // rows of a tile
#ifdef COL_OPT
constexpr bool WHOLE_SLICES = COL_OPT % SLICE == 0;
#else
constexpr bool WHOLE_SLICES = false;
#endif
static_assert(32 % LANES == 0, "a row segment must not straddle warps");
static_assert(32 % UNIT == 0, "a unit must not straddle warps, nor the vectors of a thread");
static_assert(EACH * VEC <= 64, "a thread keeps a bit per row");
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

// First row of the thread's k-th vector in a tile. Units go round the shares, so that a mask with its active rows side by side
// loads all of them alike.
__device__ __forceinline__ unsigned first_row(unsigned k, unsigned share, unsigned lane = threadIdx.x % 32) {
    return k * STEP + ((lane / UNIT * SHARES + share) * UNIT + lane % UNIT) * VEC;
}

// Bit k * VEC + e: whether x1[first_row(k) + e] is not zero. With a norm, adds their squares to the thread's `squares`. Of tokens
// but the first, x1 may lie at any element.
template <bool IS_ALIGNED>
__device__ __forceinline__ Bits active_bits(const scalar* x1, int rows, unsigned share, float (&squares)[2]) {
    uint4 v[EACH];  // all loads before the first use
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int row = first_row(k, share);
        v[k] = IS_ALIGNED && row + VEC <= rows ? *reinterpret_cast<const uint4*>(x1 + row) : uint4{0, 0, 0, 0};
    }
    Bits bits = 0;
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int row = first_row(k, share);
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
            scalar value = raw_element(v[k], e);
            // the vector that d_ff cuts off
            if ((!IS_ALIGNED || (rows % VEC != 0 && row + VEC > rows)) && row + e < rows) value = x1[row + e];
            bits |= (Bits)is_nonzero(value) << (k * VEC + e);
            if constexpr (NORM_WEIGHT) squares[e % 2] = fmaf(to_float(value), to_float(value), squares[e % 2]);
        }
    }
    return bits;
}

// Calls write(position, bit) for each of the warp's bits, in an order that only the bits decide, and returns how many there are. The
// first barrier keeps the list of one tile from overwriting that of another, which may still be read.
template <class Write>
__device__ __forceinline__ int list_rows(Bits bits, Write write) {
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
    for (; bits != 0; bits &= bits - 1) write(position++, lowest(bits));
    __syncwarp();
    return total;
}

// The row of a thread's bit.
__device__ __forceinline__ unsigned row_of(unsigned bit, unsigned base) { return base + bit / VEC * STEP + bit % VEC; }

// What is left to do with a column's sum: the norm, the bias, the rounding.
__device__ __forceinline__ result finished(float total, float squares, int rows, float norm_eps, const scalar* bias, int c) {
    if constexpr (NORM_WEIGHT)
        if (total != 0.0f) total *= 1.0f / sqrtf(squares / rows + norm_eps);  // where nothing is active r may be infinite
    return to_result(biased<DOWN_BIAS>(total, bias, c));
}

constexpr int SPLIT = WARPS / SHARES;                            // warps that divide the tokens of a share among them
constexpr int OWN = (HERE + SPLIT - 1) / SPLIT;                  // tokens of a warp
constexpr int MOST_JOINT = W_DOWN::HAS_ESCAPES ? 2 : 4;          // registers are few
constexpr int PARTS = (TOKENS + HERE - 1) / HERE;                // blocks of a slice
constexpr int JOINT = OWN < MOST_JOINT ? OWN : MOST_JOINT;       // of these, looked at together
constexpr int OUTPUTS = (HERE * SLICE + THREADS - 1) / THREADS;  // of a thread
static_assert(WARPS % SHARES == 0, "every share has as many warps");
static_assert(LISTS == 1 || (LISTS == 2 && OWN > 1), "two lists are of two tokens");

struct Shared {
    unsigned short lists[WARPS][LISTS][LISTED];
    float partial[HERE][SHARES][SLICE + NORM_WEIGHT];  // of each column, and, with a norm, of the squares
};

// Adds the products of the rows of N lists, so many each, with T tokens' x1 each, in the order in which a token alone adds them: its
// n-th row by group n % GROUPS.
template <int N, int T>
__device__ __forceinline__ void add_rows(float (&sums)[N * T][VEC], const unsigned short (*lists)[LISTED],
                                         const int (&active)[N], const W_DOWN::Column& mine, bool is_column, const scalar* x1,
                                         int tile, int rows, const scalar* norm_weight) {
    const int most = N == 1 ? active[0] : max(active[0], active[N - 1]);
    for (int begin = 0; begin < most; begin += GROUPS * LOADS) {  // all lanes stay together
        const int first = begin + threadIdx.x % 32 / LANES;
        // Compares with a constant.
        const auto is_listed = [&](int i) { return active[i / LOADS] - first > i % LOADS * GROUPS && is_column; };
        // Every load of the batch before the first use: a lane whose row is not listed reads x1 all the same, at the tile's first
        // row, for a branch would share a scoreboard with the weights. But the token of the second list may not exist.
        W_DOWN::Chunk w[N * LOADS];
        scalar values[N * LOADS][T], norms[N * LOADS];
#pragma unroll
        for (int i = 0; i < N * LOADS; ++i) {
            const int n = i / LOADS;
            const bool listed = is_listed(i);
            const unsigned row = tile + (listed ? lists[n][first + i % LOADS * GROUPS] : 0u);
            w[i] = listed ? mine.load(row) : W_DOWN::Chunk{};
#pragma unroll
            for (int t = 0; t < T; ++t) {
                const scalar* of_token = x1 + (long long)(n * T + t) * rows;
                values[i][t] = n == 0 || listed ? *advanced(of_token, row, sizeof(scalar)) : scalar{};
            }
            if constexpr (NORM_WEIGHT) norms[i] = *advanced(norm_weight, row, sizeof(scalar));
        }
        float s[N * LOADS][T];
#pragma unroll
        for (int i = 0; i < N * LOADS; ++i) {
#pragma unroll
            for (int t = 0; t < T; ++t) {
                s[i][t] = is_listed(i) ? to_float(values[i][t]) : 0.0f;
                if constexpr (NORM_WEIGHT)
                    if (is_listed(i)) s[i][t] *= to_float(norms[i]);
            }
        }
        W_DOWN::Words words[N * LOADS];
#pragma unroll
        for (int i = 0; i < N * LOADS; ++i) words[i] = mine.words(w[i]);
        for_each_chunk<W_DOWN>(words, mine.code, [&](int i, const uint4& weights) {
#pragma unroll
            for (int t = 0; t < T; ++t)
#pragma unroll
                for (int e = 0; e < VEC; ++e)
                    sums[i / LOADS * T + t][e] = fmaf(s[i][t], element(weights, e), sums[i / LOADS * T + t][e]);
        });
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    ffn_4(const scalar* x1, W_DOWN::Matrix w_down_t, result* __restrict__ y, int d_ff, int d_model, const scalar* bias,
          const scalar* norm_weight, float norm_eps) {
#if defined(SHARED_BYTES)
    static_assert(sizeof(Shared) <= SHARED_BYTES, "what a block keeps must fit its dynamic shared memory");
    Shared& shared = *dynamic_shared<Shared>();
#else
    __shared__ Shared shared;
#endif
    const int rows = D_FF(d_ff), columns = D_MODEL(d_model), chunks = columns / VEC;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Without a division where every warp has a share of its own: the compiler does not know how many warps there are.
    const int share = SPLIT == 1 ? warp : warp % SHARES, first_own = SPLIT == 1 ? 0 : warp / SHARES * OWN;

    const int slice = blockIdx.x / PARTS, part = blockIdx.x % PARTS;
    const int chunk = slice * LANES + threadIdx.x % LANES;
    const bool is_column = WHOLE_SLICES || chunk < stored<W_DOWN>(chunks);
    const W_DOWN::Column mine = W_DOWN::column(w_down_t, chunk, chunks);
    // The block's tokens.
    const int here = TOKENS % HERE == 0 ? HERE : min(HERE, TOKENS - part * HERE);
    if constexpr (PARTS > 1) {
        x1 += (long long)part * HERE * rows;
        y += (long long)part * HERE * columns;
    }
    wait_for_predecessor();
    auto& lists = shared.lists[warp];
    const unsigned base = first_row(0, share);

#pragma unroll 1
    for (int first_token = first_own, last = min(first_own + OWN, here); first_token < last; first_token += JOINT) {
        const scalar* x1_of = x1 + (long long)first_token * rows;
        float sums[JOINT][VEC] = {}, squares[JOINT][2] = {};
        for (int tile = 0; tile < rows; tile += TILE) {
            Bits bits[JOINT];
            bool alike = true;
#pragma unroll
            for (int t = 0; t < JOINT; ++t) {
                bits[t] = 0;
                if ((OWN % JOINT == 0 && HERE % OWN == 0 && TOKENS % HERE == 0) || first_token + t < last) {
                    const scalar* values = x1_of + (long long)t * rows + tile;
                    bits[t] = TOKENS == 1 || rows % VEC == 0 ? active_bits<true>(values, rows - tile, share, squares[t])
                                                             : active_bits<false>(values, rows - tile, share, squares[t]);
                }
                alike &= bits[t] == bits[0];
            }
            const auto listed = [&](int n, Bits these) {
                return list_rows(these, [&](unsigned place, unsigned bit) { lists[n][place] = row_of(bit, base); });
            };
            if constexpr (JOINT > 1) {
                if (!__all_sync(ALL_LANES, alike)) {
#pragma unroll
                    for (int t = 0; t < JOINT; t += LISTS) {
                        const scalar* values = x1_of + (long long)t * rows;
                        const int first = listed(0, bits[t]);
                        if (t + LISTS <= JOINT) {
                            float (&of_lists)[LISTS][VEC] = reinterpret_cast<float (&)[LISTS][VEC]>(sums[t]);
                            int active[LISTS] = {first};
                            if constexpr (LISTS == 2) active[LISTS - 1] = listed(1, bits[(t + 1) % JOINT]);
                            add_rows<LISTS, 1>(of_lists, lists, active, mine, is_column, values, tile, rows, norm_weight);
                        } else {
                            float (&one)[1][VEC] = reinterpret_cast<float (&)[1][VEC]>(sums[t]);
                            add_rows<1, 1>(one, lists, {first}, mine, is_column, values, tile, rows, norm_weight);
                        }
                    }
                    continue;
                }
            }
            add_rows<1, JOINT>(sums, lists, {listed(0, bits[0])}, mine, is_column, x1_of, tile, rows, norm_weight);
        }

        // Over the warp's groups.
#pragma unroll
        for (int t = 0; t < JOINT; ++t) {
            const int column = threadIdx.x % LANES * VEC + add_lanes<LANES, VEC>(sums[t]), token = first_token + t;
            if (token >= last) continue;
#pragma unroll
            for (int e = 0; e < VEC / GROUPS + (VEC < GROUPS); ++e) shared.partial[token][share][column + e] = sums[t][e];
            if constexpr (NORM_WEIGHT) {
                const float all = warp_sum(squares[t][0] + squares[t][1]);
                if (lane == 0) shared.partial[token][share][SLICE] = all;
            }
        }
    }
    __syncthreads();
    if constexpr (!DOWN_BIAS) let_successor_in();  // all but a bias is read

    // Over the shares.
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
        const int output = o * THREADS + threadIdx.x, token = output / SLICE, c = slice * SLICE + output % SLICE;
        if (token >= here || c >= columns) continue;
        float total = 0.0f, all = 0.0f;
#pragma unroll
        for (int i = 0; i < SHARES; ++i) total += shared.partial[token][i][output % SLICE];
        if constexpr (NORM_WEIGHT) {
#pragma unroll
            for (int i = 0; i < SHARES; ++i) all += shared.partial[token][i][SLICE];
        }
        y[(long long)token * columns + c] = finished(total, all, rows, norm_eps, bias, c);
    }
}
