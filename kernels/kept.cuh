// kept: dot products of rows with several tokens, by blocks that stay: each keeps all tokens in shared memory, made float32 once, and goes
// through its share of the rows.
//
//   LOADS    chunks of each row that a lane has in flight
//   ABREAST  rows that two warps read together, one their even loads and the other their odd ones, as in row_dot: so their sums are those of
//            row_dots, to the bit
//
// Where blocks come and go each converts the tokens anew, which is a quarter of its instructions with eight of them.

#include "elements.cuh"
#include "memory.cuh"
#include "warp.cuh"

constexpr int CHUNKS = COL_OPT / VEC, STEPS = CHUNKS / 64;  // chunks of a row; those of a lane, which has every 64th
constexpr int GROUPS = ROW_OPT / ABREAST;
constexpr int PAIRS = WARPS / 2;
constexpr int PLANES = VEC / 4;              // float4 of a chunk
constexpr int PLACES = 8;                    // of a row's dot products among the lanes
constexpr int ENDED = ABREAST / 2 * PLACES;  // sums that each warp of a pair ends with
static_assert(TOKENS > 4 && VEC == 8, "five to eight tokens of 16 bits");
static_assert(CHUNKS % (64 * LOADS) == 0 && ROW_OPT % ABREAST == 0, "rows are whole batches of both warps, and whole groups");
static_assert(WARPS % 2 == 0 && ENDED <= 32 && (ENDED & (ENDED - 1)) == 0, "one sum for a lane");

// Of a block. Lanes that read neighbouring chunks of a token find them in different banks. What each warp passes on to the other of its
// pair is there twice: a warp may be at its next group while the other still reads.
struct Kept {
    float4 tokens[TOKENS][PLANES][CHUNKS];
    float passed_on[2][WARPS][ENDED][32];
};

// A chunk of each row of a group.
struct Weights {
    uint4 rows[ABREAST];
};

__device__ __forceinline__ Weights load_weights(const uint4* first) {
    Weights found;
#pragma unroll
    for (int r = 0; r < ABREAST; ++r) found.rows[r] = load_once(first + r * CHUNKS);
    return found;
}

__device__ __forceinline__ void keep_tokens(const scalar* x) {
    Kept& kept = *dynamic_shared<Kept>();
#pragma unroll 4
    for (int i = threadIdx.x; i < TOKENS * CHUNKS; i += 32 * WARPS) {
        const uint4 v = chunks_of(x)[i];
#pragma unroll
        for (int p = 0; p < PLANES; ++p)
            kept.tokens[i / CHUNKS][p][i % CHUNKS] = {element(v, 4 * p), element(v, 4 * p + 1), element(v, 4 * p + 2),
                                                      element(v, 4 * p + 3)};
    }
}

// Adds the products of a chunk of each row with every token to sums of even and odd elements; then the weights are those at `next`.
__device__ __forceinline__ void multiply(float (&sums)[ABREAST][TOKENS][2], Weights& weights, const Kept& kept, int chunk,
                                         const uint4* next) {
#pragma unroll
    for (int p = 0; p < PLANES; ++p) {
        float w[ABREAST][4];
#pragma unroll
        for (int r = 0; r < ABREAST; ++r)
#pragma unroll
            for (int e = 0; e < 4; ++e) w[r][e] = element(weights.rows[r], 4 * p + e);
        if (p == PLANES - 1) {
#ifdef DTYPE_FLOAT16
            __syncwarp();  // or the compiler makes elements float32 behind the loads, for which registers are lacking
#endif
            weights = load_weights(next);
        }
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            const float4 four = kept.tokens[t][p][chunk];
            const float v[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int r = 0; r < ABREAST; ++r)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[r][t][e % 2] = fmaf(w[r][e], v[e], sums[r][t][e % 2]);
        }
    }
}

// Calls with_dots(dot, row) for each group of rows: lane l of a warp has the dot product of row `row + l / PLACES` and token l % PLACES, if
// there are such, each once in the whole launch. All lanes of a warp call together.
template <class WithDots>
__device__ __forceinline__ void for_each_group(const Kept& kept, const scalar* x, const scalar* weights, WithDots with_dots) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, half = warp % 2, own = 32 * half + lane;
    const int step = gridDim.x * PAIRS;  // the last groups are spread over the blocks
    int group = warp / 2 * gridDim.x + blockIdx.x;

    const uint4* at = chunks_of(weights) + (long long)min(group, GROUPS - 1) * ABREAST * CHUNKS + own;
    Weights in_flight[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) in_flight[i] = load_weights(at + 64 * i);
    keep_tokens(x);
    __syncthreads();

#pragma unroll 1
    for (int parity = 0; group < GROUPS; group += step, parity ^= 1) {
        // From a row's end to the next group, or to this one again where there is none: nobody looks at what is read then.
        const long long onwards = (group + step < GROUPS ? (long long)step * ABREAST * CHUNKS : 0) - CHUNKS;
        float sums[ABREAST][TOKENS][2] = {};
#pragma unroll 1
        for (int first = 0; first < STEPS; first += LOADS) {
            at += 64 * LOADS + (first == STEPS - LOADS ? onwards : 0);
#pragma unroll
            for (int i = 0; i < LOADS; ++i) multiply(sums, in_flight[i], kept, own + 64 * (first + i), at + 64 * i);
        }

        // Each warp ends with the sums of half of the rows, and passes on the others.
        float ended[ENDED];
#pragma unroll
        for (int i = 0; i < ENDED; ++i) {
            const int r = i / PLACES, t = i % PLACES;
            const float upper = t < TOKENS ? sums[r][t % TOKENS][0] + sums[r][t % TOKENS][1] : 0.0f;
            const float lower = t < TOKENS ? sums[r + ABREAST / 2][t % TOKENS][0] + sums[r + ABREAST / 2][t % TOKENS][1] : 0.0f;
            ended[i] = half ? lower : upper;
            dynamic_shared<Kept>()->passed_on[parity][warp][i][lane] = half ? upper : lower;
        }
        sync_pair();
#pragma unroll
        for (int i = 0; i < ENDED; ++i) ended[i] += kept.passed_on[parity][warp ^ 1][i][lane];
        with_dots(warp_sums(ended), group * ABREAST + half * (ABREAST / 2));
    }
}

// Which dot product a lane has.
struct Place {
    int row, token;
    bool exists;  // and no other lane has it
};
__device__ __forceinline__ Place place_of(int row) {
    const int lane = threadIdx.x % 32, token = lane % PLACES;
    return {row + lane / PLACES % (ABREAST / 2), token, lane < ENDED && token < TOKENS};
}
