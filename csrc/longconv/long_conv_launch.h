// What the host needs of the long convolution's kernels: one element type a file, written into the build folder by
// CMake.
#pragma once
#include "longconv/long_conv_filter.cuh"
#include "longconv/long_conv_plan.cuh"

namespace packseq::longconv {

// One convolution, forward or of the gradients: a correlation is a convolution in reversed time.
//   x = pre_gate input    y = filter * x + D x    out = gate y    out_other = other y
struct ConvCall {
  Rows input, pre_gate, gate, other;  // [total, channels]; data of all but the first may be nullptr
  const float* D;                     // [channels], may be nullptr
  void *out, *out_other;              // [total, channels]; the second may be nullptr
  bool reverse;
};

struct ConvParams {
  Shape shape;
  ConvCall call;
  const float4* spectra;  // of the filter, as FftTile::weights()
  const float* lags;
  bool two_sided;
  int32_t first_class;  // of those that are transformed
};

// The filter's gradient, as sums over the sequences of a chunk.
struct GradientParams {
  Shape shape;
  ConvCall x;  // of which only the input and what gates it are read
  ConvCall dy;
  const float4* spectra;  // of the filter, as FftTile::weights()
  bool two_sided;
  float* direct_sums;  // [chunks, kLagGroups, kBlockLags, channels]
  float4* sums;        // class by class, each [chunks, kSlots, lines, channels]
};

constexpr int kSkipRows = 512;  // that one block of threads sums for dD

struct SkipParams {
  Shape shape;
  Rows input, pre_gate, dout, gate;
  float* sums;  // [parts of kSkipRows rows, channels]
};

// Sequences in blocks, forward (x's input to x's output) or backward.
struct BlockParams {
  Shape shape;
  Filter filter;
  ConvCall x, dy;                       // backward, x's output is the gate's gradient, and may be nullptr
  int32_t blocks_before, blocks_after;  // of the filter, as far as the longest sequence can reach
  bool backward;
  float4* pool;  // for the spectra of some channels
  int64_t pool_elements;
  float *dk, *dk_after;  // which the gradient is added to
};

// staged: rows go through shared memory, 16 bytes at a time. There is as much of it and every tensor lies so.
template <class T>
void convolve(const ConvParams&, bool staged, int blocks, cudaStream_t);
template <class T>
void gradients(const GradientParams&, bool staged, int blocks, cudaStream_t);
// Shared memory that a block must be able to have for it.
template <class T>
size_t staged_bytes(int fft_classes);
template <class T>
void skip_sums(const SkipParams&, cudaStream_t);
template <class T>
void convolve_blocks(const BlockParams&, bool staged, int blocks, cudaStream_t);

}  // namespace packseq::longconv
