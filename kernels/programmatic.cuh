// programmatic: launches that overlap the end of their predecessor on the stream (programmatic dependent launch, sm_90).
//
//   PROGRAMMATIC      the launch may start while its predecessor ends
//
// A launch is over when all of its blocks have ended; `let_successor_in` lets the next one on the stream start before. That one may
// be foreign, and write before it waits: then nothing may be left to read, by any warp of the block. But wait it must, if it starts
// so itself: whoever comes behind it waits for it alone, and is to find what this launch has written.

#ifdef __CUDACC__

// What the predecessor wrote can be read after this, and nothing may be written before it. Vectors that it may have written are
// not const __restrict__: the compiler would read them through a cache that holds only what never changes during the kernel.
__device__ __forceinline__ void wait_for_predecessor() {
#ifdef PROGRAMMATIC
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the successor's blocks start as soon as a thread of every block of this launch has come here, or the block has ended.
__device__ __forceinline__ void let_successor_in() {
#ifdef PROGRAMMATIC
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#else

__device__ __forceinline__ void wait_for_predecessor() {}

__device__ __forceinline__ void let_successor_in() {}

#endif
