// all_reduce: the sum of the vectors of several GPUs, on each of them, for vectors so short that latency is all there is.
//
//   out[i] = part_0[i] + part_1[i] + ... + part_{RANKS-1}[i]     part_r that of the GPU with this rank
//
//   part, out (numbers,) float32, may be the same        every GPU launches this with the same numbers, in the same order
//   mail      (2, RANKS, capacity, 2) words of 64 bits, zeros at first: what the others have sent, by parity of the exchange
//             and rank of the sender; 16-byte aligned
//   offsets   (RANKS,) where each GPU's mail is, in bytes from this one's: the GPUs of one host see each other's memory; behind
//             them where the word lies that is zero until this GPU is to wait no more, and to add what there is, in bytes from here
//   exchanges (ceil(capacity / THREADS),) zeros at first: in how many exchanges each block has been
//   launch    a thread has two numbers, which it sends to all others and receives from them; grid ceil(numbers / 2 / THREADS),
//             at most ceil(capacity / THREADS). All its blocks have to fit on the GPU at once, since each waits for the other GPUs'.
//             Meanwhile its successor's blocks may fill the GPU, so no two streams of it may have such a sum at the same time
//   numerics  float32, in the order of ranks, subnormals kept: the same bits on every GPU
//   order     a GPU sends in exchange e once its exchange e - 1 has ended. That had words of every other GPU's exchange e - 1,
//             which had sent them after its own exchange e - 2 had ended. So nobody reads what is overwritten: of exchange e - 2
//   waiting   a GPU that has waited for `seconds` ends its launch with an error, after which its process has no CUDA any more
//
//   RANKS     GPUs          THREADS   of a block          MIN_BLOCKS   that a multiprocessor must hold

#include "peers.cuh"
#include "programmatic.cuh"

static_assert(RANKS >= 2, "one GPU has nothing to add");

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    all_reduce(const float* part, float* out, ulonglong2* mail, const long long* offsets, unsigned* exchanges, int rank,
               int numbers, int capacity, int seconds) {
    const int pair = blockIdx.x * THREADS + threadIdx.x, i = 2 * pair;
    const bool exists = i < numbers, is_whole = i + 1 < numbers;
    ulonglong2* to[RANKS];
#pragma unroll
    for (int r = 0; r < RANKS; ++r) to[r] = reinterpret_cast<ulonglong2*>(reinterpret_cast<char*>(mail) + offsets[r]);
    wait_for_predecessor();

    const unsigned exchange = exchanges[blockIdx.x] + 1;
    const long long parity = exchange % 2;
    float2 own = {0.0f, 0.0f}, sum = {0.0f, 0.0f};
    if (exists) {
        own = {part[i], is_whole ? part[i + 1] : 0.0f};
#pragma unroll
        for (int r = 0; r < RANKS; ++r)
            if (r != rank) send(to[r] + (parity * RANKS + rank) * capacity + pair, own.x, own.y, exchange);
    }
    __syncthreads();  // every thread has read its numbers, and that of the exchange
    if (threadIdx.x == 0) exchanges[blockIdx.x] = exchange;
    let_successor_in();  // whose start hides behind the way from the other GPUs
    if (exists) {
#pragma unroll
        for (int r = 0; r < RANKS; ++r) {
            const float2 other =
                r == rank ? own : receive(mail + (parity * RANKS + r) * capacity + pair, exchange, offsets, seconds);
            sum = r == 0 ? other : float2{sum_of(sum.x, other.x), sum_of(sum.y, other.y)};
        }
    }
    if (exists) out[i] = sum.x;
    if (is_whole) out[i + 1] = sum.y;
}
