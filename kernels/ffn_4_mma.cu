// ffn_4_mma: the down-projection of several tokens on tensor cores (formula 4), for whoever does without ffn_4's bits; weights of
// inputs that are inactive for every token are not read.
//
//   y[t, c] = sum over the j with x1[t, j] != 0 of x1[t, j] * w_down_t[j, c], + bias[c]        0 <= t < TOKENS, 0 <= c < d_model
//
//   x1 (TOKENS, d_ff) and w_down_t (d_ff, d_model), both 16-byte aligned   y (TOKENS, d_model), every element written
//   bias (d_model,) if DOWN_BIAS
//   partials   PARTS * 8 * d_model float32 numbers   tickets   a counter for each slice, zero before and after
//   launch   WARPS warps a block, grid PARTS * d_model / (16 * WORDS). A block has a slice of 16 * WORDS columns and one of PARTS
//            parts of the rows, in shares of a warp each. A warp lists the rows of its share that any token needs, each with what
//            x1 is there for all tokens, and multiplies 16 of them at a time. The last block of a slice adds up the parts
//            UNIT: neighbouring vectors of x1 that go to one share
//            SHARED_BYTES: dynamic shared memory of a block
//   numerics float32 accumulation, one rounding at the store, or none if PARTIAL. 16 rows of the union are added at a time by the
//            tensor cores, then warps and parts in their order: the bits of a token depend on the rows that others need. A token
//            gets nothing from rows where it is inactive: their products are zeros, and a sum that is NaN, as it would be with
//            weights that are infinite or NaN, is added up anew from the token's own rows

#include "bias.cuh"
#include "elements.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "programmatic.cuh"
#include "warp.cuh"

constexpr int THREADS = 32 * WARPS, SHARES = PARTS * WARPS;
constexpr int VECTORS = ROW_OPT / VEC, UNITS = (VECTORS + UNIT - 1) / UNIT;
constexpr int OWN = (UNITS + SHARES - 1) / SHARES * UNIT;  // vectors of a share, at most
constexpr int BATCH = 16,
              MOST = (OWN * VEC + BATCH - 1) / BATCH * BATCH;  // rows that are multiplied together; of a share, at most
constexpr int SLICE = 16 * WORDS, SUMS = MMA_TOKENS * SLICE;   // columns of a block, and their sums
constexpr int QUARTERS = WORDS / 4;                            // 16-byte loads of a row and lane
static_assert(ROW_OPT % VEC == 0 && ROW_OPT <= 65536 && COL_OPT % SLICE == 0,
              "whole vectors, 16-bit row numbers, whole slices");
static_assert(WORDS % 4 == 0, "a lane reads 16 bytes at a time");

struct Listed {
    union {
        uint4 entries[MOST];    // of a listed row: x1 of all tokens
        float4 sums[SUMS / 4];  // afterwards
    };
    unsigned short rows[MOST];
};

// Column, within the slice, of half h of word i of the lanes with this g.
__device__ __forceinline__ int column_of(int g, int i, int h) { return i / 4 * 64 + 8 * g + i % 4 * 2 + h; }

// A token's sum over its own rows.
__device__ __noinline__ float sum_alone(const scalar* x1, const scalar* w_down_t, int c) {
    float sum = 0.0f;
    for (int j = 0; j < ROW_OPT; ++j)
        if (is_nonzero(x1[j])) sum = fmaf(to_float(x1[j]), to_float(w_down_t[(long long)j * COL_OPT + c]), sum);
    return sum;
}

// Lists the share's rows, in the order of their lanes, and returns how many.
__device__ __forceinline__ int list_rows(Listed& listed, const scalar* x1, int share) {
    const int lane = threadIdx.x % 32;
    int n = 0;
#pragma unroll
    for (int first = 0; first < OWN; first += 32) {
        const int own = first + lane, vector = (own / UNIT * SHARES + share) * UNIT + own % UNIT;
        const bool is_own = vector < VECTORS;  // which lanes behind the share's last vector do not find
        uint4 v[MMA_TOKENS];
#pragma unroll
        for (int t = 0; t < MMA_TOKENS; ++t)
            v[t] = t < TOKENS && is_own ? chunks_of(x1)[t * VECTORS + vector] : uint4{0, 0, 0, 0};
        uint4 any = v[0];
#pragma unroll
        for (int t = 1; t < TOKENS; ++t) any = {any.x | v[t].x, any.y | v[t].y, any.z | v[t].z, any.w | v[t].w};
        unsigned active = 0;
#pragma unroll
        for (int e = 0; e < VEC; ++e) active |= is_nonzero(raw_element(any, e)) ? 1u << e : 0;
        int upto = __popc(active);  // inclusive sum over the lanes
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int lower = __shfl_up_sync(ALL_LANES, upto, step);
            if (lane >= step) upto += lower;
        }
        int at = n + upto - __popc(active);
        n += __shfl_sync(ALL_LANES, upto, 31);
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
            const auto pair = [&](int t) { return (unsigned)raw_element(v[t], e) | (unsigned)raw_element(v[t + 1], e) << 16; };
            const bool is_active = active & 1u << e;
            store_if(is_active, listed.entries + at, uint4{pair(0), pair(2), pair(4), pair(6)});
            store_if(is_active, listed.rows + at, (unsigned short)(vector * VEC + e));
            at += is_active;
        }
    }
    return n;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    ffn_4_mma(const scalar* x1, const scalar* w_down_t, result* __restrict__ y, int, int, const scalar* bias, const scalar*,
              float, float* partials, unsigned* tickets) {
    static_assert(sizeof(Listed) * WARPS <= SHARED_BYTES, "what a block keeps must fit its dynamic shared memory");
    Listed* of_warps = dynamic_shared<Listed>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int part = blockIdx.x % PARTS, slice = blockIdx.x / PARTS;
    Listed& listed = of_warps[warp];
    wait_for_predecessor();

    const int n = list_rows(listed, x1, part * WARPS + warp), batches = (n + BATCH - 1) / BATCH;
    if (n + lane < BATCH * batches) listed.entries[n + lane] = {0, 0, 0, 0};
    __syncwarp();

    // Lane 4 g + t loads, of the rows at 4 t to 4 t + 3 of a batch, what the slice has at 16 g bytes (and 128 on): whole pairs of
    // (row, next row) for each of its columns. Low halves of word i are row g of product i, high halves row g + 8.
    float sums[WORDS][4] = {};
    uint4 slots[4][QUARTERS];
    const char* from = in_registers(reinterpret_cast<const char*>(w_down_t + slice * SLICE) + 16 * g);
    const auto ask = [&](int batch) {
        if (batch >= batches) return;
        const uint2 of_rows = reinterpret_cast<const uint2*>(listed.rows)[batch * (BATCH / 4) + t];
        const int left = n - BATCH * batch - 4 * t;
        const unsigned rows[4] = {of_rows.x & 0xffff, of_rows.x >> 16, of_rows.y & 0xffff, of_rows.y >> 16};
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int q = 0; q < QUARTERS; ++q)
                slots[j][q] = left > j ? load_once_with_neighbours(reinterpret_cast<const uint4*>(
                                             advanced(from + 128 * q, rows[j], COL_OPT * sizeof(scalar))))
                                       : uint4{0, 0, 0, 0};
    };
    ask(0);
    // Row k of the second factor is list position 4 (k / 2) + k % 2, and 2 on for k >= 8: so a lane's four rows are its own pairs.
    const uint4* entry = listed.entries + lane % 8 / 2 * 4 + lane % 2 + lane / 8 % 2 * 2;
#pragma unroll 1
    for (int batch = 0; batch < batches; ++batch) {
        unsigned b0, b1;
        load_second(b0, b1, entry + batch * BATCH);
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            const auto word = [&](int j) {
                const uint4& v = slots[j][i / 4];
                return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
            };
            add_product(sums[i], __byte_perm(word(0), word(1), 0x5410), __byte_perm(word(0), word(1), 0x7632),
                        __byte_perm(word(2), word(3), 0x5410), __byte_perm(word(2), word(3), 0x7632), b0, b1);
        }
        ask(batch + 1);
    }

    // Over the warps. Sum o of a slice is [word][lane][of the lane].
    __syncwarp();
#pragma unroll
    for (int i = 0; i < WORDS; ++i) listed.sums[i * 32 + lane] = {sums[i][0], sums[i][1], sums[i][2], sums[i][3]};
    __syncthreads();
    const auto over_warps = [&](int o) {
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) total += reinterpret_cast<const float*>(of_warps[i].sums)[o];
        return total;
    };
    const auto store = [&](int o, float total) {
        const int of_lane = o / 4 % 32, token = of_lane % 4 * 2 + o % 2;
        const int c = slice * SLICE + column_of(of_lane / 4, o / 128, o / 2 % 2);
        if (token >= TOKENS) return;
        if (total != total) total = sum_alone(x1 + token * ROW_OPT, w_down_t, c);
        y[(long long)token * COL_OPT + c] = to_result(biased<DOWN_BIAS>(total, bias, c));
    };
    if constexpr (PARTS == 1) {
        for (int o = threadIdx.x; o < SUMS; o += THREADS) store(o, over_warps(o));
        return;
    }

    // The block of a slice that comes last adds up what all have found.
    unsigned short& is_last = of_warps[0].rows[0];  // a row number that nobody needs any more
    float* const of_slice = partials + (long long)slice * PARTS * SUMS;
    for (int o = threadIdx.x; o < SUMS; o += THREADS) of_slice[part * SUMS + o] = over_warps(o);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicInc(tickets + slice, PARTS - 1) == PARTS - 1;  // which leaves zero
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    const volatile float* const all = of_slice;
    for (int o = threadIdx.x; o < SUMS; o += THREADS) {
        float found[PARTS], total = 0.0f;
#pragma unroll
        for (int p = 0; p < PARTS; ++p) found[p] = all[p * SUMS + o];
#pragma unroll
        for (int p = 0; p < PARTS; ++p) total += found[p];
        store(o, total);
    }
}
