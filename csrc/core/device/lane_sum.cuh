// Sums over lanes of a warp in a fixed order: a tree, the same whoever else is in the warp.
#pragma once
#include "core/device/guarded_access.cuh"

namespace packseq {

// The bits of the lane number that count one coordinate of a warp, lowest first.
template <int... kBits>
struct LaneBits {
  static constexpr int kCount = 1 << sizeof...(kBits);

  // This lane's coordinate.
  static __device__ __forceinline__ int index() {
    const int lane = threadIdx.x % 32;
    int at = 0, i = 0;
    ((at |= (lane >> kBits & 1) << i++), ...);
    return at;
  }
  static constexpr int bit(int i) {
    constexpr int bits[] = {kBits..., 0};
    return bits[i];
  }
  static constexpr int log2() { return sizeof...(kBits); }
};

// x[i] summed over the lanes of a coordinate, for all kCount of i with about as many shuffles: afterwards x[0 ...
// kCount / lanes) of the lane with coordinate s holds sums s * kCount / lanes and on; where there are more lanes than
// sums, x[0] holds sum s % kCount.
template <class Bits, int kCount>
__device__ __forceinline__ void sum_over_lanes(float (&x)[kCount]) {
  const int lane = threadIdx.x % 32;
  constexpr int kLog2Sums = kCount == 1 ? 0 : 31 - __builtin_clz(kCount);
  constexpr int kSplit = Bits::log2() < kLog2Sums ? Bits::log2() : kLog2Sums;  // bits that choose among the sums
#pragma unroll
  for (int i = kSplit - 1; i >= 0; --i) {
    const int half = kCount >> (kSplit - i);
    const bool upper = lane >> Bits::bit(i) & 1;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const float send = select(upper, x[k], x[k + half]), keep = select(upper, x[k + half], x[k]);
      x[k] = keep + __shfl_xor_sync(~0u, send, 1 << Bits::bit(i));
    }
  }
#pragma unroll
  for (int i = kSplit; i < Bits::log2(); ++i) x[0] += __shfl_xor_sync(~0u, x[0], 1 << Bits::bit(i));
}

}  // namespace packseq
