// What the host needs of the long convolution's kernels: one element type a file, written into the build folder by
// CMake.
#pragma once
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
  const float4* spectra;
  const float* lags;
  bool two_sided;
};

// The filter's gradient, as sums over the sequences of a chunk.
struct GradientParams {
  Shape shape;
  ConvCall x, dy;  // of which only the inputs and what gates them are read
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

// Sequences in blocks: channels channel0 ... channel0 + channels are worked now.
struct BlockParams {
  Shape shape;
  ConvCall call;
  int64_t channel0, channels;
  float4* spectra;  // [blocks of all sequences, kSlots, lines, channels]
};

template <class T>
void convolve(const ConvParams&, int blocks, cudaStream_t);
template <class T>
void gradient_sums(const GradientParams&, int blocks, cudaStream_t);
template <class T>
void skip_sums(const SkipParams&, cudaStream_t);
template <class T>
void transform_blocks(const BlockParams&, int blocks, cudaStream_t);
template <class T>
void inverse_blocks(const BlockParams&, int blocks, cudaStream_t);

// Products of spectra, frequency by frequency, between the two.
struct BlockProductParams {
  Shape shape;
  int64_t channels;  // of those worked now
  int64_t blocks_before, blocks_after;
  const float4* filter;  // [blocks_before + blocks_after, kSlots, lines, channels]
  const float4* input;   // [blocks of all sequences, kSlots, lines, channels]
  float4* output;        // the same; may be the input where the filter has one side
  bool correlate;        // with the filter, where the gradient of the input is wanted
};

struct BlockSumsParams {
  Shape shape;
  int64_t channels;
  int64_t blocks_before, distances;  // from -blocks_before on
  const float4 *input, *dout;
  float4* sums;  // [distances, kSlots, lines, channels]
};

void multiply_blocks(const BlockProductParams&, int blocks, cudaStream_t);
void sum_block_products(const BlockSumsParams&, int blocks, cudaStream_t);

}  // namespace packseq::longconv
