// The list of a block's active rows, for the operators that skip rows.
//
// The d_ff values that decide (gate or x1) are dealt as 16-byte vectors: vector v belongs to set v % SETS, so that clusters of
// active neurons spread over the sets. A block lists one set, a tile at a time: first each thread finds its active_bits, then
// list_rows writes down the rows behind the bits.
//
//   SETS   sets of rows
//   EACH   vectors that a thread looks at in a tile

#if !defined(SETS) || !defined(EACH)
#error "define SETS and EACH"
#endif

constexpr int THREADS = 32 * WARPS;
constexpr int TILE_VECTORS = EACH * THREADS;  // of the set, in a tile
constexpr int TILE_ROWS = TILE_VECTORS * VEC;
static_assert(EACH * VEC <= 32, "a thread keeps a bit per row");
static_assert(TILE_ROWS <= 65536, "the list holds 16-bit entries");

// First row of the set's i-th vector, counted from the tile's first vector `tile`.
__device__ __forceinline__ int first_row(int tile, int set, int i) { return (tile + i * SETS + set) * VEC; }

// The row behind an entry of the list: i * VEC + e for element e of the set's i-th vector in the tile.
__device__ __forceinline__ int row_of(int tile, int set, int entry) { return first_row(tile, set, entry / VEC) + entry % VEC; }

// Bit k * VEC + e of a thread: whether is_on() holds for element e of its k-th vector, number k * THREADS + threadIdx.x of the tile.
// `values` is 16-byte aligned.
template <class IsOn>
__device__ __forceinline__ unsigned active_bits(const scalar* __restrict__ values, int rows, int tile, int set, IsOn is_on) {
    uint4 v[EACH];  // all loads before the first use
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int row = first_row(tile, set, k * THREADS + threadIdx.x);
        v[k] = row + VEC <= rows ? *reinterpret_cast<const uint4*>(values + row) : uint4{0, 0, 0, 0};
    }
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int row = first_row(tile, set, k * THREADS + threadIdx.x);
        if (row >= rows) break;
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
            scalar value = raw_element(v[k], e);
            if (rows % VEC != 0 && row + VEC > rows && row + e < rows) value = values[row + e];  // the vector that d_ff cuts off
            bits |= (unsigned)is_on(value) << (k * VEC + e);
        }
    }
    return bits;
}

// Writes the entries behind all threads' bits to `list`, in an order that only the bits decide, and returns how many there are. The
// first barrier also keeps the list of one tile from overwriting that of another, which may still be read.
__device__ __forceinline__ int list_rows(unsigned bits, unsigned short* list, int* warp_counts) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int count = __popc(bits);
    int upto = count;  // inclusive sum of the counts over the warp's lanes
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int lower = __shfl_up_sync(ALL_LANES, upto, step);
        if (lane >= step) upto += lower;
    }
    if (lane == 31) warp_counts[warp] = upto;
    __syncthreads();

    int position = upto - count, total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        if (w < warp) position += warp_counts[w];
        total += warp_counts[w];
    }
    for (; bits != 0; bits &= bits - 1) {
        const int bit = __ffs(bits) - 1;
        list[position++] = (bit / VEC * THREADS + threadIdx.x) * VEC + bit % VEC;
    }
    __syncthreads();
    return total;
}
