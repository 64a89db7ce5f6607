// Values whose origin the compiler is not to know, so that it does not keep in registers what can be computed again.
//
// A zero in shared memory is read anew for each of them. An empty assembly statement would hold up the first half of
// the compiler only: the assembler below it finds equal expressions too.
#pragma once
#include <cstdint>

namespace packseq {

// The block's dynamic shared memory, with the zero in front of what is free.
__device__ __forceinline__ float4* start_opaque(float4* shared) {
  if (threadIdx.x == 0) *shared = float4{};
  __syncthreads();
  return shared + 1;
}
constexpr int kOpaqueBytes = 16;

// x. free_shared: what start_opaque() gave.
__device__ __forceinline__ int opaque(int x, const float4* free_shared) {
  return x + *reinterpret_cast<const volatile int*>(free_shared - 1);
}

}  // namespace packseq
