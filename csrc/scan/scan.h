// The selective scan of Mamba over packed sequences: the C++ API.
//
//   d[t] = softplus(delta[t] + delta_bias)                                  or without softplus, or without bias
//   h[t] = exp(d[t] A) h[t - 1] + d[t] u[t] B[t]                            for each state of each channel
//   y[t] = sum over the states of C[t] h[t]                                 twice its real part where A is complex
//   out[t] = (y[t] + D u[t]) * silu(z[t])                                   or without D, or without z
//
// Everything is per sequence and channel: t counts its rows, from its end where `reverse` is set; h starts from the
// initial state, or zero, and what it ends as is the final state. Channel c reads group c / (channels / groups) of B
// and C. Rows after the last sequence come back as zeros. Source: Gu and Dao, arXiv 2312.00752, algorithm 2.
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

// B or C: of every token [total, groups, states], or constant [channels, states].
struct StateMatrix {
  Packed tokens;          // data is nullptr where the matrix is constant
  const void* constants;  // [channels, states], parameter type; nullptr where it is of every token
};

// Parameters and states have the parameter type: float32, or float64 where the tensors are float64. Where `complex` is
// set, A, B, C and the states are complex, each a pair (real, imaginary) of the parameter type; strides of B and C then
// count pairs. Otherwise B and C, if of every token, have the tensors' type.
struct ScanProblem {
  Dtype dtype;  // of u, delta, z, out and their gradients; f64 on the CPU only
  bool complex;
  int64_t total;
  int64_t sequences;
  int channels, states, groups;  // channels is a multiple of groups; states is 1 to 256
  const int32_t* cu_seqlens;     // [sequences + 1]
  bool reverse;
  bool delta_softplus;
  Rows u, delta;  // [total, channels]
  Rows z;         // [total, channels]; data may be nullptr
  const void* A;  // [channels, states]
  StateMatrix B, C;
  const void* D;               // [channels], may be nullptr
  const void* delta_bias;      // [channels], may be nullptr
  const void* initial_states;  // [sequences, channels, states], may be nullptr
};

struct ScanForward {
  ScanProblem problem;
  void* out;           // [total, channels], contiguous
  void* final_states;  // [sequences, channels, states], may be nullptr
  void* workspace;     // CUDA only: scan_forward_workspace(problem) bytes, 256-byte aligned
};

// Gradients are contiguous, in the shape and type of what they are gradients of. A complex one is the derivative by
// the real part plus i times that by the imaginary part. nullptr where the input is absent.
struct ScanBackward {
  ScanProblem problem;
  Rows dout;                  // [total, channels]
  const void* dfinal_states;  // [sequences, channels, states], may be nullptr
  void *du, *ddelta;          // [total, channels]
  void* dz;                   // [total, channels]
  void* dA;                   // [channels, states]
  void *dB, *dC;              // [total, groups, states] or [channels, states], as B and C are
  void* dD;                   // [channels]
  void* ddelta_bias;          // [channels]
  void* dinitial_states;      // [sequences, channels, states]; may be nullptr
  void* workspace;            // CUDA only: scan_backward_workspace(problem) bytes, 256-byte aligned
};

// The forward for few tokens of many sequences, whose states live in a pool and are updated there. Problem's
// initial_states is not used.
struct ScanStep {
  ScanProblem problem;
  void* pool;  // [slots, channels, states], parameter type
  int64_t slots;
  const int32_t* indices;  // [sequences]: each sequence's slot; outside 0 .. slots: its rows of out become zeros.
                           // nullptr: sequence i has slot i
  void* out;               // [total, channels], contiguous
};

void scan_forward(const ScanForward&, const Executor&);
void scan_backward(const ScanBackward&, const Executor&);
void scan_step(const ScanStep&, const Executor&);

#if PACKSEQ_HAS_CUDA
size_t scan_forward_workspace(const ScanProblem&);
size_t scan_backward_workspace(const ScanProblem&);
void scan_forward(const ScanForward&, cudaStream_t);
void scan_backward(const ScanBackward&, cudaStream_t);
void scan_step(const ScanStep&, cudaStream_t);
#endif

}  // namespace packseq
