// A barrier among some of a block's warps.
#pragma once

namespace packseq {

// Waits for `threads` threads, a multiple of 32, that name the same barrier; 0 is __syncthreads()'s own, 15 the last.
__device__ __forceinline__ void named_barrier(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Counts as one of them without waiting: what the warp has written is there for those that wait.
__device__ __forceinline__ void arrive_at_named_barrier(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace packseq
