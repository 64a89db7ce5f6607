// The spectrum of S4's filters in one pass: the sums over one denominator, then the correction for the low rank.
#pragma once
#include "longconv/s4_sums.cuh"

namespace packseq {

struct S4Forward {
  S4Call call;
  Complex* out;   // [filters, channels, frequencies]
  int64_t tiles;  // of kS4ForwardTile frequencies
};

inline constexpr int kS4ForwardTile = 8 * kS4Threads;

namespace {

// A block: one channel and a tile of frequencies; kFilters filters at a time.
template <int kRank, int kFilters>
__global__ void __launch_bounds__(kS4Threads) s4_spectrum_kernel(const __grid_constant__ S4Forward params) {
  using Terms = S4Terms<kRank, kFilters>;
  __shared__ S4Sums<kRank, kFilters, 2> sums;
  const S4Call& s = params.call;
  const int64_t channel = blockIdx.x / unsigned(params.tiles), frequencies = s.frequencies();
  const int64_t first = blockIdx.x % unsigned(params.tiles) * int64_t(kS4ForwardTile);
  const int64_t last = min(first + kS4ForwardTile, frequencies);
  const S4Nodes nodes(s.length);
  int64_t held = -1;
  for (int64_t first_filter = 0; first_filter < s.filters; first_filter += kFilters) {
#pragma unroll 1
    for (int64_t j = first + threadIdx.x; j - threadIdx.x < last; j += kS4Threads) {
      const S4Node node = nodes.at(min(j, frequencies - 1));
      Complex q[Terms::kCount];
      sums.at(s, channel, first_filter, node, held, q);
      if (j >= frequencies) continue;
      Complex left[kRank + 1];  // e (1 + e Q)^-1 q(B, P^*)
      if constexpr (kRank > 0) {
        Complex M[kRank * kRank];
        s4_inverse<kRank>(&q[Terms::of_inner(0, 0)], node.e(), M);
#pragma unroll
        for (int a = 0; a < kRank; ++a) {
          Complex sum = M[a * kRank] * q[Terms::of_left(0)];
          if constexpr (kRank == 2) sum = sum + M[a * kRank + 1] * q[Terms::of_left(1)];
          left[a] = node.e() * sum;
        }
      }
#pragma unroll
      for (int f = 0; f < kFilters; ++f) {
        if (first_filter + f >= s.filters) break;
        Complex sum = q[Terms::of_output(f)];
#pragma unroll
        for (int a = 0; a < kRank; ++a) sum = sum - left[a] * q[Terms::of_right(f, a)];
        params.out[((first_filter + f) * s.channels + channel) * frequencies + j] = node.half * sum;
      }
    }
  }
}

}  // namespace
}  // namespace packseq
