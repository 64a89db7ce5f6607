// What many blocks do to one place in a fixed order: each waits for its turn, adds or writes, and hands on.
//
// Blocks start in the order of their numbers, so a block may wait for lower-numbered ones and for no others.
#pragma once
#include <cstdint>

namespace packseq {

// How far a counter has come. Additions made after it has reached one's turn come after those that were made before
// it was passed on: both are performed in the L2.
__device__ __forceinline__ int look_at(const int* counter) {
  int turn;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(turn) : "l"(counter) : "memory");
  return turn;
}

// Waits until all that the warp's lanes have added or written is there for everyone, and what the block's other threads
// had before a barrier that this warp has passed; then lane 0 may pass turns on.
__device__ __forceinline__ void settle_additions() {
  __syncwarp();
  if (threadIdx.x % 32 == 0) asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// Counters never go down, even where malformed boundaries make two sequences share one: nobody waits for ever.
__device__ __forceinline__ void pass_turn(int* counter, int turn) {
  if (threadIdx.x % 32 == 0) {
    asm volatile("red.relaxed.gpu.global.max.s32 [%0], %1;" ::"l"(counter), "r"(turn) : "memory");
  }
}

// Waits until the counter has come to `turn`; what was settled before that was passed on is there for the warp then.
__device__ __forceinline__ void await_turn(const int* counter, int turn) {
  if (threadIdx.x % 32 == 0) {
    while (look_at(counter) < turn) __nanosleep(64);
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
  }
  __syncwarp();
}

// Adds floats to global memory, each exactly once; nobody waits for the outcome.
__device__ __forceinline__ void add_global(float4* address, float4 x) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
#else
  atomicAdd(&address->x, x.x);
  atomicAdd(&address->y, x.y);
  atomicAdd(&address->z, x.z);
  atomicAdd(&address->w, x.w);
#endif
}

__device__ __forceinline__ void add_global(float2* address, float2 x) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(x.x), "f"(x.y) : "memory");
#else
  atomicAdd(&address->x, x.x);
  atomicAdd(&address->y, x.y);
#endif
}

}  // namespace packseq
