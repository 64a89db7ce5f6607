// Long convolutions of packed sequences with filters as long as they are: the C++ API.
//
//   x[t]   = pre_gate[t] u[t]                                               or u[t]
//   y[t]   = sum over j >= 0 of k[j] x[t - j]
//          + sum over j >= 0 of k_after[j] x[t + 1 + j] + D x[t]            or without either
//   out[t] = gate[t] y[t]                                                   or y[t]
//
// Everything is per sequence and channel: t counts its rows, from its end where `reverse` is set, and what lies outside
// the sequence counts as zero. Filters may be shorter or longer than the sequences. Rows after the last sequence come
// back as zeros. Sums are by Fourier transforms sized by the sequence's own length; in sequences of kDirectRows rows or
// fewer they are taken one after another, so that there a token exactly leaves alone what comes before it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/executor.h"
#include "core/packed.h"

#if PACKSEQ_HAS_CUDA
#include <cuda_runtime_api.h>
#endif

namespace packseq {

inline constexpr int kDirectRows = 64;

// k, k_after and D are float32, or float64 where the tensors are float64; everything else has the tensors' type.
struct LongConvProblem {
  Dtype dtype;  // f64 on the CPU only
  int64_t total;
  int64_t sequences;
  int64_t channels;
  const int32_t* cu_seqlens;  // [sequences + 1]
  bool reverse;
  Rows u, pre_gate, gate;  // [total, channels]; data of the gates may be nullptr
  const void* k;           // [channels, taps], contiguous
  const void* k_after;     // [channels, taps_after], contiguous, may be nullptr
  int64_t taps;            // 1 or more
  int64_t taps_after;
  const void* D;  // [channels], may be nullptr
};

struct LongConvForward {
  LongConvProblem problem;
  void* out;        // [total, channels], contiguous
  void* workspace;  // CUDA only: long_conv_forward_workspace(problem) bytes, 256-byte aligned
};

// Gradients are contiguous, in the shape and type of what they are gradients of; nullptr where the input is absent.
// Nothing of the forward is kept: what the gradients need is computed again.
struct LongConvBackward {
  LongConvProblem problem;
  Rows dout;  // [total, channels]
  void *du, *dpre_gate, *dgate;
  void *dk, *dk_after, *dD;
  void* workspace;  // CUDA only: long_conv_backward_workspace(problem) bytes
};

void long_conv_forward(const LongConvForward&, const Executor&);
void long_conv_backward(const LongConvBackward&, const Executor&);

#if PACKSEQ_HAS_CUDA
size_t long_conv_forward_workspace(const LongConvProblem&);
size_t long_conv_backward_workspace(const LongConvProblem&);
void long_conv_forward(const LongConvForward&, cudaStream_t);
void long_conv_backward(const LongConvBackward&, cudaStream_t);
#endif

}  // namespace packseq
