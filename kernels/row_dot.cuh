// dot(row, x) by one warp or by two, for the operators that read whole rows.
//
//   PIECE   16-byte loads of a lane whose products it adds up at a time. The sums of even and of odd pieces are kept apart, so that two
//           warps can have half of a row each. The order of a sum, so its bits, depends on PIECE and on nothing else of the launch.
//   LOADS   loads that a lane has in flight, a multiple of PIECE. One row is 8 to 10 KB: in one or two batches of loads its time is one
//           or two trips to memory.

#if !defined(LOADS) || !defined(PIECE)
#error "define LOADS and PIECE"
#endif
static_assert(LOADS % PIECE == 0, "a batch of loads is whole pieces");

// Partial sums of a lane, so that its additions do not all wait for each other. ffn_23 at 7B, 99 %, H100: 3.9 µs with one, 3.75 with two
// or four.
constexpr int SUMS = 2;

// Whether a row has vector c of a batch that starts inside it. Where rows are whole batches no check is left.
__device__ __forceinline__ bool exists(int c, int chunks) {
#ifdef COL_OPT
    if (COL_OPT / VEC % (32 * LOADS) == 0) return true;
#endif
    return c < chunks;
}

// Vectors first + lane, first + lane + 32, ... of the row; zeros behind its end.
__device__ __forceinline__ void load_batch(uint4 (&w)[LOADS], const uint4* __restrict__ row, int first, int chunks) {
    const int own = first + threadIdx.x % 32;
    row += own;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) w[i] = exists(own + 32 * i, chunks) ? load_once(row + 32 * i) : uint4{0, 0, 0, 0};
    // Or the compiler would start on the first vectors before it has asked for the last: ffn_23, 7B, 89 %, H100: 6.1 µs, not 5.6.
    __syncwarp();
}

// The lane's sum over a piece of the batch that starts at vector `first`.
__device__ __forceinline__ float piece_sum(const uint4 (&w)[LOADS], int piece, const uint4* x, int first, int chunks) {
    const int own = first + threadIdx.x % 32;
    x += own;
    float sums[SUMS] = {};
#pragma unroll
    for (int i = piece * PIECE; i < (piece + 1) * PIECE; ++i) {
        if (!exists(own + 32 * i, chunks)) break;
        const uint4 v = x[32 * i];
#pragma unroll
        for (int e = 0; e < VEC; ++e) sums[e % SUMS] = fmaf(element(w[i], e), element(v, e), sums[e % SUMS]);
    }
    return sums[0] + sums[1];
}

// row, x: `chunks` vectors each. The result is in every lane.
__device__ __forceinline__ float row_dot(const uint4* __restrict__ row, const uint4* x, int chunks) {
    float next = 0.0f, other = 0.0f;  // sums of the even and of the odd pieces, in turn
#pragma unroll 1
    for (int first = 0; first < chunks; first += 32 * LOADS) {
        uint4 w[LOADS];
        load_batch(w, row, first, chunks);
#pragma unroll
        for (int piece = 0; piece < LOADS / PIECE; ++piece) {
            const float sum = next + piece_sum(w, piece, x, first, chunks);
            next = other;
            other = sum;
        }
    }
    return warp_sum(next + other);
}

#if LOADS == PIECE
// The lane's sum over the even (half 0) or the odd (half 1) pieces: warp_sum of both together is row_dot, to the bit.
__device__ __forceinline__ float half_row(const uint4* __restrict__ row, const uint4* x, int half, int chunks) {
    float sum = 0.0f;
#pragma unroll 1
    for (int first = 32 * PIECE * half; first < chunks; first += 64 * PIECE) {
        uint4 w[LOADS];
        load_batch(w, row, first, chunks);
        sum += piece_sum(w, 0, x, first, chunks);
    }
    return sum;
}
#endif
