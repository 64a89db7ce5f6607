// A filter's taps of either side by their lag, and their gradients.
#pragma once
#include <cstdint>

namespace packseq::longconv {

struct Filter {
  const float *k, *k_after;  // [channels, taps], [channels, taps_after]
  int64_t taps, taps_after;
};

#ifdef __CUDACC__

__device__ inline float filter_at(const Filter &f, int64_t channel, int64_t lag) {
  if (lag >= 0) return lag < f.taps ? f.k[channel * f.taps + lag] : 0.f;
  const int64_t j = -1 - lag;
  return j < f.taps_after ? f.k_after[channel * f.taps_after + j] : 0.f;
}

struct FilterGradient {
  float *dk, *dk_after;
  int64_t taps, taps_after;

  __device__ void add(int64_t channel, int64_t lag, float x) const {
    if (lag >= 0) {
      if (lag < taps) dk[channel * taps + lag] += x;
    } else if (-1 - lag < taps_after) {
      dk_after[channel * taps_after - 1 - lag] += x;
    }
  }
};

#endif

}  // namespace packseq::longconv
