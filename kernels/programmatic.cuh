// programmatic: launches that overlap the end of their predecessor on the stream (programmatic dependent launch, sm_90).
//
//   PROGRAMMATIC      the launch may start while its predecessor ends
//   EARLY_SUCCESSOR   its successor may start before this launch has written its results

#ifdef __CUDACC__

// What the predecessor wrote can be read after this, and nothing may be written before it. Vectors that it may have written are
// not const __restrict__: the compiler would read them through a cache that holds only what never changes during the kernel.
__device__ __forceinline__ void wait_for_predecessor() {
#ifdef PROGRAMMATIC
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Starts the successor's blocks as soon as all blocks of this launch have come here. All threads call it after their last read,
// because a foreign successor may write before it waits and must overwrite nothing that is still needed.
__device__ __forceinline__ void let_successor_in() {
#ifdef EARLY_SUCCESSOR
    asm volatile("bar.sync 0;\n griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#else

__device__ __forceinline__ void wait_for_predecessor() {}

__device__ __forceinline__ void let_successor_in() {}

#endif
