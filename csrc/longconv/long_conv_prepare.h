// What the long convolution prepares whatever its tensors' type: the plan, the filter's spectra, and at the end of the
// backward the filter's gradient from sums of spectra. All of it is float32.
#pragma once
#include <cuda_runtime_api.h>

#include "longconv/long_conv_filter.cuh"
#include "longconv/long_conv_plan.cuh"

namespace packseq::longconv {

struct PrepareParams {
  Shape shape;  // its plan, list, blocks and table are written
  int64_t most_long_blocks, chunk_sums;
};

struct SpectraParams {
  Shape shape;
  Filter filter;
  float4* spectra;  // class by class from 1 on, each [kSlots, lines, channels]
  float* lags;      // [kDirectLags, channels], from lag -kDirectRows on; of the direct class
};

struct FilterGradientParams {
  Shape shape;
  int64_t taps, taps_after;
  const float* direct_sums;  // [chunks, kLagGroups, kBlockLags, channels]
  float4* sums;              // class by class, each [chunks, kSlots, lines, channels]
  const float* skip_sums;    // [parts, channels]
  int64_t skip_parts;
  float *dk, *dk_after, *dD;
};

void prepare(const PrepareParams&, cudaStream_t);
void filter_spectra(const SpectraParams&, int threads, cudaStream_t);
void filter_gradient(const FilterGradientParams&, int threads, cudaStream_t);

}  // namespace packseq::longconv
