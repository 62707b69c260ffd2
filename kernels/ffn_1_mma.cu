// ffn_1_mma: the gate projection of several tokens on tensor cores (formula 1), for whoever does without ffn_1's bits.
//
//   gate[t, j] = dot(x[t, :], w_gate[j, :]) + bias[j]        0 <= t < TOKENS, 0 <= j < d_ff
//
//   x (TOKENS, d_model) and w_gate (d_ff, d_model), both 16-byte aligned   gate (TOKENS, d_ff), every element written
//   bias (d_ff,) if GATE_BIAS
//   launch   WARPS warps a block, grid of any size: a block has an equal share of the rows, in tiles of 8, and keeps its part of the
//            tokens in registers. Each warp has a part of every row, and meanwhile the weights of the next tile are on their way
//            UNIT: chunks of a row that a lane multiplies, and asks for of the next tile, at a time
//            EARLY_SUCCESSOR: the next launch may start with the last tile's sums
//   numerics float32 accumulation, one rounding at the store, or none if PARTIAL. Tensor cores add a lane's even words and its odd
//            ones apart; these two, then the warps' sums in their order, are added with rounding to nearest. The order follows
//            from WARPS and d_model, so a token's bits depend neither on the grid nor on the other tokens. They are not those of
//            ffn_1, and may differ between generations of tensor cores.

#include "bias.cuh"
#include "elements.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "programmatic.cuh"

constexpr int TILE_ROWS = 8, TILE = TILE_ROWS * MMA_TOKENS;  // rows of a tile, and its sums
constexpr int QUAD = 4;                                      // lanes of a warp that share a row
constexpr int CHUNKS = COL_OPT / VEC, PARTS = QUAD * WARPS;  // chunks of a row, and lanes of a block that share it
constexpr int STEPS = (CHUNKS + PARTS - 1) / PARTS;          // chunks of a lane
constexpr bool WHOLE = CHUNKS % PARTS == 0;

// The block's rows, and where this lane's part of each begins.
struct Share {
    int first, end, own;

    // Whether the lane has step i: every fourth chunk from its own on.
    __device__ __forceinline__ bool has(int i) const { return WHOLE || own + QUAD * i < CHUNKS; }
};

// The lane's part of its row of a tile. Behind the last row it is that row again: lanes that ask for the same are one request.
__device__ __forceinline__ const uint4* row_of(const scalar* w_gate, const Share& share, int tile) {
    const int row = share.first + tile * TILE_ROWS + threadIdx.x % 32 / QUAD;
    return chunks_of(w_gate) + (long long)min(row, share.end - 1) * CHUNKS + share.own;
}

__device__ __forceinline__ uint4 load_step(const uint4* row, const Share& share, int i) {
    return share.has(i) ? load_once(row + QUAD * i) : uint4{0, 0, 0, 0};
}

// A lane's chunk is taken as it was loaded: its even words as row g of the first factor, its odd words as row g + 8. So one product
// with the even words of the tokens' chunks is right in its upper half, one with their odd words in its lower half, and nobody
// looks at the other halves.
struct Sums {
    float even[4], odd[4];

    __device__ __forceinline__ void add(const uint4& w, const uint4& x) {
        add_product(even, w.x, w.y, w.z, w.w, x.x, x.z);
        add_product(odd, w.x, w.y, w.z, w.w, x.y, x.w);
    }
    // Of row lane / 4, tokens 2 (lane % 4) and the next one.
    __device__ __forceinline__ float2 both() const { return {even[0] + odd[2], even[1] + odd[3]}; }
};

// Multiplies the slots from FIRST on, UNIT at a time, and asks for the same of the next tile: a slot that is used first stays in its
// registers, where copies of it would wait for all loads.
template <int FIRST = 0>
__device__ __forceinline__ void multiply(Sums& sums, uint4 (&slots)[STEPS], const uint4 (&x)[STEPS], const uint4* next,
                                         const Share& share) {
    constexpr int END = FIRST + UNIT < STEPS ? FIRST + UNIT : STEPS;
#pragma unroll
    for (int i = FIRST; i < END; ++i) sums.add(slots[i], x[i]);
#pragma unroll
    for (int i = FIRST; i < END; ++i) slots[i] = load_step(next, share, i);
    if constexpr (END < STEPS) multiply<END>(sums, slots, x, next, share);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    ffn_1_mma(const scalar* x, const scalar* w_gate, result* __restrict__ gate, int, int, const scalar* bias) {
    __shared__ float2 partial[2][WARPS][TILE / 2];
    wait_for_predecessor();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, token = lane / QUAD;
    const Share share = {(int)((long long)ROW_OPT * blockIdx.x / gridDim.x),
                         (int)((long long)ROW_OPT * (blockIdx.x + 1) / gridDim.x), warp * STEPS * QUAD + lane % QUAD};
    if (share.first >= share.end) return;

    uint4 slots[STEPS], of_token[STEPS];
    const uint4* row = row_of(w_gate, share, 0);
#pragma unroll
    for (int i = 0; i < STEPS; ++i) slots[i] = load_step(row, share, i);
    __syncwarp();  // the first weights are asked for before the tokens
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
        of_token[i] = token < TOKENS && share.has(i) ? chunks_of(x)[token * CHUNKS + share.own + QUAD * i] : uint4{0, 0, 0, 0};

    const int tiles = (share.end - share.first + TILE_ROWS - 1) / TILE_ROWS;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        Sums sums = {};
        multiply(sums, slots, of_token, row_of(w_gate, share, tile + 1), share);
        partial[tile % 2][warp][lane] = sums.both();
        __syncthreads();  // one a tile: before it comes to this buffer again, every warp has come to the other's barrier
#ifdef EARLY_SUCCESSOR
        if (tile == tiles - 1 && !GATE_BIAS) let_successor_in();
#endif
        const int t = threadIdx.x / TILE_ROWS, of_tile = threadIdx.x % TILE_ROWS, j = share.first + tile * TILE_ROWS + of_tile;
        if (t >= TOKENS || j >= share.end) continue;
        const float* mine = reinterpret_cast<const float*>(partial[tile % 2]) + of_tile * MMA_TOKENS + t;
        float sum = mine[0];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) sum += mine[w * TILE];
        gate[(long long)t * ROW_OPT + j] = to_result(biased<GATE_BIAS>(sum, bias, j));
    }
}
