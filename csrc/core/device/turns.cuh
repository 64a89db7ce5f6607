// Additions of many blocks to one place in a fixed order: each waits for its turn, adds, and hands on.
//
// Blocks start in the order of their numbers, so a block may wait for lower-numbered ones and for no others.
#pragma once
#include <cstdint>

namespace packseq {

// Returns, in every lane of the warp, once `counter` has reached `turn`.
__device__ __forceinline__ void await_turn(const int* counter, int turn) {
  if (threadIdx.x % 32 == 0) {
    int now;
    do {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    } while (now < turn);
  }
  __syncwarp();
}

// To be called by one thread, after a barrier that follows the block's additions.
__device__ __forceinline__ void pass_turn(int* counter) {
  __threadfence();
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

// Adds four floats to global memory, each exactly once; nobody waits for the outcome.
__device__ __forceinline__ void add_global(float* address, float4 x) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
#else
  atomicAdd(address, x.x);
  atomicAdd(address + 1, x.y);
  atomicAdd(address + 2, x.z);
  atomicAdd(address + 3, x.w);
#endif
}

}  // namespace packseq
