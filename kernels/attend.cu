// attend: attention of new tokens over static caches, to which the tokens' own keys and values are added.
//
//   out[s, t, h, :] = sum_i softmax_i(scale * dot(q[s, t, h, :], keys[s, g, i, :])) * values[s, g, i, :]
//
//   over first <= i <= p, g = h / (H / G), of TOKENS tokens in a row of each of SEQUENCES sequences. p = position[s] + t, at
//   which k[s, t] and v[s, t] are stored in the cache; first = max(0, p + 1 - window), or 0 if window is 0. Where the cache has
//   no position p, nothing of the token is stored and its out is NaN: only the device knows p.
//
//   q, out (SEQUENCES, TOKENS, H, HEAD_DIM)   k, v (SEQUENCES, TOKENS, G, HEAD_DIM)   position (SEQUENCES,)
//   keys, values (SEQUENCES, G, capacity, HEAD_DIM)                       all but position 16-byte aligned, all row-major
//   partials (SEQUENCES * TOKENS * H * SPLITS * (HEAD_DIM + 2)) float32
//   tickets (SEQUENCES * TOKENS * BLOCKS) zeros, and zeros again afterwards
//   launch   SPLITS blocks share the positions of HEADS heads of a token that read the same keys;
//            grid (SPLITS * TOKENS, BLOCKS, SEQUENCES)
//   numerics float32 throughout, one rounding at the store; the order of sums depends on p, window and the constants of a head
//            alone: not on the cache's capacity, nor on the GPU, nor on the other tokens of a launch
//   order    every block takes keys and values of the launch's own tokens from k and v, and nothing reads what is stored
//            before the launch has ended, so blocks may run in any order
//
//   HEAD_DIM   elements of a head          HEADS    heads of a block          BLOCKS   that have heads of their own: H / HEADS
//   SHARERS    blocks of heads that read the same keys: H / G / HEADS
//   SPLITS     blocks that share the positions          WARPS    of a block

#include "elements.cuh"
#include "programmatic.cuh"
#include "warp.cuh"

static_assert(HEAD_DIM % VEC == 0, "a head must be whole 16-byte vectors");
static_assert(SEQUENCES >= 1 && TOKENS >= 1, "at least one token of one sequence");

constexpr int power_of_two_from(int n) { return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2); }

constexpr int VECTORS = HEAD_DIM / VEC;
constexpr int LANES = VECTORS > 32 ? 32 : power_of_two_from(VECTORS);  // read a position together
constexpr int OWN = (VECTORS + LANES - 1) / LANES;                     // vectors of a lane
constexpr int SLOTS = WARPS * 32 / LANES;                              // positions that a block reads side by side
constexpr int BATCH = OWN > 1 ? 2 : 4;                                 // positions that a lane has in flight
constexpr int KV_HEADS = BLOCKS / SHARERS;                             // G
constexpr float LOWEST = -3e38f;                                       // below every finite score that matters
constexpr float LOG2_E = 1.4426950408889634f;

// A running softmax: the largest score, the sum of weights relative to it, and the weighted sum of values.
struct Softmax {
    float most, sum, values[OWN * VEC];

    __device__ __forceinline__ void rescale(float larger) {
        const float factor = exp2f(most - larger);
        most = larger, sum *= factor;
#pragma unroll
        for (int e = 0; e < OWN * VEC; ++e) values[e] *= factor;
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    attend(const scalar* q, const scalar* k, const scalar* v, scalar* keys, scalar* values, const long long* position,
           scalar* __restrict__ out, float* partials, unsigned* tickets, float scale, int window, int capacity) {
    __shared__ float shared_most[WARPS][HEADS], shared_sum[WARPS][HEADS], shared_values[WARPS][HEADS][HEAD_DIM];
    __shared__ bool is_last;
    // Tokens of one sequence read the same positions: next to each other, they find them in L2.
    const int split = blockIdx.x / TOKENS, token = blockIdx.x % TOKENS, block = blockIdx.y, g = block / SHARERS;
    const long long sequence = SEQUENCES > 1 ? blockIdx.z : 0, row_of_q = sequence * TOKENS + token;
    const int lane = threadIdx.x % LANES, slot = threadIdx.x / LANES, warp = threadIdx.x / 32;
    q += row_of_q * (BLOCKS * HEADS * HEAD_DIM), out += row_of_q * (BLOCKS * HEADS * HEAD_DIM);
    k += sequence * (TOKENS * KV_HEADS * HEAD_DIM), v += sequence * (TOKENS * KV_HEADS * HEAD_DIM);
    keys += sequence * KV_HEADS * capacity * HEAD_DIM, values += sequence * KV_HEADS * capacity * HEAD_DIM;
    partials += row_of_q * (BLOCKS * SPLITS * HEADS * (HEAD_DIM + 2)), tickets += row_of_q * BLOCKS, position += sequence;
    wait_for_predecessor();

    if (*position < 0 || *position >= capacity - token) {
        for (int d = threadIdx.x; split == 0 && d < HEADS * HEAD_DIM; d += 32 * WARPS)
            out[block * HEADS * HEAD_DIM + d] = from_float(__uint_as_float(0x7fffffffu));
        return;
    }
    const int start = (int)*position, p = start + token;
    const int first = window > 0 && p + 1 > window ? p + 1 - window : 0;
    const int share = ((p + 1 - first + SPLITS - 1) / SPLITS + SLOTS - 1) / SLOTS * SLOTS;
    const int begin = first + split * share, end = begin + share < p + 1 ? begin + share : p + 1;

    float query[HEADS][OWN * VEC];
    Softmax own[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        own[h].most = LOWEST, own[h].sum = 0.0f;
#pragma unroll
        for (int n = 0; n < OWN; ++n) {
            const int c = n * LANES + lane;
            const uint4 from = c < VECTORS ? reinterpret_cast<const uint4*>(q)[(block * HEADS + h) * VECTORS + c] : uint4{};
#pragma unroll
            for (int e = 0; e < VEC; ++e) {
                query[h][n * VEC + e] = element(from, e) * (scale * LOG2_E);
                own[h].values[n * VEC + e] = 0.0f;
            }
        }
    }

    for (int base = begin; base < end; base += SLOTS * BATCH) {
        uint4 key[BATCH][OWN], value[BATCH][OWN];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const int i = base + b * SLOTS + slot;
            const bool is_new = TOKENS > 1 ? i >= start : i == p;
            const int new_row = TOKENS > 1 ? (i - start) * KV_HEADS + g : g;
            const long long row = (long long)(is_new ? new_row : g * (long long)capacity + i) * VECTORS;
            const uint4* key_row = reinterpret_cast<const uint4*>(is_new ? k : keys) + row;
            const uint4* value_row = reinterpret_cast<const uint4*>(is_new ? v : values) + row;
#pragma unroll
            for (int n = 0; n < OWN; ++n) {
                const int c = n * LANES + lane;
                const bool exists = i < end && c < VECTORS;
                key[b][n] = exists ? key_row[c] : uint4{};
                value[b][n] = exists ? value_row[c] : uint4{};
            }
        }
        __syncwarp();  // all loads before the first use
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const int i = base + b * SLOTS + slot;
            if (i == p && i < end && block % SHARERS == 0) {
                const long long row = (g * (long long)capacity + p) * VECTORS;
#pragma unroll
                for (int n = 0; n < OWN; ++n) {
                    const int c = n * LANES + lane;
                    if (c < VECTORS) {
                        reinterpret_cast<uint4*>(keys)[row + c] = key[b][n];
                        reinterpret_cast<uint4*>(values)[row + c] = value[b][n];
                    }
                }
            }
        }
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            float score[BATCH], larger = own[h].most;
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                score[b] = 0.0f;
#pragma unroll
                for (int e = 0; e < OWN * VEC; ++e) score[b] = fmaf(query[h][e], element(key[b][e / VEC], e % VEC), score[b]);
#pragma unroll
                for (int step = LANES / 2; step > 0; step /= 2) score[b] += __shfl_xor_sync(ALL_LANES, score[b], step);
                if (base + b * SLOTS + slot >= end) score[b] = __uint_as_float(0xff800000u);  // -infinity
                larger = fmaxf(larger, score[b]);
            }
            own[h].rescale(larger);
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                const float weight = exp2f(score[b] - larger);
                own[h].sum += weight;
#pragma unroll
                for (int e = 0; e < OWN * VEC; ++e)
                    own[h].values[e] = fmaf(weight, element(value[b][e / VEC], e % VEC), own[h].values[e]);
            }
        }
    }

    // The slots of a warp, then its first slot to shared memory.
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
#pragma unroll
        for (int step = LANES; step < 32; step *= 2) {
            own[h].rescale(fmaxf(own[h].most, __shfl_xor_sync(ALL_LANES, own[h].most, step)));
            own[h].sum += __shfl_xor_sync(ALL_LANES, own[h].sum, step);
#pragma unroll
            for (int e = 0; e < OWN * VEC; ++e) own[h].values[e] += __shfl_xor_sync(ALL_LANES, own[h].values[e], step);
        }
        if (threadIdx.x % 32 >= LANES) continue;
        if (lane == 0) shared_most[warp][h] = own[h].most, shared_sum[warp][h] = own[h].sum;
#pragma unroll
        for (int e = 0; e < OWN * VEC; ++e) {
            const int d = (e / VEC * LANES + lane) * VEC + e % VEC;
            if (d < HEAD_DIM) shared_values[warp][h][d] = own[h].values[e];
        }
    }
    __syncthreads();
    let_successor_in();  // all is read but what blocks leave for one another

    // The warps of the block.
    float* const mine = partials + (long long)(block * SPLITS + split) * HEADS * (HEAD_DIM + 2);
    for (int d = threadIdx.x; d < HEADS * HEAD_DIM; d += 32 * WARPS) {
        const int h = d / HEAD_DIM;
        float most = LOWEST, sum = 0.0f, total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) most = fmaxf(most, shared_most[w][h]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float factor = exp2f(shared_most[w][h] - most);
            sum = fmaf(factor, shared_sum[w][h], sum);
            total = fmaf(factor, shared_values[w][h][d % HEAD_DIM], total);
        }
        if (SPLITS == 1) {
            out[block * HEADS * HEAD_DIM + d] = from_float(total / sum);
            continue;
        }
        mine[d] = total;
        if (d % HEAD_DIM == 0) mine[HEADS * HEAD_DIM + 2 * h] = most, mine[HEADS * HEAD_DIM + 2 * h + 1] = sum;
    }
    if (SPLITS == 1) return;

    // The block that comes last adds up what all have found.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(tickets + block, 1u) == SPLITS - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (threadIdx.x == 0) tickets[block] = 0;
    const volatile float* const all = partials + (long long)block * SPLITS * HEADS * (HEAD_DIM + 2);
    for (int d = threadIdx.x; d < HEADS * HEAD_DIM; d += 32 * WARPS) {
        const int h = d / HEAD_DIM;
        float part[SPLITS], found_most[SPLITS], found_sum[SPLITS], most = LOWEST, sum = 0.0f, total = 0.0f;
#pragma unroll
        for (int s = 0; s < SPLITS; ++s) {
            const volatile float* const found = all + s * HEADS * (HEAD_DIM + 2);
            part[s] = found[d], found_most[s] = found[HEADS * HEAD_DIM + 2 * h];
            found_sum[s] = found[HEADS * HEAD_DIM + 2 * h + 1];
        }
#pragma unroll
        for (int s = 0; s < SPLITS; ++s) most = fmaxf(most, found_most[s]);
#pragma unroll
        for (int s = 0; s < SPLITS; ++s) {
            const float factor = exp2f(found_most[s] - most);
            sum = fmaf(factor, found_sum[s], sum);
            total = fmaf(factor, part[s], total);
        }
        out[block * HEADS * HEAD_DIM + d] = from_float(total / sum);
    }
}
