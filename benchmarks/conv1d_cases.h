// The benchmarks' cases of the causal convolution: width 4, bias and SiLU, as Mamba calls it.
#pragma once
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "scan/conv1d.h"

namespace packseq::bench {

struct Conv1dCase {
  std::string name;
  std::vector<int> lengths;
  int channels;
  Dtype dtype = Dtype::bf16;

  int64_t total() const { return std::accumulate(lengths.begin(), lengths.end(), int64_t{0}); }
  int64_t elements() const { return total() * channels; }
  std::vector<int32_t> cu_seqlens() const {
    std::vector<int32_t> cu(lengths.size() + 1, 0);
    std::partial_sum(lengths.begin(), lengths.end(), cu.begin() + 1);
    return cu;
  }

  // What must move: x and out forward; x, dout and dx backward; each once.
  double bytes(bool backward) const { return double(elements()) * double(size_of(dtype)) * (backward ? 3 : 2); }

  Conv1dProblem problem(const int32_t* cu_seqlens, const void* x, const float* weight, const float* bias) const {
    return {.dtype = dtype,
            .total = total(),
            .sequences = int64_t(lengths.size()),
            .channels = channels,
            .width = 4,
            .cu_seqlens = cu_seqlens,
            .reverse = false,
            .silu = true,
            .x = {x, channels},
            .weight = weight,
            .bias = bias,
            .initial_states = nullptr};
  }
};

}  // namespace packseq::bench
