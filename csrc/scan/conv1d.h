// The short causal convolution in front of Mamba's scan, over packed sequences: the C++ API.
//
//   pre[t] = bias + sum over k of weight[k] x[t - (width - 1) + k]
//   out[t] = pre[t], or pre[t] * sigmoid(pre[t])                            activation silu
//
// Everything is per sequence and channel: t counts its rows, from its end where `reverse` is set. What stands before
// the first row is the sequence's initial state, or zeros; the final state is the last width - 1 values of the initial
// state and the rows together, the newest last. Rows after the last sequence come back as zeros.
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

// weight and bias are float32, or float64 where the tensors are float64; everything else has the tensors' type.
struct Conv1dProblem {
  Dtype dtype;  // f64 on the CPU only
  int64_t total;
  int64_t sequences;
  int channels, width;        // width is 2 to 8
  const int32_t* cu_seqlens;  // [sequences + 1]
  bool reverse;
  bool silu;
  Rows x;                      // [total, channels]
  const void* weight;          // [channels, width], contiguous
  const void* bias;            // [channels], may be nullptr
  const void* initial_states;  // [sequences, channels, width - 1], contiguous, may be nullptr
};

struct Conv1dForward {
  Conv1dProblem problem;
  void* out;           // [total, channels], contiguous
  void* final_states;  // [sequences, channels, width - 1], may be nullptr
};

// Gradients are contiguous, in the shape and type of what they are gradients of; nullptr where the input is absent.
struct Conv1dBackward {
  Conv1dProblem problem;
  Rows dout;                  // [total, channels]
  const void* dfinal_states;  // [sequences, channels, width - 1], may be nullptr
  void* dx;                   // [total, channels]
  void* dweight;              // [channels, width]
  void* dbias;                // [channels]
  void* dinitial_states;      // [sequences, channels, width - 1]
  void* workspace;            // CUDA only: conv1d_backward_workspace(problem) bytes, 256-byte aligned
};

// The forward for few tokens of many sequences, whose states live in a pool and are updated there. Problem's
// initial_states is not used.
struct Conv1dStep {
  Conv1dProblem problem;
  void* pool;  // [slots, channels, width - 1], the tensors' type
  int64_t slots;
  const int32_t* indices;  // [sequences]: each sequence's slot; outside 0 .. slots: its rows of out become zeros.
                           // nullptr: sequence i has slot i
  void* out;               // [total, channels], contiguous
};

void conv1d_forward(const Conv1dForward&, const Executor&);
void conv1d_backward(const Conv1dBackward&, const Executor&);
void conv1d_step(const Conv1dStep&, const Executor&);

#if PACKSEQ_HAS_CUDA
size_t conv1d_backward_workspace(const Conv1dProblem&);
void conv1d_forward(const Conv1dForward&, cudaStream_t);
void conv1d_backward(const Conv1dBackward&, cudaStream_t);
void conv1d_step(const Conv1dStep&, cudaStream_t);
#endif

}  // namespace packseq
