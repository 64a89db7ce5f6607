// The recurrence whose convolution s4_spectrum's filters are, token by token: the C++ API.
//
//   h[t] = Abar h[t - 1] + Bbar u[t]
//   y[t] = twice the real part of the sum over the poles of C h[t],  plus D u[t]
//
// with Abar = (I - dt/2 A)^-1 (I + dt/2 A), Bbar = (I - dt/2 A)^-1 dt B and A = diag(w) - P P^* by the bilinear
// transform, or Abar = exp(dt w), Bbar = (Abar - I) w^-1 B where `zoh` is set, which needs rank 0. Poles, P, B and C
// hold one of each conjugate pair, and P P^* acts on both: O(poles) a token. C is the model's own C, not C tilde.
// States live in a pool, as in scan/conv1d.h. Source: 2111.00396, appendix C.2.
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

struct S4Step {
  Dtype dtype;  // of u and out; f64 on the CPU only. Parameters and states are float32, or float64 with f64
  int64_t total;
  int64_t sequences;
  int64_t channels;
  int filters;      // outputs of a channel: how many C share its state
  int poles, rank;  // rank 0, 1 or 2
  bool zoh;
  const int32_t* cu_seqlens;  // [sequences + 1]
  Rows u;                     // [total, channels]
  const void* w;              // complex [channels, poles]
  const void* P;              // complex [rank, channels, poles]
  const void* B;              // complex [channels, poles]
  const void* C;              // complex [filters, channels, poles]
  const void* dt;             // real [channels]
  const void* D;              // real [filters, channels], may be nullptr
  void* pool;                 // complex [slots, channels, poles]
  int64_t slots;
  const int32_t* indices;  // [sequences]: each sequence's slot; outside 0 .. slots: its rows of out become zeros.
                           // nullptr: sequence i has slot i
  void* out;               // [total, filters, channels], contiguous
};

void s4_step(const S4Step&, const Executor&);

#if PACKSEQ_HAS_CUDA
void s4_step(const S4Step&, cudaStream_t);
#endif

}  // namespace packseq
