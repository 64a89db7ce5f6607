// The spectrum of S4's filters in one pass: the sums over one denominator, then the correction for the low rank.
#pragma once
#include "longconv/s4_sums.cuh"

namespace packseq {

struct S4Forward {
  S4Call call;
  Complex* out;   // [filters, channels, frequencies]
  int64_t tiles;  // of frequencies
};

// Nodes of a thread: as many as keep all sums in registers.
template <int kRank, int kFilters>
inline constexpr int kS4Nodes = S4Terms<kRank, kFilters>::kCount <= 4   ? 4
                                : S4Terms<kRank, kFilters>::kCount <= 9 ? 2
                                                                        : 1;

namespace {

// A block: one channel and a tile of frequencies; kFilters filters at a time.
template <int kRank, int kFilters>
__global__ void __launch_bounds__(kS4Threads, 3) s4_spectrum_kernel(const __grid_constant__ S4Forward params) {
  using Terms = S4Terms<kRank, kFilters>;
  constexpr int kNodes = kS4Nodes<kRank, kFilters>;
  __shared__ S4Poles<kRank, kFilters, 0> poles;
  const S4Call& s = params.call;
  const int64_t channel = blockIdx.x / params.tiles, frequencies = s.frequencies();
  const int64_t first = blockIdx.x % params.tiles * (kNodes * kS4Threads) + threadIdx.x;
  Complex half[kNodes];
  S4Node node[kNodes];
#pragma unroll
  for (int i = 0; i < kNodes; ++i) {
    half[i] = half_turn(min(first + i * kS4Threads, frequencies - 1), s.length);
    node[i] = S4Node::at(half[i]);
  }
  for (int64_t first_filter = 0; first_filter < s.filters; first_filter += kFilters) {
    Complex q[kNodes][Terms::kCount];
    s4_sums<kRank, kFilters>(s, poles, channel, first_filter, node, q);
#pragma unroll
    for (int i = 0; i < kNodes; ++i) {
      const int64_t j = first + i * kS4Threads;
      if (j >= frequencies) break;
      Complex left[kRank + 1];  // e (1 + e Q)^-1 q(B, P^*)
      if constexpr (kRank > 0) {
        Complex M[kRank * kRank];
        s4_inverse<kRank>(&q[i][Terms::of_inner(0, 0)], node[i].e, M);
#pragma unroll
        for (int a = 0; a < kRank; ++a) {
          Complex sum = M[a * kRank] * q[i][Terms::of_left(0)];
          if constexpr (kRank == 2) sum = sum + M[a * kRank + 1] * q[i][Terms::of_left(1)];
          left[a] = node[i].e * sum;
        }
      }
#pragma unroll
      for (int f = 0; f < kFilters; ++f) {
        if (first_filter + f >= s.filters) break;
        Complex sum = q[i][Terms::of_output(f)];
#pragma unroll
        for (int a = 0; a < kRank; ++a) sum = sum - left[a] * q[i][Terms::of_right(f, a)];
        params.out[((first_filter + f) * s.channels + channel) * frequencies + j] = half[i] * sum;
      }
    }
  }
}

}  // namespace
}  // namespace packseq
