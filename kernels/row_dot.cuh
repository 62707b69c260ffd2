// row_dot: dot(row, x) of every token, by one warp, or half of it by each of two, for the operators that read whole rows.
//
//   LOADS   chunks of a row that a lane has in flight. A row is 8 to 10 KB: read in one or two batches, it takes one or two trips
//           to memory.
//
// Even and odd loads accumulate separately, and of those even and odd elements. This shortens the chain of dependent additions,
// lets two warps split a row, and makes the rounding independent of the launch shape. With several tokens they always do, so that
// half of the sums are in a warp's registers.

#include "elements.cuh"
#include "warp.cuh"
#include "weights.cuh"

#ifndef LOADS
#error "define LOADS"
#endif
#if TOKENS == 1
#ifdef COL_OPT
static_assert(LOADS % 2 == 0 || COL_OPT / VEC <= 32 * LOADS, "even loads are even in every batch");
#else
static_assert(LOADS % 2 == 0, "even loads are even in every batch");
#endif
#endif

// Places of a row's dot products among the lanes: lane l has that of token l % PLACES.
constexpr int PLACES = TOKENS <= 2 ? TOKENS : TOKENS <= 4 ? 4 : 8;
// Tokens from which on a row is multiplied with all.
constexpr int MANY = TOKENS > 2 ? TOKENS / 2 + 1 : TOKENS + 1;

// A lane's sums of one row and token: those of even and odd elements, of even and odd loads.
struct Sums {
    float even[2], odd[2];
};

// Whether the row has chunk c of a batch of every STEP-th load that starts inside it. No check is left if rows are whole
// batches.
template <int STEP>
__device__ __forceinline__ bool exists(int c, int chunks) {
#ifdef COL_OPT
    if (COL_OPT / VEC % (32 * STEP * LOADS) == 0) return true;
#endif
    return c < chunks;
}

// What a lane has in flight of N rows.
template <class Format, int N>
struct Batch {
    typename Format::Chunk chunks[N][LOADS];
};

// Every STEP-th chunk of some rows for this lane, from chunk `first` of the rows on.
template <class Format, int STEP, int N>
__device__ __forceinline__ Batch<Format, N> load_batch(const typename Format::Row (&rows)[N], int first, int chunks) {
    const int own = first + threadIdx.x % 32;
    Batch<Format, N> batch;
#pragma unroll
    for (int r = 0; r < N; ++r) {
        const typename Format::Row mine = rows[r].from(own);
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
            batch.chunks[r][i] =
                exists<STEP>(own + 32 * STEP * i, stored<Format>(chunks)) ? mine.load(32 * STEP * i) : typename Format::Chunk{};
    }
    return batch;
}

// Adds the products of a chunk of weights and one of x to sums of even and odd elements.
__device__ __forceinline__ void add_products(float (&sum)[2], const uint4& weights, const uint4& v) {
#pragma unroll
    for (int e = 0; e < VEC; ++e) sum[e % 2] = fmaf(element(weights, e), element(v, e), sum[e % 2]);
}

// Adds the products of a row's batch of every STEP-th load with the one token. So many chunks of x are fetched EARLY: behind the
// branch for escapes, the compiler would leave all loads of x until the weights have come.
template <class Format, int STEP, int EARLY>
__device__ __forceinline__ void add_batch(Sums& sums, const typename Format::Row& row, const uint4* x, int first, int chunks) {
    const int own = first + threadIdx.x % 32;
    const typename Format::Row mine = row.from(own);
    x += own;
    const Batch<Format, 1> batch = load_batch<Format, STEP>({row}, first, chunks);
    constexpr int KEPT = Format::HAS_ESCAPES ? (EARLY < LOADS ? EARLY : LOADS) : 0;
    uint4 early[KEPT + 1];
#pragma unroll
    for (int i = 0; i < KEPT; ++i)
        if (exists<STEP>(own + 32 * STEP * i, chunks)) early[i] = x[32 * STEP * i];
    // Keep all loads ahead of the first use; without this barrier NVRTC interleaves them.
    __syncwarp();
    typename Format::Words words[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) words[i] = mine.words(batch.chunks[0][i]);
    for_each_chunk<Format>(words, mine.code, [&](int i, const uint4& weights) {
        if (exists<STEP>(own + 32 * STEP * i, chunks))
            add_products(STEP == 2 || i % 2 == 0 ? sums.even : sums.odd, weights, i < KEPT ? early[i] : x[32 * STEP * i]);
    });
}

// Adds the products of a batch of every second load of some rows with `tokens`, or with all of them where that is faster: the sums of
// others are not looked at.
template <class Format, int N>
__device__ __forceinline__ void add_tokens(float (&sums)[N][TOKENS][2], const typename Format::Row (&rows)[N],
                                           const Batch<Format, N>& batch, const uint4* x, int first, int chunks,
                                           unsigned tokens) {
    const int own = first + threadIdx.x % 32;
    x += own;
    uint4 weights[N][LOADS];
#pragma unroll
    for (int r = 0; r < N; ++r) {
        const typename Format::Row mine = rows[r].from(own);
        typename Format::Words words[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) words[i] = mine.words(batch.chunks[r][i]);
        decode<Format>(words, mine.code, weights[r]);
    }
    const auto add = [&](int i, int t) {
        const uint4 v = x[t * chunks + 64 * i];
#pragma unroll
        for (int r = 0; r < N; ++r) add_products(sums[r][t], weights[r][i], v);
    };
    if (tokens == ALL_TOKENS || __popc(tokens) >= MANY) {  // a weight is made a float once
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            if (!exists<2>(own + 64 * i, chunks)) continue;
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) add(i, t);
        }
        return;
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        if (!(tokens >> t & 1)) continue;
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
            if (exists<2>(own + 64 * i, chunks)) add(i, t);
    }
}

// The lane's sums of some rows over their even (half 0) or odd (half 1) loads, of `tokens`: the warp_sum of both added is row_dot,
// to the bit.
template <class Format, int EARLY, int N>
__device__ __forceinline__ void half_rows(const typename Format::Row (&rows)[N], const uint4* x, int half, int chunks,
                                          unsigned tokens, float (&halves)[N * PLACES]) {
    if constexpr (TOKENS == 1) {
        static_assert(N == 1, "one row at a time, where nothing is shared");
        Sums sums = {};
#pragma unroll 1
        for (int first = 32 * half; first < chunks; first += 64 * LOADS)
            add_batch<Format, 2, EARLY>(sums, rows[0], x, first, chunks);
        halves[0] = sums.even[0] + sums.even[1];
    } else {
        float sums[N][TOKENS][2] = {};
        Batch<Format, N> batch = load_batch<Format, 2>(rows, 32 * half, chunks);
#pragma unroll 1
        for (int first = 32 * half; first < chunks; first += 64 * LOADS) {
            const Batch<Format, N> now = batch;
            __syncwarp();
            if (first + 64 * LOADS < chunks) batch = load_batch<Format, 2>(rows, first + 64 * LOADS, chunks);
            add_tokens<Format>(sums, rows, now, x, first, chunks, tokens);
        }
#pragma unroll
        for (int i = 0; i < N * PLACES; ++i) {
            const int r = i / PLACES, t = i % PLACES;
            halves[i] = t < TOKENS ? sums[r][t][0] + sums[r][t][1] : 0.0f;
        }
    }
}

// Adds what the warp beside this one has to N sums of each lane. All threads of the block call it.
template <int N>
__device__ __forceinline__ void add_other_half(float (&halves)[N]) {
    __shared__ float halves_of[WARPS][N][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();  // what was there before is not read any more
#pragma unroll
    for (int i = 0; i < N; ++i) halves_of[warp][i][lane] = halves[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) halves[i] += halves_of[warp ^ 1][i][lane];
}

// The dot products of N rows with `tokens`: lane l has that of row l / PLACES % N and token l % PLACES, which is anything where the
// token is not asked for. With several tokens by two neighbouring warps, of which both get them; all threads of the block call.
template <class Format, int EARLY = LOADS, int N>
__device__ __forceinline__ float row_dots(const typename Format::Row (&rows)[N], const uint4* x, int chunks,
                                          unsigned tokens = ALL_TOKENS) {
    float total[N * PLACES];
    if constexpr (TOKENS == 1) {
        static_assert(N == 1, "one row at a time, where nothing is shared");
        Sums sums = {};
#pragma unroll 1
        for (int first = 0; first < chunks; first += 32 * LOADS) add_batch<Format, 1, EARLY>(sums, rows[0], x, first, chunks);
        total[0] = (sums.even[0] + sums.even[1]) + (sums.odd[0] + sums.odd[1]);
    } else {
        half_rows<Format, EARLY>(rows, x, threadIdx.x / 32 % 2, chunks, tokens, total);
        add_other_half(total);
    }
    return warp_sums(total);
}

// Warps that read a row together.
constexpr int SHARING = TOKENS == 1 ? 1 : 2;
static_assert(WARPS % SHARING == 0, "with several tokens warps come in pairs");

// Whether rows come in groups of N.
#ifdef ROW_OPT
template <int N>
constexpr bool WHOLE_GROUPS = ROW_OPT % N == 0;
#else
template <int N>
constexpr bool WHOLE_GROUPS = N == 1;
#endif

// N rows of a matrix from one on, the last one again where there are no more.
template <class Format, int N>
struct Rows {
    typename Format::Row at[N];
};
template <class Format, int N>
__device__ __forceinline__ Rows<Format, N> rows_from(const typename Format::Matrix& matrix, int first, int rows, int chunks) {
    Rows<Format, N> found;
#pragma unroll
    for (int r = 0; r < N; ++r) {
        const int row = first + r;
        found.at[r] = Format::row(matrix, WHOLE_GROUPS<N> || row < rows ? row : rows - 1, chunks);
    }
    return found;
}

// Whose dot product a lane has after row_dots of N rows from one on.
struct Place {
    int row, token;
    bool exists;  // and no other lane has it
};
template <int N>
__device__ __forceinline__ Place place_of(int first, int rows) {
    const int lane = threadIdx.x % 32, row = first + lane / PLACES % N, token = lane % PLACES;
    const bool inside = WHOLE_GROUPS<N> || row < rows;
    return {inside ? row : rows - 1, token, lane < N * PLACES && token < TOKENS && inside};
}
